"""Every figure that a simulation reports has an interval; what the summary says about how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

import ersim
from ersim.config import ExpertConfig, FleetConfig, SimulationConfig, UncertaintyConfig, WorkloadConfig
from ersim.steptime import build_expert_model
from ersim.types import Batch

FACTS = ("schema_version", "users", "max_concurrency", "request_rate", "seed", "replications")
FACTS += ("interval_level", "mean_known_within", "gpus", "usd_per_hour", "prompts")


def small(replications: str, **uncertainty: Any) -> SimulationConfig:
    fleet = FleetConfig(
        name="two",
        experts={
            "a": ExpertConfig(model="llama3.1-8b", gpu="h100-80gb", domains=["code", "math", "data"]),
            "b": ExpertConfig(model="llama3.1-8b", precision="fp8", gpu="h100-80gb", domains=["law"]),
        },
    )
    config = SimulationConfig(users=8, fleet=fleet, workload=WorkloadConfig(requests=120))
    config.uncertainty = UncertaintyConfig(replications=replications, **uncertainty)
    return config


def without_interval(block: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, value in block.items():
        if isinstance(value, Mapping):
            yield from without_interval(value, f"{path}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            ends = (f"{name}_low", f"{name}_high")
            if not name.endswith(("_low", "_high")) and not all(end in block for end in ends):
                yield path + name


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return ersim.simulate(small("4")).summary


def test_every_figure_has_an_interval_that_holds_it(summary: dict[str, Any]) -> None:
    assert sorted(set(without_interval(summary)) - set(FACTS) - {"prompt_set.prompts"}) == []
    for name in ("preemptions", "prefix_hit_rate", "goodput_share", "usd_per_mtok_output", "completed"):
        assert summary[f"{name}_low"] <= summary[name] <= summary[f"{name}_high"]
    assert summary["per_expert"]["a"]["peak_kv_used_fraction_high"] <= 1.0


def test_the_summary_says_how_intervals_and_warm_up_were_made(summary: dict[str, Any]) -> None:
    assert "4 replications" in summary["interval_method"]
    assert summary["warmup_method"].startswith("MSER-5")
    assert isinstance(summary["steady"], bool) and summary["warmup_s"] >= 0.0
    assert summary["replications_asked"] == "4" and summary["mean_known_within"] > 0.0


def test_two_replications_are_warned_about() -> None:
    found = ersim.simulate(small("2")).summary["warnings"]
    assert any("replications=auto" in text for text in found)


def test_a_cap_that_was_reached_is_said() -> None:
    config = small("auto", precision=0.0001, min_replications=2, max_replications=3)
    summary = ersim.simulate(config).summary
    assert summary["replications"] == 3 and summary["replications_asked"] == "auto"
    assert any("the cap" in text and "max_replications" in text for text in summary["warnings"])


def draws(precision: str, model: str, tp: int, gpu: str = "h100-80gb", count: int = 48) -> np.ndarray:
    """Log seconds of one decode step under as many draws of the coefficients."""
    expert = build_expert_model(ExpertConfig(model=model, precision=precision, gpu=gpu, tp=tp), "expert")
    batch = Batch(32, 32, 32 * 1024, 1024, (), 32)
    return np.log([expert.step_time(np.random.default_rng([i, 5])).step_s(batch) for i in range(count)])


def test_calibrations_share_the_doubts_they_have_in_common() -> None:
    base = draws("bf16", "llama3.1-8b", 1)
    assert np.array_equal(base, draws("bf16", "llama3.1-8b", 1))
    kin = float(np.corrcoef(base, draws("bf16", "llama3.1-70b", 4))[0, 1])
    stranger = float(np.corrcoef(base, draws("bf16", "llama3.1-8b", 1, gpu="b200"))[0, 1])
    assert kin > 0.6 > stranger
