"""Predictions against measurements, fleets against fleets."""

from __future__ import annotations

import numpy as np
import pytest

from ersim.results import compare, difference


def test_error_sign_and_interval() -> None:
    measured = {"output_throughput": 100.0, "median_ttft_ms": 50.0, "p99_itl_ms": None}
    predicted = {
        "output_throughput": 95.0,
        "output_throughput_low": 90.0,
        "output_throughput_high": 99.0,
        "median_ttft_ms": 60.0,
    }
    rows = {row.metric: row for row in compare(measured, predicted)}
    assert set(rows) == {"output_throughput", "median_ttft_ms"}
    assert rows["output_throughput"].error == pytest.approx(-0.05)
    assert rows["output_throughput"].inside is False
    assert rows["median_ttft_ms"].inside is None


def test_what_is_zero_on_both_sides_is_no_error() -> None:
    rows = compare({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, ("a", "b"))
    assert [row.error for row in rows] == [0.0, np.inf]


def test_common_random_numbers_tell_fleets_apart_that_independent_runs_would_not() -> None:
    shared = np.random.default_rng(4).normal(100.0, 10.0, 6)
    a = [{"x": value * 1.02} for value in shared]
    b = [{"x": value} for value in shared]
    found = difference(a, b, "x")
    assert found is not None
    assert found.distinguishable
    assert found.relative == pytest.approx(0.02)
    shuffled = difference(a, [*b[3:], *b[:3]], "x")
    assert shuffled is not None
    assert not shuffled.distinguishable


def test_identical_fleets_are_never_told_apart() -> None:
    for values in ([5.0, 5.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]):
        runs = [{"x": value} for value in values]
        found = difference(runs, runs, "x")
        assert found is not None and not found.distinguishable
        assert (found.low, found.relative, found.high) == (0.0, 0.0, 0.0)


def test_a_doubtful_sign_stays_doubtful_however_many_replications() -> None:
    doubt = np.random.default_rng(2).normal(0.02, 0.05, 400)  # which of two GPUs is faster is not known
    a, b = [{"x": 100.0 * (1 + value)} for value in doubt], [{"x": 100.0}] * 400
    found = difference(a, b, "x")
    assert found is not None and found.pairs == 400
    assert not found.distinguishable


def test_a_figure_that_may_be_zero_is_compared_by_plain_differences() -> None:
    found = difference([{"x": 0.0}, {"x": 0.1}, {"x": 0.05}], [{"x": 1.0}] * 3, "x")
    assert found is not None and found.distinguishable
    assert found.relative == pytest.approx(-0.95)


def test_one_pair_tells_nothing() -> None:
    assert difference([{"x": 1.0}], [{"x": 2.0}], "x") is None
