"""Correcting coefficients by measured runs: the textbook's linear Gaussian update, and leaving runs out."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.overheads import (
    HOST_TERMS,
    Observation,
    Overheads,
    held_out_runs,
    load_observations,
    load_overheads,
    load_prior,
    posterior,
)


def _prior() -> Overheads:
    return Overheads(("a", "b"), np.asarray([1.0, 2.0]), np.diag([0.01, 0.04]), 0.03, 0.1, 0.03, {})


def test_no_observation_changes_nothing():
    assert posterior(_prior(), []) is not None
    assert posterior(_prior(), []).mean.tolist() == [1.0, 2.0]


def test_many_observations_of_one_part_find_its_coefficient():
    """The part "a" is measured 10 % slower than told, "b" as told."""
    rows = [
        Observation("r", "g", "c", 1.1 * a + b, {"a": a, "b": b}) for a in (1, 2, 3, 5) for b in (1, 2, 4)
    ] * 20
    found = posterior(_prior(), rows)
    assert found.mean == pytest.approx([1.1, 2.0], rel=0.01)
    assert np.sqrt(np.diag(found.relative_covariance)) == pytest.approx([0.0, 0.0], abs=0.02)


def test_the_update_equals_the_formula_for_one_parameter():
    prior = Overheads(("a",), np.asarray([1.0]), np.asarray([[0.01]]), 0.05, 0.1, 0.03, {})
    found = posterior(prior, [Observation("r", "g", "c", 1.2, {"a": 1.0})])
    share = 1.0 / 1.2
    precision = 1 / 0.01 + share**2 / 0.05**2
    assert found.mean[0] == pytest.approx((1 / 0.01 + share / 0.05**2) / precision)


def test_leaving_a_run_out_ignores_it():
    prior, rows = load_prior(), load_observations()
    runs = {row.run for row in rows}
    assert len(runs) >= 3
    nothing = load_overheads(leave_out=lambda row: True)
    assert nothing.mean.tolist() == prior.mean.tolist()
    everything = load_overheads()
    assert not np.allclose(everything.mean, prior.mean)


def test_every_host_term_has_a_prior():
    names = load_prior().names
    assert all(label in names for _, _, label in HOST_TERMS)


def test_whole_runs_judge_the_calibrations_they_ran_on():
    assert held_out_runs("a100-80gb/llama3.1-70b_int4_tp1_tables") is None
    found = held_out_runs("h200-141gb/llama3.1-70b_fp8_tp4_tables")
    assert found is not None and found[1] == 15 and 0.0 < found[0] < 0.04
    assert sum(
        (held_out_runs(name) or (0, 0))[1] for name in {row.calibration for row in load_observations()}
    ) == len(load_observations())
