"""The hot path as machine code, where somebody built it: `make fast` translates `MODULES` to C with mypyc.

The Python files are the only source, and everything works without a compiler. What is built lies in
a folder that is named by a digest of those files, so that a binary whose source has changed since is
not found any more, and the interpreter takes the source. ERSIM_INTERPRETED=1 ignores what is built.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

MODULES = (
    "ersim.types",
    "ersim.engine.bulk",
    "ersim.engine.engine",
    "ersim.engine.prefix",
    "ersim.engine.queue",
    "ersim.engine.request",
    "ersim.engine.scheduler",
    "ersim.engine.step",
    "ersim.steptime.evaluate",
    "ersim.system.dispatch",
    "ersim.system.ends",
    "ersim.system.gateway",
    "ersim.system.inflight",
    "ersim.system.log",
    "ersim.system.replica",
    "ersim.system.sources",
    "ersim.system.turns",
    "ersim.util.heaps",
    "ersim.workload.base",
    "ersim.workload.closed",
    "ersim.workload.sessions",
)
"""What is compiled: everything that runs once per engine step or per request, and nothing else."""

GROUP = "ersim_fast"
"""mypyc puts all modules into one shared library of this name; each has a small file that points there."""

ROOT = Path(__file__).resolve().parents[1]


def source_file(module: str) -> Path:
    """The Python file of one of `MODULES`."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def built_folder() -> Path:
    """Where the binaries of the present sources and of this Python lie, if somebody built them."""
    digest = hashlib.sha256(f"{sys.implementation.cache_tag} {EXTENSION_SUFFIXES[0]}".encode())
    for module in MODULES:
        digest.update(source_file(module).read_bytes())
    return ROOT / "build" / "fast" / digest.hexdigest()[:16]


def binaries(folder: Path) -> dict[str, Path]:
    """The files to import by module name, the shared library among them; {} unless all are there."""
    suffix = EXTENSION_SUFFIXES[0]
    files = {name: folder.joinpath(*name.split(".")[:-1], name.split(".")[-1] + suffix) for name in MODULES}
    files[f"{GROUP}__mypyc"] = folder / f"{GROUP}__mypyc{suffix}"
    return files if all(file.is_file() for file in files.values()) else {}


class Binaries(MetaPathFinder):
    """Imports modules from given files, before anybody looks for their sources."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The compiled module of that name, or None for the next finder to look."""
        file = self.files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def use_binaries() -> None:
    """Let imports find the compiled modules, if there are any for exactly these sources.

    They need mypyc's `librt`, which comes with mypy: an environment without it interprets.
    """
    if os.environ.get("ERSIM_INTERPRETED", "0") not in ("", "0"):
        return
    files = binaries(built_folder()) if find_spec("librt") else {}
    if files:
        sys.meta_path.insert(0, Binaries(files))


def is_compiled() -> bool:
    """Whether this process runs the compiled hot path."""
    from ersim.engine import scheduler

    return not str(scheduler.__file__).endswith(".py")
