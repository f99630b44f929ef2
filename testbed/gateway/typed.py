"""From untyped JSON to a dataclass, by the annotations of its fields.

Known are str, bool, int, float, list[T], T | None, dataclasses, and Annotated[T, Rule] of these. What
does not fit is a ConfigError that names the key, what it must be, and what it is.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ersim.errors import ConfigError, unknown_choice

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What a value must be beyond its type.

    must: the whole demand in words, its type included. secret: errors do not show the value.
    """

    must: str
    holds: Callable[[Any], bool] = lambda value: True
    secret: bool = False


def at_least(least: int) -> Rule:
    """The rule of an integer with a lower bound."""
    return Rule(f"an integer >= {least}", lambda value: bool(value >= least))


def build(kind: type[T], data: object, key: str) -> T:
    """Make a dataclass of a mapping. Raises ConfigError for a key that is unknown, missing or unfit."""
    if not isinstance(data, Mapping):
        raise _bad(key, Rule("an object"), data)
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise unknown_choice(f"a key of {key}", name, fields)
    for name, item in fields.items():
        if name not in data and _required(item):
            raise ConfigError(f"{key}.{name} is missing; it has no default")
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{name: _value(hints[name], value, f"{key}.{name}") for name, value in data.items()})


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, key: str, rule: Rule | None = None, or_null: bool = False) -> Any:
    """The value as its annotation wants it."""
    if get_origin(hint) is Annotated:
        return _value(get_args(hint)[0], value, key, get_args(hint)[1], or_null)
    if get_origin(hint) in (Union, UnionType):
        (wanted,) = (one for one in get_args(hint) if one is not NoneType)
        return None if value is None else _value(wanted, value, key, rule, True)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key)  # type: ignore[arg-type]
    kind = get_origin(hint) or hint
    must, fits = _TYPES[kind]
    rule = rule or Rule(must)
    if not fits(value):
        raise _bad(key, rule, value, or_null)
    if kind is list:
        value = [_value(get_args(hint)[0], item, f"{key}[{n}]") for n, item in enumerate(value)]
    if not rule.holds(value):
        raise _bad(key, rule, value, or_null)
    return float(value) if kind is float else value


def _bad(key: str, rule: Rule, value: object, or_null: bool = False) -> ConfigError:
    shown = "null" if value is None else reprlib.repr(value)
    if rule.secret and value is not None:
        shown = f"a value of type {type(value).__name__}, not shown here"
    return ConfigError(f"{key} must be {rule.must}{' or null' if or_null else ''}, got {shown}")


def _text(value: object) -> bool:
    """A string that can be a header's value, a path and a host: no control character, no half of a pair."""
    return isinstance(value, str) and value.isprintable()


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


_TYPES: Mapping[type, tuple[str, Callable[[object], bool]]] = MappingProxyType(
    {
        str: ("a string of printable characters", _text),
        bool: ("true or false", lambda value: isinstance(value, bool)),
        int: ("an integer", _whole),
        float: ("a number", _number),
        list: ("a list", lambda value: isinstance(value, list)),
    }
)
