"""The speed probe: slow moments told from slow steps, whatever the step before it left in the caches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ersim.errors import DataError
from ersim.steptime import load
from ersim.steptime.calibration import CALIBRATION_DIR
from testbed.speed_probe import KEY, MORE, PREFILL, Probes, UsualProbe, kind_of, slowness
from testbed.step_log import LoggedStep, StepLog, StepRow

PROBE_S = 0.0002


def log_of(
    factors: list[float],
    probed: bool = True,
    rows: list[int] | None = None,
    after: dict[str, float] | None = None,
) -> StepLog:
    """Back-to-back steps of 20 ms at speed 1, each `factor` times as long, probed after every step.

    rows: decoded by each; 0 makes it a step of prefill. after: factor on the probe by kind of step.
    """
    steps, clock = [], 0.0
    for number, factor in enumerate(factors):
        end, decoded = clock + 0.02 * factor, 1 if rows is None else rows[number]
        prefill = () if decoded else (StepRow(number, 64, 0, 64, 64),)
        plain = LoggedStep(
            number, clock, clock + 1e-4, end - 1e-4, end, 1, 0, 1, decoded, 9, 9, prefill, (), (), 1, 1e-5
        )
        probe_s = PROBE_S * factor * (after or {}).get(kind_of(decoded, 0 if decoded else 64), 1.0)
        steps.append(dataclasses.replace(plain, probe_s=probe_s) if probed else plain)
        clock = end
    return StepLog({"async_scheduling": False}, steps, {})


def test_a_host_that_slows_down_is_told_from_slow_steps() -> None:
    log = log_of([1.0] * 100 + [1.5] * 60)
    usual = UsualProbe.fit(Probes.of(log))
    assert usual is not None and usual.seconds == pytest.approx(PROBE_S)
    cleared = log.periods_s() / slowness(Probes.of(log), usual)
    away_from_the_change = np.r_[cleared[:70], cleared[130:]]
    np.testing.assert_allclose(away_from_the_change, 0.02, rtol=1e-6)


def test_one_disturbed_probe_changes_nothing() -> None:
    log = log_of([1.0] * 50)
    steps = list(log.steps)
    steps[20] = dataclasses.replace(steps[20], probe_s=50 * PROBE_S)
    found = slowness(Probes.of(StepLog(log.meta, steps, {})), UsualProbe(PROBE_S, {"1": 1.0}))
    np.testing.assert_allclose(found, 1.0)


def test_without_probes_the_host_is_as_it_was() -> None:
    probes = Probes.of(log_of([1.0, 2.0, 1.0], probed=False))
    assert UsualProbe.fit(probes) is None
    np.testing.assert_array_equal(slowness(probes, None), np.ones(3))
    np.testing.assert_array_equal(slowness(probes, UsualProbe(PROBE_S, {})), np.ones(3))


def test_what_steps_leave_in_the_caches_is_not_the_host() -> None:
    rng = np.random.default_rng(1)
    after = {"2": 0.95, PREFILL: 1.06}
    rows = rng.choice([0, 1, 2, 8], size=1200, p=[0.1, 0.4, 0.3, 0.2]).tolist()
    host = np.repeat(np.exp(0.15 * rng.standard_normal(6)), 200)
    usual = UsualProbe.fit(Probes.of(log_of(host.tolist(), rows=rows, after=after)))
    assert usual is not None and set(usual.after) == {PREFILL, "1", "2", MORE}
    for kind, factor in (*after.items(), ("1", 1.0), (MORE, 1.0)):
        assert usual.after[kind] / usual.after["1"] == pytest.approx(factor, abs=0.01)
    only_two_rows = log_of([1.0] * 200, rows=[2] * 200, after=after)
    slow = slowness(
        Probes.of(only_two_rows), dataclasses.replace(usual, seconds=PROBE_S * usual.after["1"] ** -1)
    )
    np.testing.assert_allclose(slow, 1.0, atol=0.012, err_msg="a phase of steps that leave the caches warm")


def test_kinds_that_come_in_phases_of_their_own_are_told_apart() -> None:
    """Bursts of one batch size, as in a plan: about half of the probes near one are of its own kind."""
    rng = np.random.default_rng(2)
    rows = np.tile(np.repeat([1, 2, 4, 8], 48), 12).tolist()
    log = log_of([1.0] * len(rows), rows=rows, after={"2": 0.95})
    noise = np.exp(0.02 * rng.standard_normal(len(rows)))
    probes = Probes.of(log)
    usual = UsualProbe.fit(dataclasses.replace(probes, took_s=probes.took_s * noise))
    assert usual is not None
    for kind, factor in (("2", 0.95), ("4", 1.0), (MORE, 1.0)):
        assert usual.after[kind] / usual.after["1"] == pytest.approx(factor, abs=0.006)


def test_the_probe_at_its_start_speaks_for_a_long_step() -> None:
    log = log_of([1.5, 150.0])
    steps = [log.steps[0], dataclasses.replace(log.steps[1], probe_s=None)]
    found = slowness(Probes.of(StepLog(log.meta, steps, {})), UsualProbe(PROBE_S, {}))
    np.testing.assert_allclose(found, 1.5)


def test_few_probes_of_a_kind_say_little() -> None:
    log = log_of([1.0] * 100, rows=[1] * 98 + [0] * 2, after={PREFILL: 2.0})
    usual = UsualProbe.fit(Probes.of(log))
    assert usual is not None and 1.0 < usual.after[PREFILL] < 1.2


def test_kinds_of_steps() -> None:
    assert [kind_of(*case) for case in ((1, 0), (4, 0), (5, 0), (400, 0), (3, 7), (0, 512))] == [
        "1", "4", MORE, MORE, PREFILL, PREFILL,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "stored",
    [
        {"seconds": 0, "after": {}},
        {"seconds": -2e-4, "after": {}},
        {"seconds": float("nan"), "after": {}},
        {"seconds": "2e-4", "after": {}},
        {"seconds": True, "after": {}},
        {"seconds": 2e-4, "after": {"1": 0.0}},
        {"seconds": 2e-4, "after": {"1": None}},
        {"seconds": 2e-4, "after": [1.0]},
        {"seconds": 2e-4},
        2e-4,
        [],
    ],
)
def test_a_calibration_with_times_that_no_probe_takes_is_refused(stored: object) -> None:
    known = load(sorted(CALIBRATION_DIR.rglob("*.json"))[0])
    assert UsualProbe.of(known) is None, "no live profile"
    sound = dataclasses.replace(known, provenance={KEY: {"seconds": 2e-4, "after": {"1": 1.01}}})
    assert UsualProbe.of(sound) == UsualProbe(2e-4, {"1": 1.01})
    with pytest.raises(DataError, match=rf"provenance\.{KEY} must be .* got .*; profile again"):
        UsualProbe.of(dataclasses.replace(known, provenance={KEY: stored}))
