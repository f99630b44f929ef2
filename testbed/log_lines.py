"""Logs of one JSON document a line: what is wrong with a line is an error that names file and number.

A log may be cut anywhere (its writer was killed) or be no log at all; readers check every value that they
use by a `Kind`, so that none of it surfaces later as something else.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ersim.errors import DataError

LARGEST = 1e300


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value must be, in words and as a test."""

    must: str
    fits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _text(value: Any) -> bool:
    return type(value) is str and value != ""


def list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list of such."""
    return lambda value: type(value) is list and all(map(fits, value))


def counts_of(length: int) -> Callable[[Any], bool]:
    """Whether a value is a list of so many counts."""
    return lambda value: type(value) is list and len(value) == length and all(map(_count, value))


NUMBER = Kind("a finite number", _number)
COUNT = Kind("an integer >= 0", _count)
POSITIVE = Kind("an integer >= 1", lambda value: _count(value) and value > 0)
INTEGER = Kind("an integer", lambda value: type(value) is int)
TEXT = Kind("a non-empty string", _text)
FLAG = Kind("true or false", lambda value: type(value) is bool)
COUNTS = Kind("a list of integers >= 0", list_of(_count))


def maybe(kind: Kind) -> Kind:
    """Such a value or null."""
    return Kind(f"{kind.must} or null", lambda value: value is None or kind.fits(value))


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a log. what: the kind of log, in words; remedy: what to do about a bad one."""

    path: Path
    number: int
    what: str
    remedy: str

    def bad(self, why: str) -> DataError:
        """The error for this line."""
        return DataError(f"{self.path}: line {self.number} {why}; {self.remedy}")

    def check(self, name: str, kind: Kind, value: object) -> None:
        """Raise DataError unless the value is of that kind."""
        if not kind.fits(value):
            raise self.bad(
                f"is no line of {self.what}: {name} must be {kind.must}, got {reprlib.repr(value)}"
            )


@dataclass(frozen=True, slots=True)
class NotJson:
    """Stands for a line that is no JSON document, in UTF-8. whole: it ended with a line break."""

    error: DataError
    whole: bool


def read_lines(path: Path, what: str, missing: str, remedy: str) -> Iterator[tuple[Line, Any]]:
    """The documents of a log with their lines, empty ones left out; a `NotJson` for what is none.

    missing: what to say of a file that cannot be read. Raises DataError then.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{path}: {what} cannot be read ({why}){missing}") from error
    with stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            line = Line(path, number, what, remedy)
            try:
                document = json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too many digits, too deep
                why = getattr(error, "msg", None) or str(error).splitlines()[0]
                document = NotJson(line.bad(f"is not JSON ({why}), the file is damaged"), raw.endswith(b"\n"))
            yield line, document


def check_fields(line: Line, names_and_kinds: Sequence[tuple[str, Kind]], values: Sequence[object]) -> None:
    """Check values one by one; there may be fewer of them than kinds, not more."""
    for (name, kind), value in zip(names_and_kinds, values, strict=False):
        if not kind.fits(value):
            line.check(name, kind, value)
