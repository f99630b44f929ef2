"""Names that a configuration's schema does not have: Hydra's `+name=value` adds any, and nobody reads it."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ersim.errors import ConfigError


def check_names(config: DictConfig) -> None:
    """Raise ConfigError for a key that is no field of the dataclass that its node stands for.

    Mappings of free names (experts, params, live) are not looked at, the dataclasses below them are.
    """
    _check(config, "")


def _check(node: DictConfig | ListConfig, path: str) -> None:
    kind = OmegaConf.get_type(node)
    names = [item.name for item in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else None
    keys: list[Any] = list(node) if isinstance(node, DictConfig) else list(range(len(node)))
    for key in keys:
        here = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}".lstrip(".")
        if names is not None and key not in names:
            raise _unknown(here, str(key), path, names)
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, (DictConfig, ListConfig)):
            _check(value, here)


def _unknown(full: str, key: str, parent: str, names: list[str]) -> ConfigError:
    near = difflib.get_close_matches(key, names, n=1)
    guess = f"; did you mean {near[0]}?" if near else "."
    where = f"under {parent}" if parent else "at the top"
    return ConfigError(f"{full} is not known{guess} There are {where}: {', '.join(sorted(names))}")
