"""The interval must hold one more run as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from ersim.results import combine, mean_is_known, prediction_interval


@pytest.mark.parametrize("replications", [4, 12])
def test_interval_covers_a_further_run_as_often_as_promised(replications: int) -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(2000):
        values = rng.normal(100.0, 5.0, replications + 1)
        interval = prediction_interval(list(values[:-1]), 0.90)
        assert interval is not None
        hits += interval[0] <= values[-1] <= interval[1]
    assert 0.88 <= hits / 2000 <= 0.92


def test_single_replication_has_no_interval() -> None:
    assert prediction_interval([1.0], 0.9) is None
    assert combine([{"x": 1.0}], 0.9) == {"x": 1.0}


def test_combine_keeps_flags_counts_and_blocks() -> None:
    runs = [
        {"steady": True, "completed": 5, "speed": 1.0, "none": None, "block": {"share": 0.5}},
        {"steady": False, "completed": 6, "speed": 3.0, "none": 2.0, "block": {"share": 0.7}},
    ]
    combined = combine(runs, 0.9)
    assert combined["steady"] is False
    assert combined["completed"] == 5
    assert combined["speed"] == 2.0
    assert combined["speed_low"] == 0.0 < combined["speed_high"]
    assert combined["none"] == 2.0
    assert combined["block"]["share"] == pytest.approx(0.6)


def test_shares_stay_below_one_and_facts_have_no_interval() -> None:
    combined = combine(
        [{"goodput_share": 0.99, "usd_per_hour": 3.0}, {"goodput_share": 1.0, "usd_per_hour": 3.0}], 0.9
    )
    assert combined["goodput_share_high"] == 1.0
    assert "usd_per_hour_low" not in combined


def test_precision_rule_needs_two_agreeing_runs() -> None:
    same = {"output_throughput": 100.0, "median_e2el_ms": 10.0}
    other = {"output_throughput": 160.0, "median_e2el_ms": 10.0}
    assert not mean_is_known([same], 0.03, 0.9)
    assert mean_is_known([same, same], 0.03, 0.9)
    assert not mean_is_known([same, other], 0.03, 0.9)
