"""One real fleet of two small experts behind the real gateway, started once for all live tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ersim.config import ExpertConfig, FleetConfig

sys.path.insert(0, str(Path(__file__).parent))  # checkpoints.py stands beside the tests


@dataclass
class LiveSetup:
    """What a live test needs."""

    fleet: object
    gateway_url: str
    folder: Path


def small_fleet() -> FleetConfig:
    """Two experts of different size and precision, as in conf/fleet/live_cpu.yaml."""
    return FleetConfig(
        "live_cpu",
        experts={
            "large": ExpertConfig(
                "llama-75m", "int8", "cpu", domains=["code", "math"], live={"cores": [[0]]}
            ),
            "small": ExpertConfig("llama-36m", "bf16", "cpu", domains=["history"], live={"cores": [[1]]}),
        },
    )


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveSetup]:
    """Experts and gateway; the gateway's router is round robin."""
    pytest.importorskip("vllm", reason="needs the real vLLM: make test-live")
    from ersim.routing import ExpertProfile, create_policy
    from testbed.expert_server import free_port
    from testbed.fleet import LiveFleet
    from testbed.gateway.process import GatewayProcess
    from testbed.gateway.settings import ExpertEndpoint, GatewaySettings

    folder = tmp_path_factory.mktemp("live")
    config = small_fleet()
    with LiveFleet(config, folder) as fleet:
        policy = folder / "policy.bin"
        create_policy("round_robin", [ExpertProfile(name, "m") for name in config.experts], {}).save(policy)
        endpoints = [ExpertEndpoint(name, urls, slots=128) for name, urls in fleet.urls().items()]
        settings = GatewaySettings(
            endpoints, str(policy), port=free_port(), access_log=str(folder / "access.jsonl")
        )
        with GatewayProcess(settings, folder) as gateway:
            yield LiveSetup(fleet, gateway.url, folder)
