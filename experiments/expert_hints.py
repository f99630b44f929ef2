"""After Hydra refused a command line: the fleet's experts, and how a value not at the top is given."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path

ELSEWHERE = {
    "gpu": "fleet.gpu=NAME (all experts), fleet.experts.EXPERT.gpu=NAME (one)",
    "model": "fleet.experts.EXPERT.model=NAME",
    "expert": "expert@fleet.experts.EXPERT=NAME (another for an expert of the fleet), with + to add one",
    "price": "fleet.experts.EXPERT.usd_per_gpu_hour=NUMBER (conf/price holds the defaults)",
    "calibration": "fleet.experts.EXPERT.calibration=NAME; `ersim calibration=list` shows them",
}
"""Groups that are not chosen at the top, and where their names are used instead."""

QUALITY = "workload.prompts.quality_columns"


def hints_of(arguments: list[str], conf: Path) -> list[str]:
    """What to write instead of those of `arguments` that name experts or groups in a way that cannot be."""
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        bare = key.lstrip("+~")
        if bare.startswith("fleet.experts."):
            hint = _expert_hint(key, value if equals else None, arguments, conf)
        elif equals and bare in ELSEWHERE:
            hint = _elsewhere_hint(bare, value, conf)
        elif bare in (QUALITY, f"{QUALITY}.*"):
            hint = _quality_hint(key, value)
        else:
            hint = None
        if hint:
            found.append(f"ersim: {hint}")
    return found


def _expert_hint(key: str, value: str | None, arguments: list[str], conf: Path) -> str | None:
    """For an expert that the fleet does not have, its experts; for a name instead of values, the group."""
    parts = key.lstrip("+~").split(".")
    name = parts[2]
    experts = fleet_experts(arguments, conf)
    if experts is None:
        return None
    fleet, names = experts
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        guess = f"; did you mean {near[0]}?" if near else "."
        return (
            f"fleet {fleet} has no expert {name!r}{guess} Its experts: {', '.join(names)}. "
            f"To add one: +expert@fleet.experts.{name}=NAME, with NAME one of "
            f"{', '.join(_options(conf, 'expert'))}"
        )
    if len(parts) == 3 and value and not value.startswith("{"):
        return f"another expert in place of {name}: expert@fleet.experts.{name}={value}"
    return None


def _elsewhere_hint(group: str, value: str, conf: Path) -> str:
    names = [] if group == "calibration" else _options(conf, group)
    unknown = f" There is no {value!r};" if names and value not in names else ""
    listed = f"{unknown} NAME is one of: {', '.join(names)}" if names else ""
    return f"{group} is not chosen at the top: use {ELSEWHERE[group]}.{listed}"


def _quality_hint(key: str, value: str) -> str | None:
    """A mapping is given without quotes inside, and with a plus, since its names are new ones."""
    wanted = value if value.startswith("{") else "{*:score__*}"
    plain = wanted.replace('"', "").replace("'", "")
    if key == f"+{QUALITY}" and plain == value:
        return None
    return f"models and their columns are added, without quotes inside the braces: '+{QUALITY}={plain}'"


def _options(conf: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def fleet_experts(arguments: list[str], conf: Path) -> tuple[str, list[str]] | None:
    """Name and experts of the fleet that the command line chooses; None if that cannot be composed."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    chosen = [
        argument
        for argument in arguments
        if argument.partition("=")[0] in ("fleet", "experiment") and "," not in argument
    ]
    folders = [f"file://{Path(path).resolve()}" for path in config_dirs(arguments)]
    search = [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []
    with contextlib.suppress(Exception):  # what is wrong with it has been said already
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf), version_base="1.3"):
            config = compose("config", overrides=[*chosen, *search])
        return str(config.fleet.name), [str(name) for name in config.fleet.experts]
    return None


def config_dirs(arguments: list[str]) -> list[str]:
    """The folders given as `--config-dir FOLDER`, `--config-dir=FOLDER` or `-cd FOLDER`."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):  # there may be none
        name, equals, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(value if equals else following)
    return [folder for folder in found if folder]
