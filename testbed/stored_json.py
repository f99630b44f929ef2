"""JSON files that one command writes and another reads: what is wrong with one is a single line.

The line names the file, the key, its value and the remedy. Figures that are no finite numbers arrive as
null, since that is what `ersim.util.files.write_json` makes of them.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ersim.errors import DataError


@dataclass(frozen=True)
class FileKind:
    """A kind of file: what it is called, the `format` and `version` it says, what to do about a bad one.

    make: the remedy for one that is not there, where it is another.
    """

    what: str
    format: str
    version: int
    remedy: str
    make: str | None = None


@dataclass(frozen=True)
class StoredJson:
    """One such file; every check raises DataError."""

    kind: FileKind
    path: Path

    def read(self) -> dict[str, Any]:
        """Its object without format and version, which must be this program's."""
        kind = self.kind
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise self.unfit(f"it cannot be read: {error.strerror or error}", kind.make) from error
        except ValueError as error:  # no UTF-8, no JSON
            raise DataError(f"{self.path}: not a whole JSON document ({error}); {kind.remedy}") from error
        if not isinstance(data, dict):
            raise self.unfit(f"no JSON object but {_shown(data)}")
        found = (data.pop("format", None), data.pop("version", None))
        if found != (kind.format, kind.version) or isinstance(found[1], bool):
            wanted = f"format {kind.format!r} version {kind.version}"
            raise self.unfit(f"it must be {wanted}, got format {found[0]!r} version {found[1]!r}")
        return data

    def unfit(self, why: str, remedy: str | None = None) -> DataError:
        """The error for a file that as a whole is not what it should be."""
        return DataError(f"{self.path}: not {self.kind.what} ({why}); {remedy or self.kind.remedy}")

    def bad(self, key: str, must: str, got: object) -> DataError:
        """The error for one value."""
        return DataError(f"{self.path}: {key} must be {must}, got {_shown(got)}; {self.kind.remedy}")

    def only(self, data: Mapping[str, Any], names: Sequence[str], key: str = "") -> None:
        """Check that an object has exactly these keys."""
        here = f"{key}." if key else ""
        for name in names:
            if name not in data:
                raise DataError(f"{self.path}: {here}{name} is missing; {self.kind.remedy}")
        for name in data:
            if name not in names:
                raise self.bad(f"{here}{name}", "absent (no such key in this version)", data[name])

    def number(
        self, key: str, value: object, least: float | None = None, above: float | None = None
    ) -> float:
        """A finite number, in bounds."""
        must = (
            "a number"
            + ("" if least is None else f" >= {least:g}")
            + ("" if above is None else f" > {above:g}")
        )
        if not isinstance(value, int | float) or isinstance(value, bool) or not _finite(value):
            raise self.bad(key, must, value)
        if (least is not None and value < least) or (above is not None and value <= above):
            raise self.bad(key, must, value)
        return float(value)

    def integer(self, key: str, value: object, least: int = 0) -> int:
        """An integer, in bounds."""
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.bad(key, f"an integer >= {least}", value)
        return value

    def mapping(self, key: str, value: object) -> dict[str, Any]:
        """An object."""
        if not isinstance(value, dict):
            raise self.bad(key, "an object", value)
        return value

    def texts(self, key: str, value: object) -> dict[str, str]:
        """An object of strings."""
        for name, text in self.mapping(key, value).items():
            if not isinstance(text, str) or not text:
                raise self.bad(f"{key}.{name}", "a non-empty string", text)
        return self.mapping(key, value)

    def numbers(self, key: str, value: object, least: float | None = None, length: int | None = None) -> None:
        """Check a list of finite numbers, in bounds."""
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self.bad(key, "a list of numbers" if length is None else f"{length} numbers", value)
        for index, item in enumerate(value):
            self.number(f"{key}[{index}]", item, least)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _shown(value: object) -> str:
    return "null" if value is None else reprlib.repr(value)
