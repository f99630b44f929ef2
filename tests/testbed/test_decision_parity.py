"""Given the same policy and prompts, simulator and live gateway send every prompt to the same expert."""

from __future__ import annotations

from pathlib import Path
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
from ersim.routing import build_policy, load_policy
from ersim.types import ExpertState, Prompt

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


async def test_500_prompts_get_500_identical_decisions(
    config: SimulationConfig, make_gateway: Any, tmp_path: Path
) -> None:
    shared = ersim.Preparations()
    file = tmp_path / "policy.ersim"
    shared.routing(config).policy.save(file)
    rows = ersim.simulate(config, shared).requests
    simulated = dict(zip(rows["prompt_index"], rows["expert"], strict=True))
    prompts = shared.prompt_set(config.workload.prompts).prompts
    asked = sorted(simulated)[:PROMPTS]
    assert len(asked) == PROMPTS
    setup = await make_gateway(experts=8, policy=load_policy(file, list(config.fleet.experts)))
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


async def ask(setup: Any, text: str) -> tuple[int, str]:
    """Status of one completion and the expert that answered it."""
    body = {"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    async with setup.session.post(f"{setup.url}/v1/chat/completions", json=body) as answer:
        return answer.status, answer.headers["X-Ersim-Expert"]


async def test_empty_and_endless_prompts_are_routed(config: SimulationConfig, make_gateway: Any) -> None:
    setup = await make_gateway(experts=8, policy=ersim.Preparations().routing(config).policy)
    for text in ("", " ", "word " * 20_000, "\x00", "\U0001f600" * 100_000):
        status, expert = await ask(setup, text)
        assert status == 200 and expert in config.fleet.experts


async def test_the_threshold_changes_while_the_gateway_runs(make_gateway: Any) -> None:
    texts = [f"{'prove' if i % 2 else 'greet'} case {i}" for i in range(40)]
    graded = [Prompt(t, t, "all", quality={"e0": float("greet" in t), "e1": 1.0}) for t in texts]
    states = [ExpertState(name, name, (), (), 8) for name in ("e0", "e1")]
    router = RouterConfig(policy="threshold", params={"strong": "e1", "weak": "e0", "features": "tfidf"})
    setup = await make_gateway(experts=2, policy=build_policy(router, states, graded, 0))
    assert await ask(setup, "greet me") == (200, "e0")
    async with setup.session.post(f"{setup.url}/policy", json={"share": 1.0}) as answer:
        assert answer.status == 200
    assert await ask(setup, "greet me") == (200, "e1")
    for wrong in ({"share": 1.5}, {"predictor": "knn"}, {"share": "most"}, [0.5]):
        async with setup.session.post(f"{setup.url}/policy", json=wrong) as answer:
            assert answer.status == 400
    assert await ask(setup, "greet me") == (200, "e1")
