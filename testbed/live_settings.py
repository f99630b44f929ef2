"""The `live` mapping of an expert: how its real vLLM servers are started on this machine.

Everything that is not about starting a process (model shape, precision, TP, engine settings,
replicas) comes from the expert's other fields, so that simulator and testbed read one config.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ersim.errors import bad_value, unknown_choice
from testbed.weightless import DEFAULT_METHOD, QUANTIZATIONS

TOKENIZERS = ("word", "none", "model")
DEVICES = ("cpu", "gpu")
LAST_PORT = 65535


def _whole(value: object, least: int, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most  # True is an int to Python, not to us


def _number(value: object) -> bool:
    return type(value) in (int, float)


def _above_zero(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _text_or_none(value: object) -> bool:
    return value is None or _text(value)


def _words(values: Iterable[object]) -> bool:
    """Text or numbers, as they stand on a command line; YAML's true and null are neither."""
    return all(isinstance(value, str) or _number(value) for value in values)


def _indices(value: object) -> bool:
    """A list of lists of different whole numbers >= 0."""
    return isinstance(value, list) and all(
        isinstance(one, list) and one and all(_whole(item, 0) for item in one) and len({*one}) == len(one)
        for one in value
    )


_BY_REPLICA = "a list for each replica or one for all, as [[0, 1]], of different numbers >= 0"
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "model": ("a directory or hub id as text, or null", _text_or_none),
        "quantization": ("text or null", _text_or_none),
        "tokenizer": ("text", _text),
        "device": ("text", _text),
        "port": (f"an integer in [0, {LAST_PORT}] (0: any free port)", lambda v: _whole(v, 0, LAST_PORT)),
        "cores": (_BY_REPLICA, _indices),
        "gpus": (_BY_REPLICA, _indices),
        "api_servers": ("an integer >= 1", lambda v: _whole(v, 1)),
        "kv_space_gib": ("a number > 0", _above_zero),
        "python": ("an interpreter's path as text, or null", _text_or_none),
        "ready_timeout_s": ("a number > 0", _above_zero),
        "record_steps": ("true or false", lambda v: isinstance(v, bool)),
        "args": ("a list of text and numbers, as [--seed, 5]", lambda v: isinstance(v, list) and _words(v)),
        "env": (
            "names with text or numbers, as {A: 1}",
            lambda v: isinstance(v, dict) and all(map(_text, v)) and _words(v.values()),
        ),
    }
)
"""By field of LiveSettings: what its value must be, in words and as a test."""


@dataclass(frozen=True)
class LiveSettings:
    """Where and how one expert runs.

    model: hub id or local directory (~ is the home directory); None is the weightless mode (dummy
    weights on a config.json written from the expert's model shape). quantization: the method that
    serves the precision (see `weightless.QUANTIZATIONS`), used by the weightless mode. tokenizer: word
    (one word, one token; weightless only), none (token ids only), model (what the model's folder holds).
    port: of the first replica, the next ones follow; 0 takes free ports. device: cpu or gpu.
    cores: CPU cores of each replica: it computes with as many threads. One tensor-parallel rank with one
    front end is bound to them by its supervisor, both processes; several ranks share them evenly, and vLLM
    binds these. gpus: GPU indices of each replica, as nvidia-smi counts them.
    api_servers: front-end processes of each replica, for GPUs that answer faster than one can write.
    kv_space_gib: KV cache of each rank on CPU. args and env go to the server as they are.
    """

    model: str | None = None
    quantization: str | None = None
    tokenizer: str = "word"
    device: str = "cpu"
    port: int = 0
    cores: list[list[int]] = field(default_factory=list)
    gpus: list[list[int]] = field(default_factory=list)
    api_servers: int = 1
    kv_space_gib: float = 1.0
    python: str | None = None
    ready_timeout_s: float = 240.0
    record_steps: bool = True
    args: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def weightless(self) -> bool:
        """Whether the expert is served with dummy weights."""
        return self.model is None


def read_live(
    mapping: Mapping[str, Any], precision: str, key: str, gpu: str = "cpu", replicas: int = 1
) -> LiveSettings:
    """Check an expert's `live` mapping. Raises ConfigError naming the key, the value and the remedy.

    precision, gpu and replicas are the expert's own; the first two decide quantization and device where
    `live` does not. Whether this machine has what it asks for is not looked at (see `check_machine`).
    """
    known = {field.name for field in dataclasses.fields(LiveSettings)}
    for name in mapping:
        if name not in known:
            raise unknown_choice(f"{key}.live", name, known)
        must, fits = KINDS[name]
        if not fits(mapping[name]):
            raise bad_value(f"{key}.live.{name}", must, mapping[name])
    settings = LiveSettings(**{"device": "cpu" if gpu == "cpu" else "gpu", **mapping})
    if settings.model is not None:
        settings = dataclasses.replace(settings, model=os.path.expanduser(settings.model))
    if settings.quantization is None:
        settings = dataclasses.replace(settings, quantization=DEFAULT_METHOD.get(precision, precision))
    for name, choices in (
        ("quantization", QUANTIZATIONS), ("tokenizer", TOKENIZERS), ("device", DEVICES),
    ):  # fmt: skip
        if getattr(settings, name) not in choices:
            raise unknown_choice(f"{key}.live.{name}", getattr(settings, name), choices)
    if settings.weightless and settings.tokenizer == "model":
        raise bad_value(f"{key}.live.tokenizer", "word or none when live.model is not set", "model")
    if settings.port and settings.port + replicas - 1 > LAST_PORT:
        last = LAST_PORT - replicas + 1
        raise bad_value(
            f"{key}.live.port", f"at most {last}, one for each of {replicas} replicas", settings.port
        )
    return settings


def check_machine(settings: LiveSettings, key: str) -> None:
    """Raise ConfigError for cores that this process may not use."""
    if not hasattr(os, "sched_getaffinity"):
        return
    here = os.sched_getaffinity(0)
    for cores in settings.cores if settings.device == "cpu" else ():
        if not here.issuperset(cores):
            raise bad_value(f"{key}.live.cores", f"cores of this machine ({sorted(here)})", cores)


def of_replica(lists: list[list[int]], replica: int) -> list[int]:
    """The cores or GPUs of one replica; one list serves all replicas, none means no choice."""
    if not lists:
        return []
    return list(lists[replica % len(lists)])
