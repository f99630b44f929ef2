"""MSER-5 finds a transient that was put there, and admits when there is no steady state."""

from __future__ import annotations

import numpy as np

from ersim.results import mser_cut, steady_window


def test_cut_falls_at_the_end_of_the_transient() -> None:
    rng = np.random.default_rng(1)
    series = rng.normal(10.0, 1.0, 2000)
    series[:300] += np.linspace(20.0, 0.0, 300)
    cut = mser_cut(series)
    assert cut is not None
    assert 200 <= cut <= 400


def test_stationary_series_loses_little() -> None:
    cut = mser_cut(np.random.default_rng(2).normal(10.0, 1.0, 2000))
    assert cut is not None
    assert cut <= 1000


def test_growing_series_never_settles() -> None:
    latency = np.linspace(1.0, 50.0, 1000)
    assert mser_cut(latency) is None
    window = steady_window(np.linspace(0.1, 100.0, 1000), latency, 0.0)
    assert not window.steady
    assert window.start_s == 50.0


def test_too_few_samples_are_used_whole_and_called_unsteady() -> None:
    window = steady_window(np.arange(1.0, 11.0), np.ones(10), 0.0)
    assert (window.start_s, window.end_s, window.steady) == (0.0, 10.0, False)
