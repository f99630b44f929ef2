"""What steps make of the host's speed, fitted to synthetic steps of known exponents."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ersim.steptime import load
from ersim.steptime.calibration import CALIBRATION_DIR
from testbed.sensitivity import KEY, PRIOR, Sensitivity, fit_sensitivity, one_row_share, probe_s


def steps(plain: float, reads: float, wobble: float, count: int = 6000) -> tuple[np.ndarray, ...]:
    """Measured seconds, told seconds, share and slowness of steps on a host that wobbles for seconds."""
    rng = np.random.default_rng(3)
    share = rng.choice([1.0, 0.6, 0.2], count)
    told = 0.03 / share
    slow = np.exp(wobble * np.repeat(rng.standard_normal(count // 40), 40))
    noise = np.exp(0.05 * rng.standard_normal(count))
    return told * slow ** (plain + reads * share) * noise, told, share, slow


def test_exponents_are_found_where_the_host_moved() -> None:
    found = fit_sensitivity(*steps(0.6, 1.1, wobble=0.3))
    assert found.plain == pytest.approx(0.6, abs=0.06)
    assert found.reads == pytest.approx(1.1, abs=0.1)


def test_a_quiet_profile_keeps_to_what_others_said() -> None:
    found = fit_sensitivity(*steps(0.2, 2.0, wobble=0.003))
    assert (found.plain, found.reads) == pytest.approx(PRIOR, abs=0.05)


def test_without_a_probe_every_step_is_as_it_was() -> None:
    measured, told, share, _ = steps(1.0, 0.0, wobble=0.2)
    assert fit_sensitivity(measured, told, share, np.ones(len(told))) == Sensitivity()
    assert fit_sensitivity(100 * told, told, share, np.full(len(told), 1.1)) == Sensitivity(), "stalls only"


def test_stalls_do_not_move_the_fit() -> None:
    measured, told, share, slow = steps(0.9, 0.5, wobble=0.2)
    measured[::50] *= 20.0
    found = fit_sensitivity(measured, told, share, slow)
    assert (found.plain, found.reads) == pytest.approx((0.9, 0.5), abs=0.1)


def test_the_share_of_a_step_of_one_row_is_at_most_all_of_it() -> None:
    class Slow:
        def step_s(self, batch: object) -> float:
            return 0.02

    np.testing.assert_allclose(one_row_share(Slow(), np.array([0.01, 0.02, 0.08])), [1.0, 1.0, 0.25])
    felt = Sensitivity(0.8, 0.6)
    each = felt.slowed_each(np.array([1.5, 1.5, 1.0]), np.array([1.0, 0.25, 1.0]))
    np.testing.assert_allclose(each, [1.5**1.4, 1.5**0.95, 1.0])
    assert felt.slowed(1.5, 0.25) == pytest.approx(each[1])


def test_a_calibration_tells_what_its_profile_found() -> None:
    known = load(sorted(CALIBRATION_DIR.rglob("*.json"))[0])
    assert Sensitivity.of(known) == Sensitivity() and probe_s(known) is None, "no live profile"
    live = dataclasses.replace(known, provenance={"probe_s": 2e-4, KEY: {"plain": 0.8, "reads": 0.4}})
    assert Sensitivity.of(live) == Sensitivity(0.8, 0.4) and probe_s(live) == 2e-4
