"""The `live` mapping of an expert: how its real vLLM servers are started on this machine.

Everything that is not about starting a process (model shape, precision, TP, engine settings,
replicas) comes from the expert's other fields, so that simulator and testbed read one config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ersim.errors import bad_value, unknown_choice
from testbed.weightless import DEFAULT_METHOD, QUANTIZATIONS

TOKENIZERS = ("word", "none", "model")


@dataclass(frozen=True)
class LiveSettings:
    """Where and how one expert runs.

    model: hub id or local directory; None is the weightless mode (dummy weights on a config.json
    written from the expert's model shape). quantization: the method that serves the precision
    (see `weightless.QUANTIZATIONS`), used by the weightless mode. tokenizer: word (one word, one
    token; weightless only), none (token ids only), model (what the model's folder holds).
    port: of the first replica, the next ones follow; 0 takes free ports. device: cpu or gpu.
    cores: CPU cores of each replica: it computes with as many threads; vLLM binds them where there are
    several tensor-parallel ranks, which share the cores evenly. gpus: GPU indices of each replica, as
    nvidia-smi counts them.
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


def read_live(mapping: Mapping[str, Any], precision: str, key: str, gpu: str = "cpu") -> LiveSettings:
    """Check an expert's `live` mapping. Raises ConfigError naming the key, the value and the remedy.

    precision and gpu are the expert's own; they decide quantization and device where `live` does not.
    """
    known = {field.name for field in dataclasses.fields(LiveSettings)}
    for name in mapping:
        if name not in known:
            raise unknown_choice(f"{key}.live", name, known)
    settings = LiveSettings(**{"device": "cpu" if gpu == "cpu" else "gpu", **mapping})
    _check_kinds(settings, key)
    if settings.quantization is None:
        settings = dataclasses.replace(settings, quantization=DEFAULT_METHOD.get(precision, precision))
    if settings.quantization not in QUANTIZATIONS:
        raise unknown_choice(f"{key}.live.quantization", settings.quantization, QUANTIZATIONS)
    if settings.tokenizer not in TOKENIZERS:
        raise unknown_choice(f"{key}.live.tokenizer", settings.tokenizer, TOKENIZERS)
    if settings.device not in ("cpu", "gpu"):
        raise unknown_choice(f"{key}.live.device", settings.device, ("cpu", "gpu"))
    if settings.weightless and settings.tokenizer == "model":
        raise bad_value(f"{key}.live.tokenizer", "word or none when live.model is not set", "model")
    if not 0 <= settings.port <= 65535:
        raise bad_value(f"{key}.live.port", "in [0, 65535] (0: any free port)", settings.port)
    if not settings.ready_timeout_s > 0:
        raise bad_value(f"{key}.live.ready_timeout_s", "> 0", settings.ready_timeout_s)
    if settings.api_servers < 1:
        raise bad_value(f"{key}.live.api_servers", ">= 1", settings.api_servers)
    if not settings.kv_space_gib > 0:
        raise bad_value(f"{key}.live.kv_space_gib", "> 0", settings.kv_space_gib)
    return settings


def _check_kinds(settings: LiveSettings, key: str) -> None:
    """Raise ConfigError for numbers that are none, and for cores or GPUs that are no lists by replica."""
    for name, kind in (
        ("port", int),
        ("api_servers", int),
        ("kv_space_gib", float),
        ("ready_timeout_s", float),
    ):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise bad_value(f"{key}.live.{name}", "an integer" if kind is int else "a number", value)
    for name in ("cores", "gpus"):
        lists = getattr(settings, name)
        if not isinstance(lists, list) or not all(isinstance(one, list) and _indices(one) for one in lists):
            raise bad_value(
                f"{key}.live.{name}", "a list for each replica or one for all, as [[0, 1]]", lists
            )


def _indices(numbers: list[Any]) -> bool:
    """Whether all are integers >= 0."""
    return all(type(number) is int and number >= 0 for number in numbers)


def of_replica(lists: list[list[int]], replica: int) -> list[int]:
    """The cores or GPUs of one replica; one list serves all replicas, none means no choice."""
    if not lists:
        return []
    return list(lists[replica % len(lists)])
