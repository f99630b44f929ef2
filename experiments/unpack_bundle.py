"""Unpacks what ``python -m experiments.offline_bundle`` packed: ``python3 unpack.py TARGET``.

It stands beside the pieces as unpack.py, and needs nothing but Python and its pip. The packages go to
TARGET/site, the project to TARGET/ersim; nothing that is installed is touched, and no folder that this did
not make. Another bundle into the same TARGET keeps the project of the one before, with all that was measured
in it, as TARGET/ersim.previous. The last lines printed say how to go on. A piece that is missing or damaged
is named (status 1). Run again, it does nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

BEGUN, DONE = ".ersim-bundle", "unpacked.json"


class Pieces(io.RawIOBase):
    """The pieces, one after the other, as one stream to read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._file: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while self._file is not None or self._paths:
            if self._file is None:
                self._file = open(self._paths.pop(0), "rb")  # noqa: SIM115 (closed at its end)
            if count := self._file.readinto(buffer):
                return count
            self._file.close()
            self._file = None
        return 0


def check(folder: Path, manifest: dict[str, object]) -> list[Path]:
    """The pieces in order. Exits naming those that are missing or damaged, or with another Python."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    if own != manifest["python"]:
        sys.exit(f"unpack: packed for Python {manifest['python']}, this is {own}: pack again with {own}")
    pieces, faults = [], []
    for name, digest in dict(manifest["pieces"]).items():  # type: ignore[call-overload]
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            faults.append(f"{name} is damaged")
        pieces.append(path)
    if faults:
        sys.exit(f"unpack: {', '.join(faults)}: copy again to {folder}")
    return pieces


def make_room(target: Path) -> None:
    """Take an earlier bundle's packages away, and keep its project. Exits where something else is there."""
    there = [name for name in ("wheels", "site", "ersim") if (target / name).exists()]
    if there and not (target / BEGUN).exists():
        sys.exit(f"unpack: {target} holds {there[0]}, which no bundle left there: choose another folder")
    for name in ("wheels", "site"):
        shutil.rmtree(target / name, ignore_errors=True)
    if (target / "ersim").exists():
        kept = target / "ersim.previous"
        if kept.exists():
            sys.exit(f"unpack: {kept} is there already: move it away first, it may hold what was measured")
        (target / "ersim").rename(kept)
    target.mkdir(parents=True, exist_ok=True)
    (target / BEGUN).touch()


def unpack(folder: Path, target: Path) -> None:
    """Unpack the pieces of `folder` below `target` and install their wheels there."""
    if not (folder / "manifest.json").is_file():
        sys.exit(f"unpack: manifest.json is missing: copy it to {folder}")
    manifest = json.loads((folder / "manifest.json").read_text())
    if (target / DONE).exists() and (target / DONE).read_text() == json.dumps(manifest):
        return
    pieces = check(folder, manifest)
    make_room(target)
    stream = io.BufferedReader(Pieces(pieces), 1 << 20)
    with tarfile.open(fileobj=stream, mode="r|xz") as bundle:
        bundle.extractall(target, filter="data")
    wheels = [str(wheel) for wheel in sorted((target / "wheels").glob("*.whl"))]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target / "site")]
    if wheels and subprocess.run([*pip, *offline, *wheels], check=False).returncode:
        sys.exit("unpack: pip could not install the wheels")
    shutil.rmtree(target / "wheels", ignore_errors=True)
    (target / DONE).write_text(json.dumps(manifest))


def main() -> int:
    """Entry point."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python3 unpack.py TARGET")
    target = Path(sys.argv[1]).resolve()
    try:
        unpack(Path(__file__).resolve().parent, target)
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        sys.exit(f"unpack: {type(error).__name__}: {error}")
    print(f"export PYTHONPATH={target / 'site'}\ncd {target / 'ersim'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
