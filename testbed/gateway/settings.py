"""What the gateway is told at start: a JSON file, checked, every error naming its key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ersim.errors import ConfigError, DataError, bad_value, unknown_choice


@dataclass(frozen=True)
class ExpertEndpoint:
    """One expert: its identity for the policy, the base URLs of its replicas, and its limits.

    slots: requests that all replicas together may hold at once; what comes on top waits here.
    upstream_model: the model name its servers expect; None sends the body untouched.
    """

    name: str
    urls: list[str]
    model: str = ""
    domains: list[str] = field(default_factory=list)
    slots: int = 1024
    upstream_model: str | None = None
    usd_per_mtok_in: float | None = None
    usd_per_mtok_out: float | None = None


@dataclass(frozen=True)
class GatewaySettings:
    """Everything the gateway needs.

    policy_path: a fitted policy (its experts must be these, in this order). queue_limit: requests
    that may wait per expert, beyond it 429. attempts: how often one request is tried before its
    first byte. failover: whether another expert may answer when the chosen one is down or fails.
    api_keys: empty means open. access_log: one JSON line per request.
    """

    experts: list[ExpertEndpoint]
    policy_path: str
    host: str = "127.0.0.1"
    port: int = 8100
    balancer: str = "least_outstanding"
    seed: int = 0
    api_keys: list[str] = field(default_factory=list)
    queue_limit: int = 256
    queue_timeout_s: float = 60.0
    retry_after_s: int = 1
    attempts: int = 3
    failover: bool = True
    connect_timeout_s: float = 2.0
    first_byte_timeout_s: float = 300.0
    idle_timeout_s: float = 120.0
    health_period_s: float = 1.0
    health_timeout_s: float = 2.0
    max_body_bytes: int = 32 * 2**20
    access_log: str | None = None


def _build(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise bad_value(where, "an object", data)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for name in data:
        if name not in fields:
            raise unknown_choice(f"a key of {where}", name, fields)
    required = [name for name, item in fields.items() if _required(item)]
    for name in required:
        if name not in data:
            raise ConfigError(f"{where}.{name} is missing; it has no default")
    return kind(**data)


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _above(value: Any, limit: float) -> bool:
    """Whether it is a number above the limit; a JSON file may hold anything."""
    return isinstance(value, int | float) and value > limit


def check(settings: GatewaySettings) -> None:
    """Raise ConfigError for values that cannot work."""
    if not settings.experts:
        raise bad_value("gateway.experts", "at least one expert", [])
    for expert in settings.experts:
        if not expert.urls:
            raise bad_value(f"gateway.experts.{expert.name}.urls", "at least one URL", [])
        if not _above(expert.slots, 0):
            raise bad_value(f"gateway.experts.{expert.name}.slots", ">= 1", expert.slots)
    names = [expert.name for expert in settings.experts]
    if len(set(names)) < len(names):
        raise bad_value("gateway.experts", "experts of different names", names)
    for name in ("queue_timeout_s", "connect_timeout_s", "first_byte_timeout_s", "idle_timeout_s",
                 "health_period_s", "health_timeout_s", "attempts", "max_body_bytes"):  # fmt: skip
        if not _above(getattr(settings, name), 0):
            raise bad_value(f"gateway.{name}", "> 0", getattr(settings, name))
    if not _above(settings.queue_limit, -1):
        raise bad_value("gateway.queue_limit", ">= 0", settings.queue_limit)
    if not all(settings.api_keys):
        raise bad_value("gateway.api_keys", "keys that are not empty", settings.api_keys)
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not settings.api_keys:
        raise bad_value("gateway.host", "a loopback address unless api_keys are set", settings.host)


def read_settings(path: Path) -> GatewaySettings:
    """Read and check the gateway's JSON file; DataError or ConfigError name what to fix."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not a whole JSON document ({error.msg}, line {error.lineno})") from error
    if not isinstance(data, dict) or not isinstance(data.get("experts"), list):
        raise DataError(f"{path}: must be an object with a list `experts`")
    experts = [
        _build(ExpertEndpoint, item, f"gateway.experts[{n}]") for n, item in enumerate(data["experts"])
    ]
    settings: GatewaySettings = _build(GatewaySettings, {**data, "experts": experts}, "gateway")
    check(settings)
    return settings


def to_dict(settings: GatewaySettings) -> dict[str, Any]:
    """The settings as plain data, for the JSON file."""
    return dataclasses.asdict(settings)
