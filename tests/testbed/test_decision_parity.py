"""Given the same policy and prompts, simulator and live gateway send every prompt to the same expert."""

from __future__ import annotations

from typing import Any

import pytest

import ersim
from ersim.config import (
    ExpertConfig,
    FleetConfig,
    RouterConfig,
    SimulationConfig,
    UncertaintyConfig,
    WorkloadConfig,
)

PROMPTS = 500
DOMAINS = (
    ["code", "data"], ["math"], ["science", "medicine"], ["law"], ["finance", "support"],
    ["history", "everyday"], ["writing"], ["language"],
)  # fmt: skip


@pytest.fixture
def config() -> SimulationConfig:
    """Eight experts and the default cluster router; half of the built-in prompts train it."""
    experts = {f"e{index}": ExpertConfig(domains=domains) for index, domains in enumerate(DOMAINS)}
    params = {"clusters": 48, "feature_params": {"tfidf": {"scale": "unit", "dims": 50}}}
    return SimulationConfig(
        users=50,
        fleet=FleetConfig("eight", experts=experts),
        workload=WorkloadConfig(requests=4000, think_s=0.0),
        router=RouterConfig(policy="cluster", params=params, train_fraction=0.4),
        uncertainty=UncertaintyConfig(replications="1"),
    )


async def test_500_prompts_get_500_identical_decisions(config: SimulationConfig, make_gateway: Any) -> None:
    shared = ersim.Preparations()
    rows = ersim.simulate(config, shared).requests
    simulated = dict(zip(rows["prompt_index"], rows["expert"], strict=True))
    prompts = shared.prompt_set(config.workload.prompts).prompts
    asked = sorted(simulated)[:PROMPTS]
    assert len(asked) == PROMPTS
    setup = await make_gateway(experts=8, policy=shared.routing(config).policy)
    different = []
    for index in asked:
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": prompts[index].text}],
            "max_tokens": 1,
        }
        async with setup.session.post(f"{setup.url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200
            if answer.headers["X-Ersim-Expert"] != simulated[index]:
                different.append(index)
    assert different == []
    assert len({simulated[index] for index in asked}) == 8
