"""Weighted quantiles against numpy on the repeated samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ersim.results import latency_statistics, weighted_quantiles

samples = st.lists(
    st.tuples(st.floats(0, 1e3, allow_nan=False), st.integers(0, 9)), min_size=1, max_size=60
).filter(lambda pairs: sum(count for _, count in pairs) > 0)


@given(samples, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_weighted_quantiles_equal_numpy_on_repeated_samples(
    pairs: list[tuple[float, int]], levels: list[float]
) -> None:
    values = np.array([value for value, _ in pairs])
    counts = np.array([count for _, count in pairs])
    expected = np.quantile(np.repeat(values, counts), levels)
    np.testing.assert_allclose(weighted_quantiles(values, counts, np.array(levels)), expected, atol=1e-9)


def test_statistics_carry_bench_names_and_milliseconds() -> None:
    found = latency_statistics("itl", np.array([0.010, 0.030]), np.array([3, 1]))
    assert found["mean_itl_ms"] == pytest.approx(15.0)
    assert found["median_itl_ms"] == pytest.approx(10.0)
    assert set(found) == {f"{k}_itl_ms" for k in ("mean", "median", "std", "p90", "p95", "p99")}


def test_no_samples_give_none_not_nan() -> None:
    assert set(latency_statistics("ttft", np.array([])).values()) == {None}
