"""What was taken from a step's thread: seen by its own CPU time, or by the machine's stolen share."""

from __future__ import annotations

import numpy as np
import pytest

from testbed.core_time import (
    CALM,
    LEAST_SHARE,
    MOST_OWN,
    calmest,
    front_end_of,
    stolen_share,
    stretch,
    told_stretch,
    undisturbed_s,
    waited_for_others_s,
)
from testbed.front_end import FrontEnd
from testbed.step_log import LoggedStep, StepLog
from testbed.stolen_time import LARGEST

STEP_S = 0.02


def log_of(
    taken_s: list[float],
    one_thread: bool = True,
    stolen: float | None = 0.0,
    between_s: float = 0.0,
    waiting: float | None = None,
) -> StepLog:
    """Steps of 20 ms of work, from whose thread `taken_s` was taken; the third follows a pause of 1 s.

    between_s: of work after each step's end, before the next one is scheduled. waiting: share of what was
    taken in which the thread waited for another; None: not counted.
    """
    steps, clock, cpu, waited = [], 5.0, 100.0, 7.0
    for number, taken in enumerate(taken_s):
        if number == 2:
            clock, cpu, waited = clock + 1.0, cpu + 0.3, waited + 0.1  # while idle the thread asked for work
        start, end, began, queued = clock, clock + STEP_S + taken, cpu, waited
        cpu, waited = cpu + STEP_S, waited + taken * (waiting or 0.0)
        steps.append(
            LoggedStep(
                number + (number >= 2), start, start, end, end, 1, 0, 1, 1, 9, 9, (), (), (), 1, 1e-5, cpu,
                None, stolen, began, *((None, None) if waiting is None else (waited, queued)),
            )
        )  # fmt: skip
        clock, cpu = end + between_s, cpu + between_s
    return StepLog({"async_scheduling": False, "one_thread": one_thread}, steps, {})


def test_a_thread_knows_what_it_had_in_each_step() -> None:
    log = log_of([0.0, 0.01, 0.02, 0.03, 0.3], stolen=0.36 / 0.46)
    np.testing.assert_allclose(undisturbed_s(log), STEP_S, rtol=1e-9)
    np.testing.assert_allclose(log.periods_s(), [0.02, 0.03, 0.04, 0.05, 0.32])


def test_work_between_two_steps_belongs_to_the_second() -> None:
    """As its period does; not so after a pause, whose work is no step's."""
    log = log_of([0.0, 0.0, 0.0, 0.0], between_s=0.005)
    np.testing.assert_allclose(undisturbed_s(log), [0.02, 0.025, 0.02, 0.025])


def test_no_step_had_more_of_its_core_than_it_took() -> None:
    log = log_of([0.0] * 9 + [-0.005])  # the clocks are not read at one moment
    np.testing.assert_allclose(undisturbed_s(log), log.periods_s())


def test_what_nobody_stole_is_the_front_ends() -> None:
    """1 % of the time in one step of ten, of which the machine knows nothing; more than 2 % nobody has."""
    taken = [0.0] * 9 + [0.002]
    np.testing.assert_allclose(undisturbed_s(log_of(taken)), STEP_S * 1.01)
    np.testing.assert_allclose(undisturbed_s(log_of([10 * one for one in taken])), STEP_S * (1.0 + MOST_OWN))


def test_a_kernel_that_counts_stolen_time_as_the_threads_is_no_harm() -> None:
    log = log_of([0.0] * 4, stolen=0.2)
    np.testing.assert_allclose(undisturbed_s(log), 0.8 * STEP_S)


def test_a_stall_leaves_a_step_some_time() -> None:
    log = log_of([0.0, 9.98], stolen=0.9)
    assert undisturbed_s(log)[1] == pytest.approx(LEAST_SHARE * 10.0 * (1.0 + MOST_OWN))


def test_many_threads_are_told_by_what_was_stolen_from_the_machine() -> None:
    log = log_of([0.02] * 4, one_thread=False, stolen=0.5)
    np.testing.assert_allclose(stretch(log), 2.0)
    np.testing.assert_allclose(undisturbed_s(log), STEP_S)


def test_logs_without_either_are_as_they_are() -> None:
    log = log_of([0.01] * 3, one_thread=False, stolen=None)
    np.testing.assert_allclose(stretch(log), 1.0)
    np.testing.assert_allclose(undisturbed_s(log), log.periods_s())


def test_a_thread_that_ran_and_waited_knows_what_was_stolen_from_it() -> None:
    """Whatever the machine says: it counts processors that wait to be woken."""
    log = log_of([0.01] * 9, stolen=0.7, waiting=0.25)
    np.testing.assert_allclose(stretch(log), 0.0275 / 0.02)
    np.testing.assert_allclose(stretch(log_of([0.01] * 9, stolen=0.7, waiting=1.0)), 1.0, rtol=1e-9)


