"""A small configuration for the tests of the clock side."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ersim.config import (
    ExpertConfig,
    FleetConfig,
    RouterConfig,
    SimulationConfig,
    UncertaintyConfig,
    WorkloadConfig,
)


@pytest.fixture
def config() -> Callable[..., SimulationConfig]:
    """Builds a small closed-loop configuration; keyword arguments replace parts of it."""

    def build(**parts: object) -> SimulationConfig:
        defaults: dict[str, object] = {
            "users": 12,
            "seed": 3,
            "fleet": FleetConfig(
                name="pair",
                experts={
                    "small": ExpertConfig(model="llama3.1-8b", precision="bf16", gpu="h100-80gb", replicas=2),
                    "large": ExpertConfig(model="llama3.1-70b", precision="fp8", gpu="h100-80gb", tp=4),
                },
            ),
            "workload": WorkloadConfig(requests=300),
            "router": RouterConfig(policy="round_robin"),
            "uncertainty": UncertaintyConfig(replications="1"),
        }
        return SimulationConfig(**{**defaults, **parts})  # type: ignore[arg-type]

    return build
