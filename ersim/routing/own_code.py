"""Classes that a user brings along: from what is installed, else from the working directory."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ersim.errors import ConfigError


def look_in_working_directory() -> None:
    """Let imports find a user's own modules there, after all that is installed.

    Commands do not do so by themselves, unlike ``python -m``.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def imported(path: str, key: str) -> Any:
    """What the dotted `path` names; ConfigError under `key` if it cannot be imported."""
    look_in_working_directory()
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key} {path!r} cannot be imported: {error}; a module of your own must be installed "
            f"or lie under the working directory, {Path.cwd()}"
        ) from error
