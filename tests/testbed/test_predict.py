"""What varies between the replications of a predicted live run, and what does not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ersim.config import ExpertConfig, FleetConfig, SimulationConfig, UncertaintyConfig, WorkloadConfig
from ersim.prepare import Preparations
from ersim.results import Window
from ersim.steptime.calibration import save
from ersim.types import Batch
from testbed import predict
from testbed.contention import ContendedStepTime, Contention
from testbed.fleet_calibration import FleetCalibration
from testbed.host_speed import SpeedTrace
from testbed.live_run import level_config
from testbed.pooled import answered
from testbed.predict import predict_once, predicted_summary
from testbed.sensitivity import KEY, ONE_ROW, Sensitivity
from testbed.step_scatter import StepScatter

PREFILL = Batch(2048, 0, 0, 0, ((2048, 0),), 1)
FELT = Sensitivity(0.8, 0.6)


class Running:
    """A replica as step times see it."""

    def __init__(self, running: Sequence[int]) -> None:
        self.running = running


@pytest.fixture(scope="module")
def shared() -> Preparations:
    return Preparations()


@pytest.fixture(scope="module")
def config(shared: Preparations, tmp_path_factory: pytest.TempPathFactory) -> SimulationConfig:
    """Two equal experts whose calibration knows how its steps feel a slow host."""
    known = shared.expert(ExpertConfig(), "expert").calibration
    host = {**known.provenance, KEY: {"plain": FELT.plain, "reads": FELT.reads}}
    path = tmp_path_factory.mktemp("calibration") / "felt.json"
    save(dataclasses.replace(known, provenance=host), path)
    experts = {name: ExpertConfig(calibration=str(path)) for name in "ab"}
    workload = WorkloadConfig(think_s=0.5)
    return SimulationConfig(users=4, fleet=FleetConfig("f", experts=experts), workload=workload)


def fleet_of(**contention: Any) -> FleetCalibration:
    item = Contention(**{"slowdowns": {"b": 0.3}, **contention})
    other = Contention(slowdowns={"a": 0.3})
    return FleetCalibration("f", {}, {"a": item, "b": other}, {})


def seconds(
    config: SimulationConfig,
    shared: Preparations,
    replication: int,
    repeat: int = 0,
    speed: SpeedTrace | None = None,
    known: FleetCalibration | None = None,
    beside: bool = False,
    batch: Batch = ONE_ROW,
) -> list[float]:
    """What one step takes with each expert; beside: while the other one runs."""
    traces = {} if speed is None else dict.fromkeys("ab", speed)
    times = predict._step_times(config, shared, known or fleet_of(), replication, traces, repeat)
    found = []
    for time in times:
        assert isinstance(time, ContendedStepTime)
        time.watch([[Running([1] if beside else [])]], lambda: 0.0)  # type: ignore[list-item]
        found.append(time.step_s(batch))
    return found


def slowed(
    config: SimulationConfig, shared: Preparations, trace: SpeedTrace, replication: int, repeat: int = 0
) -> list[float]:
    """Factors of the trace on a step of one row, by expert."""
    with_it, without = (seconds(config, shared, replication, repeat, one) for one in (trace, None))
    return [a / b for a, b in zip(with_it, without, strict=True)]


def test_a_start_is_drawn_with_each_replication_for_each_expert_and_stays_over_repeats(
    config: SimulationConfig, shared: Preparations
) -> None:
    trace = SpeedTrace((1.0,), 1.2, doubt=0.1)
    assert slowed(config, shared, trace, 0, 0) == pytest.approx([1.2, 1.2]), "the first has the means"
    draws = np.array([slowed(config, shared, trace, number, 0) for number in range(1, 9)])
    assert (np.ptp(draws, axis=0) > 0.05).all() and not np.isclose(draws[:, 0], draws[:, 1]).any()
    np.testing.assert_allclose(slowed(config, shared, trace, 3, 1), draws[2])


def test_runs_wander_from_their_start_all_experts_alike(
    config: SimulationConfig, shared: Preparations
) -> None:
    trace = SpeedTrace((1.0,), 1.0, wander=0.1)
    runs = np.array([slowed(config, shared, trace, 1, repeat) for repeat in range(6)])
    np.testing.assert_allclose(runs[:, 0], runs[:, 1])
    assert all(abs(a - b) > 1e-4 for a, b in itertools.combinations(runs[:, 0], 2))


def test_exponents_are_drawn_once_a_replication(config: SimulationConfig, shared: Preparations) -> None:
    doubtful = dataclasses.replace(FELT, covariance=[[0.04, 0.0], [0.0, 0.04]])
    trace = SpeedTrace((1.3,), sensitivity=doubtful)
    draws = np.array([slowed(config, shared, trace, number, 0)[0] for number in range(1, 9)])
    assert np.ptp(draws) > 0.02
    assert slowed(config, shared, trace, 2, 1)[0] == pytest.approx(draws[1])


def test_a_draw_and_its_reflection_average_out(config: SimulationConfig, shared: Preparations) -> None:
    mean = seconds(config, shared, 0)
    for first in (1, 3, 5):
        one, other = (seconds(config, shared, number) for number in (first, first + 1))
        off = np.abs(np.array(one) / mean - 1.0)
        assert (off > 1e-3).all(), "coefficients are drawn"
        left = np.abs(np.mean([one, other], axis=0) / mean - 1.0)
        assert (left < 0.1 * off).all(), "but for what the slower of GPU and host decides"
    doubtful = dataclasses.replace(FELT, covariance=[[0.002, 0.0], [0.0, 0.002]])
    trace = SpeedTrace((1.3,), 1.1, doubt=0.03, wander=0.03, sensitivity=doubtful)
    exact = slowed(config, shared, trace, 0)
    drawn = [slowed(config, shared, trace, number) for number in (1, 2)]
    off = np.abs(np.log(drawn[0]) - np.log(exact))
    assert (off > 0.01).all()
    left = np.abs(np.mean(np.log(drawn), axis=0) - np.log(exact))
    assert (left < 0.2 * off).all(), "start and exponents multiply"


def test_what_a_neighbour_costs_is_one_of_the_refits(config: SimulationConfig, shared: Preparations) -> None:
    known = fleet_of(refits=[[1.0, 0.2, 0.0], [1.0, 0.35, 0.0]])

    def cost(replication: int) -> float:
        alone, beside = (
            seconds(config, shared, replication, known=known, beside=others)[0] for others in (False, True)
        )
        return round((beside / alone - 1.0) / FELT.exponent(1.0), 6)

    assert cost(0) == pytest.approx(0.3)
    costs = [cost(number) for number in range(1, 13)]
    assert {*costs[::2]} == {0.2, 0.35}
    assert np.add(costs[::2], costs[1::2]) == pytest.approx(0.6), "and its reflection at the fit"


def test_a_neighbour_is_felt_with_the_calibrations_exponents(
    config: SimulationConfig, shared: Preparations
) -> None:
    alone, beside = (
        np.array([seconds(config, shared, 0, beside=others, batch=batch)[0] for batch in (ONE_ROW, PREFILL)])
        for others in (False, True)
    )
    one_row, prefill = beside / alone - 1.0
    assert one_row == pytest.approx(0.3 * FELT.exponent(1.0))
    assert prefill == pytest.approx(0.3 * FELT.exponent(alone[0] / alone[1]))


def test_recorded_scatter_is_played_unless_steps_are_to_have_no_noise(
    config: SimulationConfig, shared: Preparations
) -> None:
    known = fleet_of(scatter=StepScatter([1.5], [1.25]))
    plain, scattered = (seconds(config, shared, 0, known=one)[0] for one in (None, known))
    assert scattered == pytest.approx(1.5 * plain)
    calm = dataclasses.replace(config, uncertainty=UncertaintyConfig(step_noise=False))
    assert seconds(calm, shared, 0, known=known)[0] == pytest.approx(plain)


def test_the_calibrations_own_noise_is_not_put_on_top(config: SimulationConfig, shared: Preparations) -> None:
    lone = level_config(dataclasses.replace(config, users=1), 1, 6.0)
    assert lone.uncertainty.step_noise, "asked for, and left to the recorded scatter: here there is none"
    gaps = predict_once(lone, shared, fleet_of(), 0).gaps
    decode = gaps.gap_s[gaps.gap_s > 0]
    alike = np.abs(decode / np.median(decode) - 1.0) < 0.01
    assert len(decode) > 50 and alike.mean() > 0.95, "all but those that wait for a prompt"


def test_each_replication_has_a_recording_of_waits_of_its_own(
    config: SimulationConfig, shared: Preparations, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = [[1.0, 0.001 * number, 0.0, 0.0] for number in range(40)]
    known = dataclasses.replace(fleet_of(), waits=waits)
    level, window = level_config(config, 4, 6.0), Window(1.0, 6.0, True)
    run = predict_once(level, shared, known, 0)
    judged = [answered((run.requests, run.gaps), window)] * 2
    given: list[Any] = []

    def add_waits(frame: Any, waits: Any, rng: Any) -> Any:
        given.append(list(waits))
        return frame

    monkeypatch.setattr(predict, "add_waits", add_waits)
    predicted_summary(level, shared, known, window, 3, judged, [{}, {}])
    first, second, third = given[0::2]
    assert first == waits and second != waits and third not in (first, second)
    assert given[0::2] == given[1::2], "repeats of a replication share it"
    assert all(one in waits for one in second)
