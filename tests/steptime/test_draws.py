"""Coefficients as they are drawn: none below zero, and what the data told well left alone."""

from __future__ import annotations

import numpy as np
import pytest

from ersim.steptime.calibration import _admissible

FloatArray = np.ndarray


def _draws(mean: FloatArray, covariance: FloatArray, count: int = 2000) -> FloatArray:
    spread = np.sqrt(np.diag(covariance))
    scale = np.where(spread > 0.0, spread, 1.0)
    values, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    rng = np.random.default_rng(0)
    return np.array([_admissible(mean, spread, root, rng.standard_normal(len(mean))) for _ in range(count)])


def test_a_sum_that_is_well_known_stays_known_where_a_part_meets_its_bound() -> None:
    """Two terms that stand for each other, one of them small: cut at zero their sum would be too large."""
    mean, sure = np.array([10.0, 0.3]), 0.05
    covariance = np.array([[1.0, -1.0], [-1.0, 1.0]]) + sure**2 * np.eye(2)
    drawn = _draws(mean, covariance)
    assert (drawn >= 0.0).all() and (drawn[:, 1] == 0.0).mean() > 0.3
    total = drawn.sum(axis=1)
    assert total.mean() == pytest.approx(mean.sum(), abs=0.01)
    assert total.std() == pytest.approx(sure * np.sqrt(2.0), rel=0.1)
    raw = np.random.default_rng(0).multivariate_normal(mean, covariance, 2000)
    assert np.maximum(raw, 0.0).sum(axis=1).mean() > mean.sum() + 0.2, "which is what cutting does"


def test_it_is_the_nearest_point_that_is_allowed() -> None:
    rng = np.random.default_rng(1)
    mean = np.array([1.0, 0.2, 0.5, 0.1])
    half = rng.normal(size=(4, 4))
    covariance = half @ half.T
    spread = np.sqrt(np.diag(covariance))
    values, vectors = np.linalg.eigh(covariance / np.outer(spread, spread))
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = np.linalg.inv(covariance)
    for _ in range(50):
        normal = rng.standard_normal(4)
        raw = mean + spread * (root @ normal)
        found = _admissible(mean, spread, root, normal)
        assert (found >= 0.0).all()
        slope = 2.0 * inverse @ (found - raw)  # of the squared distance: 0 inside, upwards at a bound
        assert np.allclose(slope[found > 1e-9], 0.0, atol=1e-3)
        assert (slope >= -1e-3).all()


def test_doubts_that_are_wholly_shared_and_terms_without_any() -> None:
    mean = np.array([1.0, 2.0, 0.5])
    shared = np.outer([0.8, 1.6, 0.0], [0.8, 1.6, 0.0])
    drawn = _draws(mean, shared)
    assert (drawn >= 0.0).all() and (drawn[:, 2] == 0.5).all()
    assert np.allclose(drawn[:, 1], 2.0 * drawn[:, 0], atol=1e-4)
    assert _draws(mean, np.zeros((3, 3)), 1).tolist() == [[1.0, 2.0, 0.5]]
