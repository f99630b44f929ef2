"""Fitted routings kept on disk between commands: fitting the default router takes 0.2 s, reading it 2 ms.

A kept routing is what fitting would give again, or it is not used. Its name is a digest of all that
fitting depends on: settings, experts, prompts and seed, the source of the code that fits, the
installed packages, Python, and the processor's instruction sets, which decide the last bits of a
sum. A file that is cut, damaged or holds anything but ersim's own and numpy's data is fitted anew,
and so is everything where the folder cannot be used: nothing here is ever an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

import ersim
from ersim.util.files import write_atomically

MAX_FILES, MAX_BYTES = 64, 8_000_000
DIGEST_BYTES = 32
SOURCES = ("routing", "prepare.py", "types.py", "fitted.py", "system/dispatch.py", "workload/prompts.py")
PLAIN = {
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("collections", "Counter"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}
"""What a file may name besides classes of ersim: reading it can run nothing else."""


class Refused(pickle.UnpicklingError):
    """The file names something that no routing of ersim's own needs."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN and not module.startswith("ersim."):
            raise Refused(f"{module}.{name}")
        found = super().find_class(module, name)
        if module.startswith("ersim.") and not isinstance(found, type):
            raise Refused(f"{module}.{name}")
        return found


class Store:
    """Objects in a folder, found again by a text that says all that they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, identity: str) -> Path:
        """The file of an identity: it changes with the code and the machine, too."""
        text = json.dumps([identity, *_surroundings()])
        return self.folder / f"routing-{hashlib.sha256(text.encode()).hexdigest()[:40]}.bin"

    def get(self, identity: str) -> Any:
        """What was kept; None if there is nothing that can be used."""
        try:
            content = self.path(identity).read_bytes()
            body = memoryview(content)[DIGEST_BYTES:]
            if hashlib.sha256(body).digest() != content[:DIGEST_BYTES]:
                return None
            return _Reader(io.BytesIO(body)).load()
        except Exception:  # a damaged pickle can raise anything
            return None

    def put(self, identity: str, value: object) -> None:
        """Keep `value` if it can be read back and is not too big; the oldest files make room."""
        try:
            body = pickle.dumps(value, protocol=5)
            if len(body) > MAX_BYTES:
                return
            _Reader(io.BytesIO(body)).load()  # a class of the user's own is not kept
            content = hashlib.sha256(body).digest() + body

            def write(temporary: Path) -> None:
                temporary.write_bytes(content)

            write_atomically(self.path(identity), write)
            self._make_room()
        except Exception:  # no space, no rights, an object that cannot be pickled: fit again next time
            return

    def _make_room(self) -> None:
        files = sorted(self.folder.glob("routing-*.bin"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MAX_FILES]:
            with contextlib.suppress(OSError):
                path.unlink()


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """What fitting depends on besides its configuration."""
    from numpy._core._multiarray_umath import __cpu_features__

    features = ",".join(sorted(name for name, present in __cpu_features__.items() if present))
    return (ersim.__version__, sys.version, np.__version__, features, _source_digest(), _packages_digest())


def _source_digest() -> str:
    """A digest of the code that reads prompts, fits policies and asks them."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for name in SOURCES:
        path = root / name
        for file in [path] if path.suffix else sorted(path.rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _packages_digest() -> str:
    """A digest of the names of all installed distributions, which hold their versions."""
    names: set[str] = set()
    for folder in sys.path:
        with contextlib.suppress(OSError):
            names.update(path.name for path in Path(folder).iterdir() if path.suffix == ".dist-info")
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
