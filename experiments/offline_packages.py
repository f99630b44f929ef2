"""Which packages a machine without a package index lacks, of those that this project and vLLM need.

pip resolves what is needed as if nothing were installed; from what was asked for one goes down the
requirements, and not below a package that is there already or is left out: what torch needs is there with
torch. The environment markers are those of this interpreter, so its version and platform must be theirs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ersim.errors import ConfigError, DataError

SOURCE_ONLY = ("antlr4-python3-runtime",)
"""Published without a wheel (in the release that Hydra needs); pip builds it."""


@dataclass(frozen=True)
class Package:
    """A release that pip chose, and what it requires."""

    name: str
    version: str
    requires: tuple[Requirement, ...] = field(default=())

    @property
    def pinned(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


def read_installed(path: Path) -> dict[str, str | None]:
    """Version by name of what ``pip list --format=freeze`` printed; None where a line has a name only.

    Raises DataError naming a line that is neither, ConfigError for a file that cannot be read.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--there must be a file of `pip list --format=freeze`, got {path}: {error}"
        ) from None
    installed: dict[str, str | None] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text or text.startswith("-"):  # a comment, or an editable install
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            raise DataError(f"{path}: line {number} must be NAME or NAME==VERSION, got {text!r}") from None
        pins = [one.version for one in requirement.specifier if one.operator in ("==", "===")]
        installed[canonicalize_name(requirement.name)] = pins[0] if pins else None
    return installed


def pip(*arguments: str) -> None:
    """Run this interpreter's pip. Raises ConfigError with the end of what it said."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise ConfigError(f"pip {arguments[0]} failed:\n{said}")


def resolve(wanted: Iterable[str]) -> dict[str, Package]:
    """What pip would install for these requirements on an empty machine, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        source = [f"--no-binary={name}" for name in SOURCE_ONLY]
        pip("install", "--dry-run", "--ignore-installed", "--quiet", "--only-binary=:all:", *source,
            "--report", str(path), *wanted)  # fmt: skip
        return read_report(json.loads(path.read_text()))


def read_report(report: Mapping[str, Any]) -> dict[str, Package]:
    """The packages of pip's installation report (version 1), by name."""
    packages: dict[str, Package] = {}
    for item in report["install"]:
        about = item["metadata"]
        requires = tuple(Requirement(text) for text in about.get("requires_dist", ()))
        packages[canonicalize_name(about["name"])] = Package(about["name"], about["version"], requires)
    return packages


def needed(wanted: Sequence[str], packages: Mapping[str, Package], present: Collection[str]) -> list[Package]:
    """What `wanted` leads to without passing through a package of `present`, by name."""
    pending = [Requirement(text) for text in wanted]
    seen: set[tuple[str, frozenset[str]]] = set()
    found: dict[str, Package] = {}
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        visit = (name, frozenset(requirement.extras))
        if name in present or name not in packages or visit in seen:
            continue  # not in packages: a marker that does not hold here
        seen.add(visit)
        found[name] = packages[name]
        pending += [below for below in packages[name].requires if _holds(below, requirement.extras)]
    return [found[name] for name in sorted(found)]


def _holds(requirement: Requirement, extras: Collection[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def unmet(
    wanted: Iterable[str], carried: Iterable[Package], installed: Mapping[str, str | None]
) -> list[str]:
    """Lines about what is there in another release than a carried package, or this project, asks for."""
    lines = []
    project = Package("ersim", "", tuple(map(Requirement, wanted)))
    for package in (project, *carried):
        for requirement in package.requires:
            version = installed.get(canonicalize_name(requirement.name))
            if version is None or not _holds(requirement, ()):
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                who = package.pinned if package.version else package.name
                asked = f"{who} asks for {requirement.specifier}"
                lines.append(f"{requirement.name} {version} is there, {asked}")
    return lines
