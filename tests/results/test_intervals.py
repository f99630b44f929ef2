"""The interval must hold one more run as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from ersim.results import combine, interval_method, mean_is_known, prediction_interval
from ersim.results.intervals import FEW_REPLICATIONS


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


def test_combine_gives_every_number_an_interval() -> None:
    runs = [
        {"steady": True, "preemptions": 5, "speed": 1.0, "none": None, "block": {"share": 0.5, "seen": 3}},
        {"steady": False, "preemptions": 6, "speed": 3.0, "none": 2.0, "block": {"share": 0.7, "seen": 3}},
    ]
    combined = combine(runs, 0.9)
    assert combined["steady"] is False and "steady_low" not in combined
    assert combined["preemptions"] == 5.5
    assert combined["preemptions_low"] < 5 < 6 < combined["preemptions_high"]
    assert combined["speed"] == 2.0
    assert combined["speed_low"] == 0.0 < combined["speed_high"]
    assert combined["none"] == 2.0
    assert combined["block"]["share"] == pytest.approx(0.6)
    assert (combined["block"]["seen"], combined["block"]["seen_low"], combined["block"]["seen_high"]) == (
        3,
        3,
        3,
    )


def test_a_count_that_a_replication_lacks_is_none_of_them() -> None:
    runs = [{"steps_beyond_calibration": {"tokens": 4}}, {"steps_beyond_calibration": {}}]
    assert combine(runs, 0.9)["steps_beyond_calibration"]["tokens"] == 2.0


def test_few_replications_say_what_they_cost() -> None:
    assert "single replication" in interval_method(1, 0.9)
    assert "6.31" in interval_method(2, 0.9) and "replications=auto" in interval_method(2, 0.9)
    assert "wide" not in interval_method(FEW_REPLICATIONS, 0.9)


def test_shares_stay_below_one_and_facts_have_no_interval() -> None:
    facts = {"usd_per_hour": 3.0, "gpus": 8}
    combined = combine([{"goodput_share": 0.99, **facts}, {"goodput_share": 1.0, **facts}], 0.9)
    assert combined["goodput_share_high"] == 1.0
    assert combined["usd_per_hour"] == 3.0 and combined["gpus"] == 8
    assert not any(name.startswith(("usd_per_hour_", "gpus_")) for name in combined)


def test_precision_rule_needs_two_agreeing_runs() -> None:
    same = {"output_throughput": 100.0, "median_e2el_ms": 10.0}
    other = {"output_throughput": 160.0, "median_e2el_ms": 10.0}
    assert not mean_is_known([same], 0.03, 0.9)
    assert mean_is_known([same, same], 0.03, 0.9)
    assert not mean_is_known([same, other], 0.03, 0.9)