def test_stolen_time_comes_in_pieces_that_the_steps_around_felt_together() -> None:
    taken = [0.1 * (number % 20 == 0) for number in range(200)]
    factors = stretch(log_of(taken, waiting=0.0))
    np.testing.assert_allclose(factors[:2], 7 / 2)  # a second before all others
    np.testing.assert_allclose(factors[2:], 25 / 20, rtol=0.1)
    later = stretch(log_of([0.0] * 100 + taken, waiting=0.0))
    np.testing.assert_allclose(later[:70], 1.0, rtol=1e-9)
    np.testing.assert_allclose(later[130:], 25 / 20, rtol=0.1)


def test_a_thread_that_was_stopped_altogether_is_stretched_no_further_than_any() -> None:
    assert stretch(log_of([9.98], waiting=0.0)) == pytest.approx(1.0 / (1.0 - LARGEST))
    assert stretch(log_of([-0.001], waiting=0.0)) == 1.0


def test_threads_that_share_the_work_do_not_know_what_was_stolen() -> None:
    np.testing.assert_allclose(stretch(log_of([0.02] * 4, one_thread=False, stolen=0.2, waiting=0.0)), 1.25)


def test_what_its_front_end_takes_is_the_experts_and_the_rest_is_not() -> None:
    """A tenth of the work goes to the front end, half as much to others."""
    log = log_of([0.003] * 9, waiting=1.0)
    own = FrontEnd(0.05, {"1": 0.1})
    np.testing.assert_allclose(undisturbed_s(log, own), 1.1 * STEP_S)
    np.testing.assert_allclose(waited_for_others_s(log, own), 0.001, rtol=1e-9)
    assert front_end_of(log) == FrontEnd(0.15, {"1": 0.15})


def test_nobody_waits_for_others_where_it_is_not_counted() -> None:
    several = log_of([0.003] * 3, one_thread=False, waiting=1.0)
    assert front_end_of(several) is None and front_end_of(log_of([0.003] * 3)) is None
    for log, own in (
        (several, FrontEnd(0.1)),
        (log_of([0.003] * 3), FrontEnd(0.1)),
        (log_of([0.0], waiting=1.0), None),
    ):
        assert np.isnan(waited_for_others_s(log, own)).all()


def test_work_and_waits_on_a_stolen_clock_are_told_as_they_were() -> None:
    """A step of 20 ms of work and 4 ms of waiting, half for its front end, takes 1.5 times as long."""
    log = log_of([1.5 * 0.024 - STEP_S] * 9, waiting=1.5 * 0.004 / (1.5 * 0.024 - STEP_S))
    np.testing.assert_allclose(stretch(log), 1.5)
    assert front_end_of(log) == FrontEnd(0.2, {"1": 0.2})
    np.testing.assert_allclose(waited_for_others_s(log, FrontEnd(0.1)) / stretch(log), 0.002)


def test_overlapping_steps_do_not_tell() -> None:
    log = log_of([0.01] * 9, stolen=0.2, waiting=0.5)
    overlapping = StepLog({**log.meta, "async_scheduling": True}, log.steps, {})
    np.testing.assert_allclose(stretch(overlapping), 1.25)
    assert front_end_of(overlapping) is None


def test_the_steps_time_that_was_stolen_counts_over_all_servers() -> None:
    """A quarter of one's, nothing of the other's, whose steps took three times as long in all."""
    robbed, spared = log_of([STEP_S / 3] * 90, waiting=0.0), log_of([0.0] * 360, waiting=0.0)
    assert stolen_share([robbed]) == pytest.approx(0.25)
    assert stolen_share([robbed, spared]) == pytest.approx(0.25 * 120 / (120 + 360))
    assert stolen_share([]) == 0.0 and stolen_share([log_of([])]) == 0.0


def test_what_only_the_machine_tells_leaves_no_measurement_out() -> None:
    """Its share counts processors that wait to be woken: a quiet load would be measured again and again."""
    shared, uncounted = log_of([0.02] * 4, one_thread=False, stolen=0.5), log_of([0.02] * 4, stolen=0.5)
    for log in (shared, uncounted):
        np.testing.assert_allclose(stretch(log), 2.0)
        assert np.isnan(told_stretch(log)).all() and stolen_share([log]) == 0.0
    robbed = log_of([STEP_S / 3] * 90, waiting=0.0)
    np.testing.assert_array_equal(told_stretch(robbed), stretch(robbed))
    assert stolen_share([shared, robbed]) == pytest.approx(0.25), "who cannot tell dilutes nothing"


def test_calm_moments_are_those_of_little_stolen_time_or_the_calmer_half() -> None:
    some, robbed = np.array([1.0, 1.3, CALM, 1.06, 1.0]), np.array([2.0, 1.3, 1.1, 1.4])
    one = np.zeros(5, dtype=np.int64)
    np.testing.assert_array_equal(calmest(some, one), [True, False, True, False, True])
    np.testing.assert_array_equal(calmest(robbed, one[:4]), [False, True, True, False])
    both = calmest(np.concatenate([some, robbed]), np.array([0] * 5 + [1] * 4))
    assert both[5:].tolist() == [False, True, True, False], "no round disappears"
    np.testing.assert_array_equal(calmest(np.array([np.nan, 1.2, np.nan]), one[:3]), [True, False, True])
    assert calmest(np.zeros(0), one[:0]).shape == (0,)
