"""What a run says of its routing: answer quality by labels, and what spilling under load gave up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ersim
from ersim.config import (
    ExpertConfig,
    FleetConfig,
    PromptSetConfig,
    RouterConfig,
    SimulationConfig,
    UncertaintyConfig,
    WorkloadConfig,
)
from ersim.prepare import Preparations
from ersim.steptime.calibration import save
from ersim.types import RoutingQuery

SPILL = {"at_load": 0.001, "max_quality_loss": 0.3, "relief": 0.9}


@pytest.fixture
def config(tmp_path: Path) -> SimulationConfig:
    """Two experts of one model, labelled by name: `red` answers prompts about apples, `blue` the others."""
    generator = np.random.default_rng(0)
    subjects = generator.choice(["apple", "river"], 200, p=[0.7, 0.3])
    rows = {
        "prompt": [f"tell me of {subject} number {i} please" for i, subject in enumerate(subjects)],
        "right": (subjects == "apple").astype(float),
        "left": np.where(subjects == "apple", 0.8, 1.0),
    }
    pd.DataFrame(rows).to_csv(tmp_path / "graded.csv", index=False)
    prompts = PromptSetConfig(
        path=str(tmp_path / "graded.csv"),
        text_column="prompt",
        domain_column=None,
        quality_columns={"red": "right", "blue": "left"},
    )
    return SimulationConfig(
        users=40,
        fleet=FleetConfig("pair", experts={"red": ExpertConfig(), "blue": ExpertConfig()}),
        workload=WorkloadConfig(requests=400, think_s=0.1, prompts=prompts),
        router=RouterConfig(policy="predictive", params={"predictor": "ridge"}),
        uncertainty=UncertaintyConfig(replications="1"),
    )


@pytest.mark.parametrize("replicas", [1, 3])
def test_energy_is_that_of_all_replicas(config: SimulationConfig, tmp_path: Path, replicas: int) -> None:
    known = Preparations().expert(ExpertConfig(), "expert").calibration
    path = tmp_path / "powered.json"
    save(replace(known, power={"busy_w": 300.0, "idle_w": 100.0}), path)
    expert = ExpertConfig(calibration=str(path), replicas=replicas)
    workload = WorkloadConfig(requests=100, think_s=0.1)
    summary = ersim.simulate(
        replace(
            config, fleet=FleetConfig("one", experts={"a": expert}), workload=workload, router=RouterConfig()
        )
    ).summary
    watts = summary["joules_per_output_token"] * summary["output_throughput"]
    busy = summary["per_expert"]["a"]["busy_share"]
    assert watts == pytest.approx(replicas * (100.0 + 200.0 * busy), rel=1e-6)


def test_labels_of_an_expert_are_found_by_its_name(config: SimulationConfig) -> None:
    summary = ersim.simulate(config).summary
    assert summary["mean_score"] == pytest.approx(1.0)
    assert summary["misroute_rate_by_quality"] == pytest.approx(0.0)
    assert summary["spilled_share"] is None and summary["quality_given_up"] is None


def test_the_price_of_spilling_stands_in_the_summary(config: SimulationConfig) -> None:
    spilling = replace(config, router=replace(config.router, spill=SPILL))
    summary = ersim.simulate(spilling).summary
    assert 0.05 < summary["spilled_share"] < 0.7
    # Only apples may spill: red answers them with 1.0, blue with 0.8; rivers would lose 1.0.
    assert summary["quality_given_up"] == pytest.approx(0.2 * summary["spilled_share"], rel=0.2)
    assert summary["mean_score"] == pytest.approx(1.0 - 0.2 * summary["spilled_share"], abs=0.01)
    weighing = replace(config.router, params={"predictor": "ridge", "load_weight": 20.0})
    moved = ersim.simulate(replace(config, router=weighing)).summary
    assert moved["spilled_share"] > 0 and moved["quality_given_up"] > 0


def test_scores_computed_beforehand_are_those_of_single_calls(config: SimulationConfig) -> None:
    spilling = replace(config, router=replace(config.router, spill=SPILL))
    shared = ersim.Preparations()
    routing = shared.routing(spilling)
    prompts = shared.prompt_set(config.workload.prompts).prompts
    assert routing.known is None  # load decides, so only the scores can be known
    single = [routing.policy.score((RoutingQuery(prompt.text, prompt.prompt_tokens),)) for prompt in prompts]
    np.testing.assert_allclose(routing.scores, np.vstack(single), rtol=0, atol=1e-12)
