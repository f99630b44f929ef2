"""Packs vLLM, this project and what both need, for a GPU machine that reaches no package index.

``python -m experiments.offline_bundle --out FOLDER [--vllm 0.26.0] [--there FILE] [--leave-out a,b]
[--drop PATTERN] [--piece-mib 55] [--python 3.12]``, or ``@FILE`` with such arguments, as
``@experiments/bundle_hopper.txt``.
--there is what ``python3 -m pip list --format=freeze`` prints on that machine; what it names is not carried.
--leave-out names packages that are not carried, nor what only they need; --drop, files of the vLLM wheel
that a GPU or a model does not use. Run it with the Python version of that machine (the wheels are for it)
and its platform. FOLDER then holds the pieces (each of at most --piece-mib), manifest.json and unpack.py:
copy them there, in as many steps as it takes, and ``python3 unpack.py TARGET``. The last line printed is
JSON: what is carried, and what is there in another release than is asked for.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from ersim.errors import ConfigError, ErsimError
from experiments.folders import check_folder
from experiments.offline_packages import Package, needed, pip, read_installed, resolve, unmet
from testbed.arguments import whole

ROOT = Path(__file__).resolve().parents[1]
MIB_BYTES = 2**20
REFUSED, INTERRUPTED = 2, 130
OWN_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class PieceWriter(io.RawIOBase):
    """A stream that is cut into files ``bundle.0``, ``bundle.1`` ... of at most `piece_bytes` each."""

    def __init__(self, folder: Path, piece_bytes: int) -> None:
        self._folder, self._most = folder, piece_bytes
        self._file: io.BufferedWriter | None = None
        self.digests: dict[str, str] = {}
        self._hash = hashlib.sha256()
        self._left = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view = memoryview(data)
        while view:
            if self._left == 0:
                self._next()
            assert self._file is not None
            part, view = view[: self._left], view[self._left :]
            self._file.write(part)
            self._hash.update(part)
            self._left -= len(part)
        return len(data)

    def _next(self) -> None:
        self.finish()
        self._hash, self._left = hashlib.sha256(), self._most
        self._file = open(self._folder / f"bundle.{len(self.digests)}", "wb")  # noqa: SIM115

    def finish(self) -> None:
        """Close the piece that is open, and note its digest."""
        if self._file is not None:
            self._file.close()
            self.digests[Path(self._file.name).name] = self._hash.hexdigest()
            self._file = None


def project_requirements() -> list[str]:
    """What pyproject.toml says this project depends on."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def project_files() -> list[str]:
    """The tracked files of this checkout, as they are now. Raises ConfigError outside of a git checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise ConfigError(f"the project is packed from its git checkout: {listed.stderr.strip()}")
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def stored(wheel: Path, target: Path, drop: Sequence[str]) -> set[str]:
    """Write a wheel again, uncompressed (the whole is compressed), without files that match; what matched."""
    met: set[str] = set()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            patterns = {pattern for pattern in drop if fnmatch.fnmatchcase(entry.filename, pattern)}
            met |= patterns
            if not patterns:
                kept = zipfile.ZipInfo(entry.filename, entry.date_time)
                kept.external_attr = entry.external_attr
                new.writestr(kept, old.read(entry))
    return met


def pack(wheels: Path, out: Path, piece_bytes: int, drop: Sequence[str]) -> dict[str, str]:
    """Pack the wheels and the project into pieces in `out`; digests by name. ConfigError: idle `drop`."""
    writer, met = PieceWriter(out, piece_bytes), set[str]()
    with tarfile.open(fileobj=writer, mode="w|xz") as bundle, tempfile.TemporaryDirectory() as scratch:
        for wheel in sorted(wheels.glob("*.whl")):
            again = Path(scratch, wheel.name)
            met |= stored(wheel, again, drop if wheel.name.startswith("vllm-") else ())
            bundle.add(again, f"wheels/{wheel.name}")
            again.unlink()
        for name in project_files():
            bundle.add(ROOT / name, f"ersim/{name}", recursive=False)
    writer.finish()
    if idle := [pattern for pattern in drop if pattern not in met]:
        raise ConfigError(f"--drop must match files of the vLLM wheel, got {', '.join(idle)}")
    return writer.digests


def bundle(carried: Sequence[Package], out: Path, piece_bytes: int, drop: Sequence[str]) -> dict[str, str]:
    """Fetch the wheels and write the bundle; digests of its pieces by name."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("bundle.*"), out / "manifest.json"):
        old.unlink(missing_ok=True)  # never pieces of two bundles side by side
    with tempfile.TemporaryDirectory() as scratch:
        if carried:
            pip("wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, *[one.pinned for one in carried])
        digests = pack(Path(scratch), out, piece_bytes, drop)
    describe(out, digests, [one.pinned for one in carried])
    return digests


def describe(out: Path, digests: Mapping[str, str], packages: Sequence[str]) -> None:
    """Write manifest.json, which a bundle is unpacked by, and unpack.py beside it."""
    manifest = {"python": OWN_PYTHON, "pieces": digests, "packages": packages}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.copy(Path(__file__).with_name("unpack_bundle.py"), out / "unpack.py")


class Arguments(argparse.ArgumentParser):
    """Takes ``@FILE`` too: one argument a line, ``#`` begins a comment."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return arg_line.partition("#")[0].split()


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = Arguments(description=__doc__.splitlines()[0] if __doc__ else None, fromfile_prefix_chars="@")
    made.add_argument("--out", type=Path, required=True, help="folder for the pieces")
    made.add_argument("--vllm", help="vLLM's version (default: none is carried)")
    made.add_argument("--there", type=Path, help="what `pip list --format=freeze` printed on that machine")
    made.add_argument("--leave-out", action="append", default=[], help="packages not carried, by commas")
    made.add_argument("--drop", action="append", default=[], help="files of the vLLM wheel not carried")
    made.add_argument("--piece-mib", type=whole(1), default=55)
    made.add_argument("--python", default=OWN_PYTHON, help="of that machine: must be this one's, as 3.12")
    return made


def holds_project(folder: Path) -> bool:
    """Whether tracked files lie in a folder."""
    return any(folder.resolve() in (ROOT / name).parents for name in project_files())


def check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for what can be known before anything is fetched."""
    if arguments.python != OWN_PYTHON:
        raise ConfigError(
            f"--python must be this interpreter's, {OWN_PYTHON}, got {arguments.python}: "
            f"run it in an environment of Python {arguments.python}"
        )
    if arguments.drop and not arguments.vllm:
        raise ConfigError("--drop has no effect without --vllm: name its version, or leave --drop out")
    if arguments.out.resolve() == ROOT or holds_project(arguments.out):
        raise ConfigError(f"--out must be a folder for the bundle alone, got {arguments.out}; choose another")
    check_folder(arguments.out, "--out")


def left_out(arguments: argparse.Namespace) -> set[str]:
    """The packages that --leave-out names."""
    names = (name for text in arguments.leave_out for name in text.split(","))
    return {canonicalize_name(name) for name in names if name}


def main() -> int:
    """Entry point: 2 when something was refused or could not be fetched."""
    arguments = parser().parse_args()
    wanted = project_requirements() + ([f"vllm=={arguments.vllm}"] if arguments.vllm else [])
    try:
        installed = read_installed(arguments.there) if arguments.there else {}
        check(arguments)
        print("finding out what is needed (some minutes)", file=sys.stderr)
        packages = resolve(wanted)
        if unknown := sorted(left_out(arguments) - packages.keys()):
            raise ConfigError(f"--leave-out must name packages that are needed, got {', '.join(unknown)}")
        carried = needed(wanted, packages, installed.keys() | left_out(arguments))
        print(f"packing {len(carried)} packages and the project (some minutes)", file=sys.stderr)
        digests = bundle(carried, arguments.out, arguments.piece_mib * MIB_BYTES, arguments.drop)
    except (ErsimError, OSError) as error:
        print(f"offline_bundle: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("offline_bundle: interrupted; the bundle is not whole", file=sys.stderr)
        return INTERRUPTED
    total = sum((arguments.out / name).stat().st_size for name in digests)
    names = [one.pinned for one in carried]
    report = {"out": str(arguments.out), "pieces": len(digests), "bytes": total, "packages": names}
    print(
        json.dumps(
            {"command": "offline_bundle", **report, "other_release": unmet(wanted, carried, installed)}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
