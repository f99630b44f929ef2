"""Correcting coefficients by measured runs: the textbook's linear Gaussian update, and leaving runs out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from experiments.overheads import (
    HOST_TERMS,
    Observation,
    Overheads,
    coefficients,
    held_out_runs,
    load_observations,
    load_overheads,
    load_prior,
    posterior,
    predicted_tpot_ms,
)


def _prior(mean=(1.0, 2.0), std=(0.1, 0.2), common: float = 1e-6, noise: float = 0.03) -> Overheads:
    names = ("a", "b")[: len(mean)]
    spreads = {"common_rel_std": common, "workload_rel_std": 0.015, "derived_rel_std": 0.1}
    return Overheads(
        names,
        np.asarray(mean),
        np.diag(np.square(std[: len(mean)])),
        **spreads,
        run_rel_std={"per_request": noise},
        residual_rel_std=0.03,
        frontend={},
    )


def test_no_observation_changes_nothing():
    found = posterior(_prior(), [])
    assert found.mean.tolist() == [1.0, 2.0] and not found.factors


def test_many_observations_of_one_part_find_its_coefficient():
    """The part "a" is measured 10 % slower than told, "b" as told."""
    rows = [
        Observation("r", "g", "c", 1.1 * a + b, {"a": a, "b": b}) for a in (1, 2, 3, 5) for b in (1, 2, 4)
    ] * 20
    found = posterior(_prior(), rows)
    assert found.mean == pytest.approx([1.1, 2.0], rel=0.01)
    assert np.sqrt(np.diag(found.relative_covariance))[:2] == pytest.approx([0.0, 0.0], abs=0.02)


def test_the_update_equals_the_formula_for_one_parameter():
    found = posterior(_prior((1.0,), noise=0.05), [Observation("r", "g", "c", 1.2, {"a": 1.0})])
    share = 1.0 / 1.2
    precision = 1 / 0.01 + share**2 / 0.05**2
    assert found.mean[0] == pytest.approx((1 / 0.01 + share / 0.05**2) / precision)


def test_a_calibrations_factor_is_learnt_from_its_own_runs_alone():
    """Two calibrations of one method: one is measured 5 % slower than told. Closed form of random effects."""
    prior = _prior((1.0,), (1e-9,), common=0.03, noise=0.01)
    rows = [Observation("r", "g", "slow", 1.05, {"a": 1.0}), Observation("s", "g", "right", 1.0, {"a": 1.0})]
    found = posterior(prior, rows)
    share = 1 / 1.05
    expected = (1 - share) * share * 0.03**2 / (share**2 * 0.03**2 + 0.01**2)
    assert found.factors["slow"] == pytest.approx(1 + expected)
    assert found.factors["right"] == pytest.approx(1.0)
    assert 1.0 < predicted_tpot_ms(rows[0], found, prior) < 1.05
    unknown = Observation("t", "g", "third", 1.0, {"a": 1.0})
    assert predicted_tpot_ms(unknown, found, prior) == pytest.approx(1.0)


def test_host_time_is_not_multiplied_by_a_calibrations_factor():
    host = HOST_TERMS[-1][2]
    row = Observation("r", "g", "c", 2.0, {"a": 1.0, host: 1.0})
    assert row.gpu_share == pytest.approx(0.5)
    terms = [{"label": "weights", "side": "gpu"}, {"label": host, "side": "exposed"}]
    known = replace(load_overheads(leave_out=lambda row: True), factors={"c": 1.1})
    size = len(known.names) + 1
    known = replace(known, relative_covariance=np.eye(size) * 1e-4)
    chosen = {"source": "tables", "precision": "bf16", "derived": False, "maps_rel_std": 0.1}
    theta, covariance = coefficients(terms, known, calibration="c", **chosen)
    assert theta == pytest.approx([1.1 * known.value("weights"), known.value(host)])
    # the parameter's own and the factor's doubt, and what workloads differ by; nothing for the curves
    assert covariance[0][0] == pytest.approx(theta[0] ** 2 * (2e-4 + known.workload_rel_std**2), rel=1e-3)
    other, wide = coefficients(terms, known, calibration="another", **chosen)
    assert other[0] == pytest.approx(known.value("weights")) and wide[0][0] > covariance[0][0] + 0.009


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
