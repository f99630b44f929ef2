"""What neighbours cost, what single steps do beyond it, and how sure either is."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from ersim.config import ExpertConfig, FleetConfig, SimulationConfig, WorkloadConfig
from ersim.prepare import Preparations
from ersim.types import Batch
from testbed.contention import ContendedStepTime, Contention, busy_share, fit_contention
from testbed.fleet_calibration import FleetCalibration
from testbed.host_speed import SpeedTrace
from testbed.live_run import level_config
from testbed.predict import predict_once
from testbed.sensitivity import Sensitivity
from testbed.step_log import LoggedStep, StepLog, StepRow
from testbed.step_scatter import LARGEST, StepScatter, measure_scatter

META = {"async_scheduling": False}


def step(number: int, s0: float, u1: float, decode: int = 1, rows: tuple[StepRow, ...] = ()) -> LoggedStep:
    return LoggedStep(
        number, s0, s0 + 0.001, u1 - 0.001, u1, decode, 0, 1, decode, 10 * decode, 10,
        rows, (), (), decode, 1e-5,
    )  # fmt: skip


class Steady:
    """A step time of 10 ms a row."""

    def step_s(self, batch: Batch) -> float:
        return 0.01 * batch.decode_seqs

    def decode_run_s(self, decode_seqs: int, context_tokens: int, context_max: int, steps: int) -> np.ndarray:
        return np.full(steps, 0.01 * decode_seqs)


class Affine(Steady):
    """20 ms and 1 ms a row: a factor on it and a cost per row can be told apart."""

    def step_s(self, batch: Batch) -> float:
        return 0.02 + 0.001 * batch.decode_seqs


def contended(steps: int, factors: np.ndarray | None = None) -> tuple[StepLog, StepLog]:
    """10 % base cost; while the neighbour runs 30 % more and 2 ms for each row; all that times `factors`."""
    mine, theirs, clock = [], [], 0.0
    for number in range(steps):
        busy, rows = (number // 20) % 2 == 1, 1 + (number // 40) % 4
        length = (0.02 + 0.001 * rows) * (1.1 + 0.3 * busy) + 0.002 * rows * busy
        length *= 1.0 if factors is None else float(factors[number])
        mine.append(step(number, clock, clock + length, decode=rows))
        if busy:
            theirs.append(step(number, clock, clock + length))
        clock += length
    return StepLog(META, mine, {}), StepLog(META, theirs, {})


def test_busy_share_is_the_overlap_with_the_neighbours_steps() -> None:
    other = StepLog(META, [step(0, 1.0, 1.5), step(5, 3.0, 4.0)], {})
    starts, ends = np.array([0.0, 1.25, 1.4, 2.0, 2.5]), np.array([0.9, 1.5, 1.6, 2.5, 3.5])
    np.testing.assert_allclose(busy_share(starts, ends, other), [0, 1, 0.5, 0, 0.5], atol=1e-9)


def test_contention_by_a_neighbour_is_recovered() -> None:
    log, other = contended(800)
    found = fit_contention("a", {"a": [log], "b": [other]}, Affine())
    assert found.base == pytest.approx(1.1, abs=0.01)
    assert found.slowdowns["b"] == pytest.approx(0.3, abs=0.02)
    assert found.row_s == pytest.approx(0.002, rel=0.1)
    alone = StepLog(META, [], {})
    doubled = [
        dataclasses.replace(s, schedule_s=2 * s.schedule_s, updated_s=2 * s.updated_s) for s in log.steps
    ]
    slowed = {"a": [StepLog(META, doubled, {})], "b": [alone]}
    same = fit_contention("a", slowed, Affine(), [np.full(800, 2.0)])
    plain = fit_contention("a", {"a": [log], "b": [alone]}, Affine())
    assert same.base == pytest.approx(plain.base, rel=0.02), "a host at half its speed is no contention"


def test_too_few_steps_tell_no_contention() -> None:
    few = StepLog(META, [step(0, 0.0, 0.1)], {})
    other = StepLog(META, [step(0, 0.0, 0.1)], {})
    assert fit_contention("a", {"a": [few], "b": [other]}, Affine()) == Contention(slowdowns={"b": 0.0})


def scheduled(own: int, neighbour: int, seconds: float = 60.0) -> dict[str, list[StepLog]]:
    """Replicas that run in every second whose number has their own bit; 1.1, and more for each that runs.

    Each step takes 0.2 more of the time alone while the sibling runs, and 0.3 for each neighbour.
    """

    def runs(bit: int, now_s: float) -> bool:
        return bool(int(now_s) >> bit & 1)

    bits = {"a": list(range(own)), "b": list(range(own, own + neighbour))}
    logs: dict[str, list[StepLog]] = {}
    for name, its in bits.items():
        logs[name] = []
        for bit in its:
            steps, clock = [], 0.0
            while clock < seconds:
                siblings = sum(runs(other, clock) for other in bits["a"] if other != bit)
                around = sum(runs(other, clock) for other in bits["b"])
                factor = 1.1 + 0.2 * siblings + 0.3 * around if name == "a" else 1.0
                rows = 1 + int(20 * clock) % 4
                length = (0.02 + 0.001 * rows) * factor
                if runs(bit, clock):
                    steps.append(step(2 * len(steps), clock, clock + length, decode=rows))
                clock += length
            logs[name].append(StepLog(META, steps, {}))
    return logs


def test_all_replicas_tell_what_siblings_and_each_neighbour_cost() -> None:
    logs = scheduled(own=2, neighbour=2)
    found = fit_contention("a", logs, Affine())
    assert list(found.slowdowns) == ["b", "a"]
    assert found.base == pytest.approx(1.1, abs=0.02)
    assert found.slowdowns["a"] == pytest.approx(0.2, abs=0.03)
    assert found.slowdowns["b"] == pytest.approx(0.3, abs=0.03), "each of two counts for itself"
    assert len(found.scatter.decode) == sum(len(log.steps) for log in logs["a"])


def test_a_replica_with_few_steps_does_not_hide_what_the_other_shows() -> None:
    logs = scheduled(own=2, neighbour=1)
    first, second = logs["a"]
    few = StepLog(META, first.steps[:10], {})
    found = fit_contention("a", {"a": [few, second], "b": logs["b"]}, Affine())
    assert found.slowdowns["b"] == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("replicas", "slower"), [(1, 1.0), (2, 1.5)])
def test_simulated_siblings_slow_each_other(replicas: int, slower: float) -> None:
    """Two users, one on each replica, always busy: every step takes what the sibling adds."""
    fleet = FleetConfig("f", experts={"a": ExpertConfig(replicas=replicas)})
    workload = WorkloadConfig(think_s=0.0)
    config = level_config(SimulationConfig(users=2, fleet=fleet, workload=workload), 2, 20.0)
    shared = Preparations()
    found = []
    for contention in (Contention(), Contention(slowdowns={"a": 0.5})):
        output = predict_once(config, shared, FleetCalibration("f", {}, {"a": contention}, {}), 0)
        frame = output.requests[output.requests["output_tokens"] > 20]
        took = frame["last_token_s"] - frame["first_token_s"]
        found.append(float(np.median(took / (frame["output_tokens"] - 1))))
    assert found[1] / found[0] == pytest.approx(slower, rel=0.05)


def test_refits_are_as_unsure_as_disturbed_moments_make_the_fit() -> None:
    """Disturbances of 50 steps: fits to other disturbances scatter as the refits of one of them do."""
    rng = np.random.default_rng(3)
    bases, spreads = [], []
    for _ in range(12):
        factors = np.repeat(np.exp(rng.normal(0.0, 0.15, 40)), 50)
        found = fit_contention(*_one(contended(2000, factors)), seed=1)
        bases.append(found.base)
        spreads.append(np.std([refit[0] for refit in found.refits]))
    assert 0.5 < np.mean(spreads) / np.std(bases) < 2.0
    drawn = {found.drawn(np.random.default_rng(seed)).base for seed in range(20)}
    assert len(drawn) > 5 and found.drawn(rng).scatter is found.scatter


def _one(logs: tuple[StepLog, StepLog]) -> tuple[str, dict[str, list[StepLog]], Affine]:
    return "a", {"a": [logs[0]], "b": [logs[1]]}, Affine()


def test_scatter_is_replayed_in_its_order_with_mean_one() -> None:
    factors = np.repeat([0.9, 1.1], 100)
    batches = [Batch(1, 1, 10, 10, (), 1)] * 200
    modelled = np.full(200, 0.02)
    scatter = measure_scatter(0.02 * factors, modelled, batches, np.ones(200, bool))
    assert scatter.prefill == [] and np.mean(scatter.decode) == pytest.approx(1.0, abs=1e-3)
    player = scatter.player(np.random.default_rng(0))
    played = [player.factor(batches[0]) for _ in range(200)]
    assert sorted(played) == sorted(scatter.decode)
    assert sum(a != b for a, b in itertools.pairwise(played)) <= 2, "disturbances stay together"
    prompt = Batch(8, 0, 0, 0, ((8, 0),), 1)
    assert player.factor(prompt) == 1.0, "nothing recorded, nothing added"
    again = scatter.player(np.random.default_rng(0))
    assert again.decode_factors(200).tolist() == played


def test_stalls_are_scatter_but_not_part_of_the_fit() -> None:
    measured = np.full(100, 0.02)
    measured[7] = 1.0
    fitted = measured < 0.5
    scatter = measure_scatter(measured, np.full(100, 0.02), [Batch(1, 1, 10, 10, (), 1)] * 100, fitted)
    assert max(scatter.decode) == LARGEST and scatter.decode.count(1.0) == 99


def test_contended_steps_cost_more_only_while_the_neighbour_runs() -> None:
    class Neighbour:
        running, waiting, kv_used_fraction, healthy = 0, 0, 0.0, True

    neighbour, now = Neighbour(), [0.0]
    contention = Contention(1.1, {"b": 0.3}, row_s=0.001, request_s=0.005)
    contended = ContendedStepTime(Steady(), contention, ["b"], SpeedTrace((1.0, 2.0)))
    contended.watch([[neighbour]], lambda: now[0])
    batch = Batch(2, 2, 20, 10, (), 2)
    assert contended.step_s(batch) == pytest.approx(0.022)
    neighbour.running = 3
    assert contended.step_s(batch) == pytest.approx(0.028 + 0.002)
    assert contended.step_s(Batch(9, 2, 20, 10, [(7, 0)], 3)) == pytest.approx(0.028 + 0.003 + 0.005)
    np.testing.assert_allclose(contended.decode_run_s(2, 20, 10, 3), [0.030] * 3)
    now[0] = 7.0
    assert contended.step_s(batch) == pytest.approx(0.060), "the host's slowness lasts"
    reading = SpeedTrace((2.0,), 1.5, sensitivity=Sensitivity(1.0, 0.5))
    felt = ContendedStepTime(Steady(), contention, ["b"], reading)
    felt.watch([[neighbour]], lambda: 0.0)
    neighbour.running = 0
    assert felt.step_s(batch) == pytest.approx(0.022 * 1.5 * 2.0**1.25), "half of it reads weights"
    np.testing.assert_allclose(felt.decode_run_s(2, 20, 10, 3), [felt.step_s(batch)] * 3)
    neighbour.running = 3
    player = StepScatter(decode=[1.5]).player(np.random.default_rng(0))
    siblings = ContendedStepTime(Steady(), Contention(1.0, {"a": 0.5}), ["a"], own="a")
    siblings.watch([[neighbour, neighbour, neighbour]], lambda: 0.0)
    assert siblings.step_s(batch) == pytest.approx(0.02 * (1 + 2 * 0.5)), "two run beside the one that steps"
    scattered = ContendedStepTime(Steady(), contention, ["b"], None, player)
    assert scattered.step_s(batch) == pytest.approx(1.5 * 0.022)
    np.testing.assert_allclose(scattered.decode_run_s(2, 20, 10, 2), [1.5 * 0.022] * 2)
