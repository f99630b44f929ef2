"""Files that are either whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHOLE = "whole.json"
"""Written into the folder of a measurement when all of it is there."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there; on error nothing stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def _plain(value: Any) -> Any:
    """Turn numpy scalars and arrays into JSON values; NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any, indent: int | None = 2) -> str:
    """Serialise dataclass-free data; numpy values become plain ones, non-finite numbers null."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def set_aside(folder: Path, holds: str, suffix: str = "previous") -> None:
    """Move a folder to `<name>.<suffix>`, in place of what lay there; only if it holds a match of `holds`.

    Without a match nothing worth keeping is in it, and it is removed.
    """
    if folder.is_dir() and any(folder.glob(holds)):
        previous = folder.with_name(f"{folder.name}.{suffix}")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    shutil.rmtree(folder, ignore_errors=True)


def set_earlier_aside(folder: Path, whole: str, holds: str) -> None:
    """Keep what an earlier measurement left: a whole one as `.previous`, one that broke off as `.broken`.

    Each takes the place of its own kind only, so that no failure costs the last whole one. whole: the file
    that says so of a folder; holds: what else is worth keeping.
    """
    if (folder / whole).is_file():
        set_aside(folder, whole)
    else:
        set_aside(folder, holds, "broken")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, to_json(value) + "\n")
