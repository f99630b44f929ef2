"""Whether a result can be written where it is wanted, found out before what takes time begins."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ersim.errors import ConfigError, bad_value


def check_folder(folder: Path, key: str = "folder") -> None:
    """Raise ConfigError for a folder that cannot be made, or that cannot be written into.

    What is missing of it is made in a folder of its own there, and removed: as root, or where a kernel keeps
    its own files, permissions tell nothing. key: what names it in the message.
    """
    whole = folder.absolute()
    there = next(path for path in (whole, *whole.parents) if os.path.exists(path))
    if not there.is_dir():
        raise ConfigError(f"{key}={folder} cannot be made: {there} is a file; choose another")
    try:
        with tempfile.TemporaryDirectory(prefix=".ersim-", dir=there) as trial:
            (Path(trial) / whole.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        why = getattr(error, "strerror", None) or error
        must = "a folder that can be made and written"
        raise ConfigError(f"{key} must be {must}, got {folder} ({there}: {why}); choose another") from error


def check_file(path: Path, key: str) -> None:
    """Raise ConfigError for a file that cannot be written. key: what names it in the message."""
    if path.is_dir():
        raise bad_value(key, "a file to write, not a folder", str(path))
    try:
        check_folder(path.parent)
    except ConfigError as error:
        raise bad_value(key, f"a file that can be written ({error})", str(path)) from error


class RunFolderFirst(Callback):
    """Stops a command before Hydra fails to make the folder of its run."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the error and leave with exit code 2 if the folder cannot be made."""
        try:
            check_folder(Path(str(config.hydra.run.dir)), "hydra.run.dir")
        except ConfigError as error:
            print(f"{config.hydra.help.app_name}: {error}", file=sys.stderr)
            raise SystemExit(2) from error
