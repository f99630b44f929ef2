"""What the gateway is told at start: a JSON file, checked, every error naming its key."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from ersim.errors import ConfigError, DataError, bad_value
from ersim.routing.balancers import BALANCERS
from testbed.gateway.exchange import AUTO_MODELS
from testbed.gateway.typed import Rule, at_least, build

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_S = 1e6  # what every event loop's timers can hold


def _trimmed(value: str) -> bool:
    return bool(value) and value == value.strip()


def _base_url(value: str) -> bool:
    """Whether requests can be sent to paths below it."""
    try:
        parts = urlsplit(value)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as the resolver does, for which it may be too long
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and port != 0
        and value.isascii()
        and (not (parts.query or parts.fragment or " " in value))
    )


TEXT = Rule("a non-empty string of printable characters without spaces at its ends", _trimmed)
NAME = Rule(
    f"{TEXT.must}, and not auto, which is the router",
    lambda value: _trimmed(value) and value not in AUTO_MODELS,
)
URL = Rule("a base URL such as http://127.0.0.1:8000", _base_url)
URLS = Rule("a list of one or more base URLs such as http://127.0.0.1:8000", bool)
KEY = Rule(TEXT.must, _trimmed, secret=True)
KEYS = Rule('a list of keys, each a non-empty string, such as ["first", "second"]', secret=True)
SECONDS = Rule(f"a number of seconds > 0 and <= {LONGEST_S:g}", lambda value: 0 < value <= LONGEST_S)
PRICE = Rule("a number >= 0", lambda value: value >= 0)
PORT = Rule("an integer from 1 to 65535", lambda value: 1 <= value <= 65535)
EXPERTS = Rule("a list of one or more experts", bool)
BALANCER = Rule("one of: " + ", ".join(sorted(BALANCERS)), lambda value: value in BALANCERS)


@dataclass(frozen=True)
class ExpertEndpoint:
    """One expert: its identity for the policy, the base URLs of its replicas, and its limits.

    slots: requests that all replicas together may hold at once; what comes on top waits here.
    upstream_model: the model name its servers expect; None sends the body untouched.
    """

    name: Annotated[str, NAME]
    urls: Annotated[list[Annotated[str, URL]], URLS]
    model: str = ""
    domains: list[Annotated[str, TEXT]] = field(default_factory=list)
    slots: Annotated[int, at_least(1)] = 1024
    upstream_model: Annotated[str, TEXT] | None = None
    usd_per_mtok_in: Annotated[float, PRICE] | None = None
    usd_per_mtok_out: Annotated[float, PRICE] | None = None


@dataclass(frozen=True)
class GatewaySettings:
    """Everything the gateway needs.

    policy_path: a fitted policy (its experts must be these, in this order). queue_limit: requests
    that may wait per expert, beyond it 429. attempts: how often one request is tried before its
    first byte. failover: whether another expert may answer when the chosen one is down or fails.
    api_keys: empty means open. access_log: one JSON line per request.
    """

    experts: Annotated[list[ExpertEndpoint], EXPERTS]
    policy_path: Annotated[str, TEXT]
    host: Annotated[str, TEXT] = "127.0.0.1"
    port: Annotated[int, PORT] = 8100
    balancer: Annotated[str, BALANCER] = "least_outstanding"
    seed: Annotated[int, at_least(0)] = 0
    api_keys: Annotated[list[Annotated[str, KEY]], KEYS] = field(default_factory=list)
    queue_limit: Annotated[int, at_least(0)] = 256
    queue_timeout_s: Annotated[float, SECONDS] = 60.0
    retry_after_s: Annotated[int, at_least(0)] = 1
    attempts: Annotated[int, at_least(1)] = 3
    failover: bool = True
    connect_timeout_s: Annotated[float, SECONDS] = 2.0
    first_byte_timeout_s: Annotated[float, SECONDS] = 300.0
    idle_timeout_s: Annotated[float, SECONDS] = 120.0
    health_period_s: Annotated[float, SECONDS] = 1.0
    health_timeout_s: Annotated[float, SECONDS] = 2.0
    max_body_bytes: Annotated[int, at_least(1)] = 32 * 2**20
    access_log: Annotated[str, TEXT] | None = None

    @property
    def url(self) -> str:
        """Where it is to listen, as a base URL."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def _checked(data: object) -> GatewaySettings:
    settings = build(GatewaySettings, data, "gateway")
    names = [expert.name for expert in settings.experts]
    if len(set(names)) < len(names):
        raise bad_value("gateway.experts", "experts of different names", names)
    if settings.host not in LOOPBACK and not settings.api_keys:
        raise bad_value("gateway.host", "a loopback address unless api_keys are set", settings.host)
    return settings


def check(settings: GatewaySettings) -> None:
    """Raise ConfigError for values that cannot work."""
    _checked(to_dict(settings))


def read_settings(path: Path) -> GatewaySettings:
    """Read and check the gateway's JSON file; DataError or ConfigError name what to fix."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not a whole JSON document ({error.msg}, line {error.lineno})") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of too many digits, too deep
        raise DataError(f"{path}: not a JSON document that can be read ({error})") from error
    try:
        return _checked(data)
    except ConfigError as error:
        raise ConfigError(f"{error} ({path})") from error


def to_dict(settings: GatewaySettings) -> dict[str, Any]:
    """The settings as plain data, for the JSON file."""
    return dataclasses.asdict(settings)
