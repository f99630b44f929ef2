"""Every value out of range is refused by name, with what it must be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ersim.config import (
    EngineSettings,
    ExpertConfig,
    FaultConfig,
    FleetConfig,
    GatewayConfig,
    LengthsConfig,
    ObjectiveConfig,
    SimulationConfig,
    UncertaintyConfig,
    WorkloadConfig,
    validate,
)
from ersim.errors import ConfigError

GOOD = SimulationConfig(fleet=FleetConfig("one", experts={"a": ExpertConfig()}))


def with_expert(expert: ExpertConfig) -> SimulationConfig:
    return replace(GOOD, fleet=FleetConfig("one", experts={"a": expert}))


def with_workload(**parts: object) -> SimulationConfig:
    return replace(GOOD, workload=WorkloadConfig(**parts))  # type: ignore[arg-type]


def test_defaults_with_one_expert_are_valid() -> None:
    validate(GOOD)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(GOOD, users=0), "users must be >= 1, got 0"),
        (replace(GOOD, seed=-1), "seed must be >= 0, got -1"),
        (SimulationConfig(), "fleet.experts must be at least one expert"),
        (with_expert(ExpertConfig(precision="fp4")), "fleet.experts.a.precision must be one of: bf16, fp16"),
        (with_expert(ExpertConfig(tp=3)), "fleet.experts.a.tp must be 1, 2, 4 or 8, got 3"),
        (with_expert(ExpertConfig(replicas=0)), "fleet.experts.a.replicas must be >= 1, got 0"),
        (
            with_expert(ExpertConfig(engine=EngineSettings(kv_blocks=0))),
            "fleet.experts.a.engine.kv_blocks must be >= 1, got 0",
        ),
        (
            with_expert(ExpertConfig(engine=EngineSettings(max_num_seqs=64, max_num_batched_tokens=32))),
            r"max_num_batched_tokens must be >= max_num_seqs \(64\)",
        ),
        (
            with_expert(ExpertConfig(engine=EngineSettings(speculative_tokens=3))),
            r"speculative_tokens must be 0 \(not modelled yet\), got 3",
        ),
        (with_expert(ExpertConfig(engine=EngineSettings(max_loras=1))), "max_loras must be 0"),
        (with_workload(arrivals="burst"), "workload.arrivals must be one of: closed, gamma, poisson, trace"),
        (with_workload(arrivals="poisson"), "workload.rate_rps must be set for poisson arrivals"),
        (with_workload(arrivals="trace"), "workload.trace_path must be set"),
        (with_workload(turns=0.5), "workload.turns must be >= 1, got 0.5"),
        (with_workload(requests=0), "workload.requests must be >= 1, got 0"),
        (
            with_workload(lengths=LengthsConfig(kind="constant")),
            "workload.lengths.prompt_tokens must be set for constant lengths",
        ),
        (replace(GOOD, gateway=GatewayConfig(workers=0)), "gateway.workers must be >= 1, got 0"),
        (replace(GOOD, objective=ObjectiveConfig(ttft_s=0)), "objective.ttft_s must be > 0, got 0"),
        (
            replace(GOOD, uncertainty=UncertaintyConfig(replications="many")),
            "uncertainty.replications must be auto or an integer >= 1, got 'many'",
        ),
        (replace(GOOD, faults=[FaultConfig("b")]), r"faults\[0\].expert must be one of: a; got 'b'"),
        (
            replace(GOOD, faults=[FaultConfig("a", 0, 5.0, 4.0)]),
            r"faults\[0\].back_s must be > 5.0, got 4.0",
        ),
    ],
)
def test_bad_value_names_key_value_and_remedy(config: SimulationConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config)
