"""After Hydra refused a command line: which keys and choices there are instead."""

from __future__ import annotations

import difflib
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from experiments.expert_hints import config_dirs, hints_of
from experiments.schema import RunConfig


def print_hints(arguments: list[str], conf: Path) -> None:
    """For each override whose key does not exist, print the keys (and groups) that do."""
    own = [Path(folder) for folder in config_dirs(arguments)]
    for argument in arguments:
        key, equals, _ = argument.lstrip("+~").partition("=")
        if equals and not key.startswith(("-", "hydra")) and "@" not in key:
            hint = None if any((folder / key).is_dir() for folder in own) else hint_for(key, conf)
            if hint:
                print(hint, file=sys.stderr)
    for hint in hints_of(arguments, conf):
        print(hint, file=sys.stderr)


def hint_for(key: str, conf: Path) -> str | None:
    """What can stand in place of `key`; None if the key is fine.

    Walks the typed config; below a mapping (experts, params) any name goes.
    """
    if (conf / key).is_dir():
        return None
    kind: Any = RunConfig
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not is_dataclass(kind):
            return None
        names = [item.name for item in fields(kind)]
        if part not in names:
            groups = [path.name for path in conf.iterdir() if path.is_dir()] if depth == 0 else []
            return _no_such(key, ".".join(parts[:depth]), part, sorted({*names, *groups}))
        kind = _inner(get_type_hints(kind)[part])
        if isinstance(kind, tuple):  # a mapping: the next part is a name of the user's
            kind = kind[0] if depth + 2 < len(parts) else None
            if kind is None or not is_dataclass(kind):
                return None
            return _within_mapping(key, parts[depth + 2 :], kind)
    return None


def _within_mapping(key: str, parts: list[str], kind: Any) -> str | None:
    for depth, part in enumerate(parts):
        if not is_dataclass(kind):
            return None
        names = [item.name for item in fields(kind)]
        if part not in names:
            return _no_such(key, key.rsplit("." + ".".join(parts[depth:]), 1)[0], part, names)
        kind = _inner(get_type_hints(kind)[part])
    return None


def _inner(hint: Any) -> Any:
    """A dataclass as itself, a mapping of dataclasses as a 1-tuple of it, anything else as None."""
    if is_dataclass(hint):
        return hint
    if getattr(hint, "__origin__", None) is dict:
        return (get_args(hint)[1],)
    return None


def _no_such(key: str, parent: str, part: str, names: list[str]) -> str:
    near = difflib.get_close_matches(part, names, n=1)
    guess = f"; did you mean {near[0]}?" if near else "."
    where = f"under {parent}" if parent else "at the top"
    return f"ersim: there is no {part!r} {where} (in {key!r}){guess} There are: {', '.join(names)}"
