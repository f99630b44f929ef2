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


def test_one_pair_tells_nothing() -> None:
    assert difference([{"x": 1.0}], [{"x": 2.0}], "x") is None
