"""Values that no group of the configuration can have, such as `fleet=null`, said before Hydra composes.

Hydra answers them with a traceback that names neither the key nor the value.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from ersim.errors import ConfigError, unknown_choice
from experiments.expert_hints import ELSEWHERE, config_dirs
from experiments.paths import CONF

HYDRAS_OWN = "hydra"


def check_groups(arguments: Sequence[str], conf: Path, name: str, keys: Collection[str] = ()) -> None:
    """Raise ConfigError for a group that is given null, a number or true where a name belongs.

    arguments: a command line for Hydra. conf, name: folder and name of the configuration it composes.
    keys: its own keys that hold plain values under the name of a group elsewhere.
    What Hydra cannot read either is left for it to say.
    """
    roots = [conf, CONF, *map(Path, config_dirs([*arguments]))]
    parser = OverridesParser.create()
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            override = parser.parse_override(argument)
            values = _values(parser, override)
        except HydraException:
            continue
        group = override.key_or_group
        if group not in keys and _is_group(group, roots):
            for value, text in values:
                _check(override, value, text, roots, conf / f"{name}.yaml")


def leave_on_bad_groups(
    command: str, arguments: Sequence[str], conf: Path, name: str, keys: Collection[str] = ()
) -> None:
    """`check_groups` for a command's start: one line, and status 1 as where Hydra refuses an override."""
    try:
        check_groups(arguments, conf, name, keys)
    except ConfigError as error:
        print(f"{command}: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _values(parser: OverridesParser, override: Override) -> list[tuple[object, str]]:
    """The values of an override and how each was written; those of a sweep one by one."""
    if not override.is_sweep_override():
        return [(override.value(), override.get_value_element_as_str())]
    texts = [str(text) for text in override.sweep_string_iterator()]
    return [(parser.parse_override(f"{override.key_or_group}={text}").value(), text) for text in texts]


def _is_group(key: str, roots: Sequence[Path]) -> bool:
    return key.partition("/")[0] == HYDRAS_OWN or any((root / key).is_dir() for root in roots)


def _check(override: Override, value: object, text: str, roots: Sequence[Path], chosen_in: Path) -> None:
    """One value of a group; a mapping (`fleet={}`) is none of a group but changes what it holds."""
    group = override.key_or_group
    if override.is_delete():
        if not isinstance(value, str | None):
            raise ConfigError(f"{override.get_key_element()} takes no value, got {text!r}; leave it away")
    elif not isinstance(value, str | list | dict):
        key = group if override.package is None else f"{group}@{override.package}"
        here = override.package is None and not override.is_add() and not group.startswith(HYDRAS_OWN)
        if here and group not in _defaults(chosen_in):
            instead = ELSEWHERE.get(group, "another command, or leave it out")
            raise ConfigError(f"{key}={text}: {group} is not chosen here: use {instead}")
        options = {path.stem for root in roots for path in (root / group).glob("*.yaml")}
        if not options:
            raise ConfigError(f"{key} must be a name, got {text!r}; leave it out for what is used then")
        raise ConfigError(f"{unknown_choice(key, text, options)}; leave it out for what is used then")


def _defaults(config: Path) -> set[str]:
    """Groups of a configuration's defaults list."""
    entries = yaml.safe_load(config.read_text(encoding="utf-8"))["defaults"]
    return {str(key).lstrip("/") for entry in entries if isinstance(entry, dict) for key in entry}
