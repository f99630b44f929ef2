"""The four findings of the Expert Router paper's abstract, on a short version of the flagship sweep.

"Performance Characterization of Expert Router for Scalable LLM Inference" (Pichlmeier et al., 2024)
finds that (1) the router adds minimal latency, (2) the configuration of the experts dominates,
(3) high-parameter experts deliver stable throughput and latency under moderate concurrency, and
(4) smaller experts stay competitive over a wider range of users than tensor-parallel baselines.
docs/findings.md has the figures of the whole sweep.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

import ersim
from experiments.check import preparations
from experiments.paths import CONF
from experiments.schema import register, to_run, to_simulation

ROUTED = ("er_8x8b_fp16", "er_8x8b_int4", "er_4x70b_fp8", "er_8x70b_int4")
BASELINE = "tp8_70b_fp16"
MODERATE_USERS = 30
LOADS = (1, MODERATE_USERS, 100)

Summaries = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def summaries() -> Iterator[Summaries]:
    """One replication with mean step times per fleet and load."""
    register()
    found: Summaries = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for fleet in (*ROUTED, BASELINE):
            for users in LOADS:
                config = compose("config", [f"fleet={fleet}", f"users={users}", "uncertainty=none"])
                result = ersim.simulate(to_simulation(to_run(config)), preparations())
                found[fleet, users] = result.summary
    yield found


def largest_load(summaries: Summaries, fleet: str, figure: str, limit: float) -> int:
    """The largest of LOADS up to which `figure` stays at or below `limit`; 0 if none."""
    kept = 0
    for users in LOADS:
        if summaries[fleet, users][figure] > limit:
            break
        kept = users
    return kept


@pytest.mark.parametrize("fleet", ROUTED)
@pytest.mark.parametrize("users", LOADS)
def test_1_the_router_adds_little(summaries: Summaries, fleet: str, users: int) -> None:
    summary = summaries[fleet, users]
    assert summary["mean_gateway_ms"] < 0.01 * summary["mean_e2el_ms"]
    assert summary["p99_gateway_ms"] < 10


def test_2_the_expert_configuration_dominates(summaries: Summaries) -> None:
    for users in LOADS:
        e2e = [summaries[fleet, users]["mean_e2el_ms"] for fleet in ROUTED]
        gateway = max(summaries[fleet, users]["mean_gateway_ms"] for fleet in ROUTED)
        assert max(e2e) > 3 * min(e2e)
        assert max(e2e) - min(e2e) > 100 * gateway


def test_3_70b_experts_are_stable_under_moderate_concurrency(summaries: Summaries) -> None:
    alone, busy = (summaries["er_4x70b_fp8", users] for users in (1, MODERATE_USERS))
    assert busy["median_tpot_ms"] < 2 * alone["median_tpot_ms"]
    assert busy["median_e2el_ms"] < 2 * alone["median_e2el_ms"]
    assert busy["output_throughput"] / MODERATE_USERS > 0.5 * alone["output_throughput"]


def test_4_small_experts_hold_up_over_more_users_than_the_baseline(summaries: Summaries) -> None:
    limit_ms = 5 * summaries[BASELINE, 1]["p99_ttft_ms"]
    small = largest_load(summaries, "er_8x8b_fp16", "p99_ttft_ms", limit_ms)
    assert small > largest_load(summaries, BASELINE, "p99_ttft_ms", limit_ms)
    for users in LOADS:
        ours, theirs = summaries["er_8x8b_fp16", users], summaries[BASELINE, users]
        assert ours["output_throughput"] > theirs["output_throughput"]
        assert ours["median_e2el_ms"] < theirs["median_e2el_ms"]
