"""Coefficients as they are drawn: none below zero, and what the data told well left alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ersim.config import ExpertConfig
from ersim.steptime.calibration import Calibration
from ersim.steptime.expert import build_expert_model

FloatArray = np.ndarray


def _fitted(mean: FloatArray, covariance: FloatArray, source: str = "steps") -> Calibration:
    """A calibration of as many terms, with that mean and covariance."""
    terms = [
        {"kind": "linear", "side": "gpu", "feature": "step", "label": f"term {i}"} for i in range(len(mean))
    ]
    return dataclasses.replace(
        build_expert_model(ExpertConfig(), "expert").calibration,
        terms=terms, theta=mean.tolist(), covariance=covariance.tolist(), source=source,
    )  # fmt: skip


def _draws(mean: FloatArray, covariance: FloatArray, count: int = 1000, source: str = "steps") -> FloatArray:
    calibration = _fitted(mean, covariance, source)
    return np.array([calibration.sample_theta(np.random.default_rng(seed)) for seed in range(count)])


def test_a_sum_that_is_well_known_stays_known_where_a_part_meets_its_bound() -> None:
    """Two terms that stand for each other, one of them small: cut at zero their sum would be too large."""
    mean, sure = np.array([10.0, 0.3]), 0.05
    covariance = np.array([[1.0, -1.0], [-1.0, 1.0]]) + sure**2 * np.eye(2)
    drawn = _draws(mean, covariance)
    assert (drawn >= 0.0).all() and (drawn[:, 1] == 0.0).mean() > 0.3
    cut = _draws(mean, covariance, source="tables")
    assert (cut >= 0.0).all() and cut.sum(axis=1).mean() > mean.sum() + 0.2, "which is what cutting does"
    total = drawn.sum(axis=1)
    assert total.mean() == pytest.approx(mean.sum(), abs=0.01)
    assert total.std() == pytest.approx(sure * np.sqrt(2.0), rel=0.1)


def test_it_is_the_nearest_point_that_is_allowed() -> None:
    rng = np.random.default_rng(1)
    mean = np.array([1.0, 0.2, 0.5, 0.1])
    half = rng.normal(size=(4, 4))
    covariance = half @ half.T
    inverse = np.linalg.inv(covariance)
    calibration, met = _fitted(mean, covariance), 0
    for _ in range(200):
        raw = mean + half @ rng.standard_normal(4)
        found = calibration.within_bounds(raw)
        met += (raw < 0.0).sum() > 1
        assert (found >= 0.0).all()
        slope = 2.0 * inverse @ (found - raw)  # of the squared distance: 0 inside, upwards at a bound
        assert np.allclose(slope[found > 1e-9], 0.0, atol=1e-3)
        assert (slope >= -1e-3).all()
    assert met > 20, "of several at once too"


def test_doubts_that_are_wholly_shared_and_terms_without_any() -> None:
    mean = np.array([1.0, 2.0, 0.5])
    shared = np.outer([0.8, 1.6, 0.0], [0.8, 1.6, 0.0])
    drawn = _draws(mean, shared)
    assert (drawn >= 0.0).all() and (drawn[:, 2] == 0.5).all()
    assert np.allclose(drawn[:, 1], 2.0 * drawn[:, 0], atol=1e-4)
    assert _draws(mean, np.zeros((3, 3)), 1).tolist() == [[1.0, 2.0, 0.5]]
    sure = _fitted(np.array([1e6, 1.0]), np.diag([1e-12, 4.0])).within_bounds(np.array([1e6, -1.0]))
    assert sure.tolist() == [1e6, 0.0]


def test_a_draw_and_its_reflection_average_out_unless_they_meet_a_bound() -> None:
    covariance = np.array([[0.04, -0.01], [-0.01, 0.01]])
    for second, apart in ((1.0, 0.0), (0.0, 0.01)):
        calibration = _fitted(np.array([1.0, second]), covariance)
        pairs = [
            [calibration.sample_theta(np.random.default_rng(seed), mirrored) for mirrored in (False, True)]
            for seed in range(50)
        ]
        off = np.mean(pairs, axis=1) - [1.0, second]
        assert np.abs(off).max() == pytest.approx(0.0, abs=1e-9) if not apart else np.abs(off).max() > apart
        assert all(not np.allclose(one, other) for one, other in pairs)
