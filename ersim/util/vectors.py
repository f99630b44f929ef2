"""Rows of plain numbers: unboxed in the compiled hot path, lists where the interpreter runs it.

mypyc turns `vec[float]` into an array of C doubles and `i64` into a C integer, where a list of floats is
a list of objects that are made, counted and thrown away. To the interpreter `vec[float](values)` is
`list(values)` and `i64` is `int`. A `vec` is a value: what `append` returns takes its place.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from librt.vecs import append as append
    from librt.vecs import vec as vec
    from mypy_extensions import i64 as i64
    from mypy_extensions import mypyc_attr as mypyc_attr
else:
    i64 = int

    class vec:
        """`vec[float]` is `list`: indexing a list is what the interpreter does fastest."""

        def __class_getitem__(cls, kind: object) -> type[list]:
            return list

    def append(values: list, value: object) -> list:
        """`values` with one more."""
        values.append(value)
        return values

    def mypyc_attr(**attributes: object) -> Callable[[type], type]:
        """What mypyc shall know of a class; nothing to the interpreter."""
        return lambda kind: kind


def as_bytes(values: vec[float]) -> bytes:
    """The numbers as C doubles, one after the other."""
    return array("d", values).tobytes() if isinstance(values, list) else bytes(memoryview(values))


def is_compiled(function: Callable[..., Any]) -> bool:
    """Whether a function comes from a compiled module."""
    return not isinstance(function, FunctionType)
