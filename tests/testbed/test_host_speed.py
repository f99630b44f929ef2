"""The host's speed as traces that a simulation follows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from testbed.host_speed import SpeedTrace
from testbed.sensitivity import Sensitivity


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
    trace = nothing.with_steps(np.array([0.1, 0.2, 2.1]), np.array([1.0, 1.2, 2.1]), np.ones(3))
    assert trace.at(0.3) == pytest.approx(1.1)
    assert trace.at(1.1) == pytest.approx(1.1 + 2 * 0.25)
    assert trace.at(2.2) == pytest.approx(2.1)
    assert trace.at(99.0) == pytest.approx(1.6), "what follows is as slow as the median"
    assert nothing.with_steps(*[np.array([])] * 3).at(3.0) == 1.0


def test_a_trace_slows_steps_by_start_and_host_as_far_as_they_feel_it() -> None:
    trace = SpeedTrace((2.0,), factor=1.1, sensitivity=Sensitivity(1.0, 0.5))
    assert trace.slowed(0.0, share=0.0) == pytest.approx(2.2)
    assert trace.slowed(0.0, share=0.5) == pytest.approx(2.2**1.25)
    assert trace.slowed(0.0, share=3.0) == trace.slowed(9.0, share=1.0) == pytest.approx(2.2**1.5)
    assert trace.median == pytest.approx(2.2)


def test_stolen_time_stretches_all_steps_alike() -> None:
    felt = SpeedTrace((1.0,), factor=1.1, sensitivity=Sensitivity(1.0, 0.5))
    trace = felt.with_steps(np.array([0.1, 0.7]), np.array([1.2, 1.2]), np.array([1.0, 1.5]))
    for share in (0.0, 1.0):
        assert trace.slowed(0.1, share) == pytest.approx((1.1 * 1.2) ** (1.0 + 0.5 * share))
        assert trace.slowed(0.6, share) == pytest.approx(1.5 * trace.slowed(0.1, share))
    assert trace.median == pytest.approx(1.1 * 1.2 * 1.25)
    assert not SpeedTrace((1.0,), stretches=(1.0, 1.2)).is_one
