"""The host's speed: step times cleared of it, and traces that a simulation follows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from testbed.host_speed import SpeedTrace, reference_probe_s, slowness
from testbed.sensitivity import Sensitivity
from testbed.step_log import LoggedStep, StepLog

PROBE_S = 0.0002


def log_of(factors: list[float], probed: bool = True) -> StepLog:
    """Back-to-back steps of 20 ms at speed 1, each `factor` times as long, probed after every step."""
    steps, clock = [], 0.0
    for number, factor in enumerate(factors):
        end = clock + 0.02 * factor
        plain = LoggedStep(
            number, clock, clock + 1e-4, end - 1e-4, end, 1, 0, 1, 1, 9, 9, (), (), (), 1, 1e-5
        )
        steps.append(dataclasses.replace(plain, probe_s=PROBE_S * factor) if probed else plain)
        clock = end
    return StepLog({"async_scheduling": False}, steps, {})


def test_a_host_that_slows_down_is_told_from_slow_steps() -> None:
    log = log_of([1.0] * 100 + [1.5] * 60)
    reference = reference_probe_s(log)
    assert reference == pytest.approx(PROBE_S)
    cleared = log.periods_s() / slowness(log, reference)
    away_from_the_change = np.r_[cleared[:70], cleared[130:]]
    np.testing.assert_allclose(away_from_the_change, 0.02, rtol=1e-6)


def test_one_disturbed_probe_changes_nothing() -> None:
    log = log_of([1.0] * 50)
    steps = list(log.steps)
    steps[20] = dataclasses.replace(steps[20], probe_s=50 * PROBE_S)
    np.testing.assert_allclose(slowness(StepLog(log.meta, steps, {}), PROBE_S), 1.0)


def test_without_probes_the_host_is_as_it_was() -> None:
    log = log_of([1.0, 2.0, 1.0], probed=False)
    assert reference_probe_s(log) is None
    np.testing.assert_array_equal(slowness(log, None), np.ones(3))
    np.testing.assert_array_equal(slowness(log, PROBE_S), np.ones(3))


def test_exponents_move_and_the_steps_of_the_checks_stay() -> None:
    felt = Sensitivity(0.9, 0.5, [[0.04, 0.0], [0.0, 0.04]])
    trace = SpeedTrace((1.0,), 1.4, 0.0, 0.0, felt, share=0.6)
    draws = [trace.drawn(np.random.default_rng(seed), np.random.default_rng(0)) for seed in range(50)]
    np.testing.assert_allclose([one.slowed(0.0, 0.6) for one in draws], trace.slowed(0.0, 0.6))
    assert np.std([one.slowed(0.0, 0.0) for one in draws]) > 0.02, (
        "those that feel less may be faster or slower"
    )
    assert not dataclasses.replace(trace, factor=1.0).is_one


def test_a_trace_follows_the_run_and_fills_its_gaps() -> None:
    nothing = SpeedTrace((1.0,))
    trace = nothing.with_steps(np.array([0.1, 0.2, 2.1]), np.array([1.0, 1.2, 2.1]))
    assert trace.at(0.3) == pytest.approx(1.1)
    assert trace.at(1.1) == pytest.approx(1.1 + 2 * 0.25)
    assert trace.at(2.2) == pytest.approx(2.1)
    assert trace.at(99.0) == pytest.approx(1.6), "what follows is as slow as the median"
    assert nothing.with_steps(np.array([]), np.array([])).at(3.0) == 1.0


def test_a_trace_slows_steps_by_start_and_host_as_far_as_they_feel_it() -> None:
    trace = SpeedTrace((2.0,), factor=1.1, sensitivity=Sensitivity(1.0, 0.5))
    assert trace.slowed(0.0, share=0.0) == pytest.approx(2.2)
    assert trace.slowed(0.0, share=0.5) == pytest.approx(2.2**1.25)
    assert trace.slowed(0.0, share=3.0) == trace.slowed(9.0, share=1.0) == pytest.approx(2.2**1.5)
    assert trace.median == pytest.approx(2.2)
