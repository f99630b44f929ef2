from __future__ import annotations

import numpy as np
import pytest

from ersim.errors import DataError
from ersim.routing import evaluation as ev


def test_a_constant_score_is_the_random_router_exactly() -> None:
    generator = np.random.default_rng(0)
    strong, weak = (generator.random((2, 500)) < [[0.8], [0.6]]).astype(float)
    curve = ev.gap_curve(np.zeros(500), strong, weak)
    assert curve.apgr() == pytest.approx(0.5)
    assert curve.cpt(0.5) == pytest.approx(0.5)
    assert curve.cpt(0.8) == pytest.approx(0.8)
    assert (curve.weak, curve.strong) == pytest.approx((weak.mean(), strong.mean()))


def test_a_case_worked_by_hand() -> None:
    # Gains in score order: 1, 1, 0, 0. PGR 0, .5, 1, 1, 1 at shares 0, .25, .5, .75, 1.
    strong, weak = np.ones(4), np.array([0.0, 0.0, 1.0, 1.0])
    curve = ev.gap_curve(np.array([4.0, 3.0, 2.0, 1.0]), strong, weak)
    assert curve.recovered().tolist() == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert curve.apgr() == pytest.approx(0.75)
    assert curve.cpt(0.5) == pytest.approx(0.25)
    assert curve.cpt(0.8) == pytest.approx(0.4)
    assert curve.cpt(0.0) == 0.0


def test_the_true_gap_is_the_best_order_and_its_opposite_mirrors_it() -> None:
    generator = np.random.default_rng(1)
    strong, weak = (generator.random((2, 400)) < [[0.85], [0.6]]).astype(float)
    best = ev.gap_curve(strong - weak, strong, weak).apgr()
    worst = ev.gap_curve(weak - strong, strong, weak).apgr()
    some = ev.gap_curve(generator.random(400), strong, weak).apgr()
    assert worst < some < best
    assert best + worst == pytest.approx(1.0)


def test_no_gap_is_an_error() -> None:
    with pytest.raises(DataError, match="no gap to recover"):
        ev.gap_curve(np.arange(3.0), np.ones(3), np.ones(3)).apgr()
    with pytest.raises(DataError, match="equally many"):
        ev.gap_curve(np.arange(2.0), np.ones(3), np.ones(3))


def test_cost_curve_runs_from_the_best_to_the_cheapest() -> None:
    generator = np.random.default_rng(2)
    quality = (generator.random((300, 3)) < [0.4, 0.6, 0.8]).astype(float)
    curve = ev.cost_curve(quality, quality, np.array([0.1, 0.4, 1.0]), [0.0, 0.1, 0.5, 100.0])
    assert (np.diff(curve.cost) >= 0).all()
    assert curve.cost[0] == pytest.approx(0.1)
    assert curve.best_within(0.05) is None
    oracle = curve.cheapest_with(quality[:, 2].mean())
    assert (
        oracle is not None and oracle < 0.5
    )  # knowing the answers beats the dearest model at half its price
    assert curve.cheapest_with(1.1) is None
    assert curve.share.sum(axis=1) == pytest.approx(np.ones(4))


def test_a_weight_is_chosen_within_a_price_or_for_a_quality() -> None:
    curve = ev.CostCurve(
        np.array([3.0, 1.0, 0.1, 0.0]), np.array([0.1, 0.3, 0.5, 1.0]), np.array([0.4, 0.7, 0.6, 0.8]),
        np.ones((4, 1)),
    )  # fmt: skip
    assert [curve.weight_within(cost) for cost in (0.05, 0.1, 0.6, 1.0)] == [None, 3.0, 1.0, 0.0]
    assert [curve.weight_with(quality) for quality in (0.3, 0.6, 0.75, 0.9)] == [3.0, 1.0, 0.0, None]


def test_confusion_counts_every_prompt_once() -> None:
    rows, columns, table = ev.confusion(["a", "a", "b"], ["x", "y", "y"])
    assert (rows, columns, table.tolist()) == (["a", "b"], ["x", "y"], [[1, 1], [0, 1]])
    assert ev.majority_names(np.array([0, 0, 1]), ["b", "b", "a"], 3) == ["b", "a", "empty"]


def test_spread_of_one_value_has_no_deviation() -> None:
    assert ev.Spread.of([2.0]) == ev.Spread(2.0, 0.0, 2.0, 2.0, 1)
    assert ev.Spread.of([1.0, 3.0]).std == pytest.approx(np.sqrt(2.0))
