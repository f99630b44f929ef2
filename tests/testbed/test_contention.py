"""What neighbours cost, what single steps do beyond it, and how sure either is."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from ersim.config import ExpertConfig, FleetConfig, SimulationConfig, WorkloadConfig
from ersim.prepare import Preparations
from ersim.types import Batch
from testbed.contention import (
    HAND_OUT_TOKENS,
    ContendedStepTime,
    Contention,
    busy_share,
    fit_contention,
    handed_out,
)
from testbed.core_time import stretch
from testbed.fleet_calibration import FleetCalibration
from testbed.front_end import FrontEnd
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
    """While the neighbour runs every step takes 30 % more; all that times `factors`."""
    mine, theirs, clock = [], [], 0.0
    for number in range(steps):
        busy, rows = (number // 20) % 2 == 1, 1 + (number // 40) % 4
        length = (0.02 + 0.001 * rows) * (1.0 + 0.3 * busy)
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
    assert found.slowdowns["b"] == pytest.approx(0.3, abs=0.01)
    slow = {"a": [at_half_speed(log)], "b": [at_half_speed(other)]}
    cleared = fit_contention("a", slow, Affine(), [np.full(800, 2.0)])
    assert cleared.slowdowns["b"] == pytest.approx(0.3, abs=0.01), "a host at half its speed is no neighbour"
    assert fit_contention("a", slow, Affine()).slowdowns["b"] > 0.5, "unless nobody knew"


def at_half_speed(log: StepLog) -> StepLog:
    steps = [
        dataclasses.replace(one, schedule_s=2 * one.schedule_s, updated_s=2 * one.updated_s)
        for one in log.steps
    ]
    return StepLog(log.meta, steps, {})


def test_an_expert_without_neighbours_has_scatter_only() -> None:
    log, _ = contended(800)
    found = fit_contention("a", {"a": [log]}, Affine())
    assert found.slowdowns == {} and found.base == 1.0
    assert len(found.scatter.decode) == 800 and all(refit == [1.0, 0.0] for refit in found.refits)


def test_what_gateway_and_front_end_add_is_kept_on_a_host_that_nobody_else_uses() -> None:
    log, other = contended(800, np.full(800, 1.06))
    found = fit_contention("a", {"a": [log], "b": [other]}, Affine(), steady=True)
    assert found.base == pytest.approx(1.06, abs=0.005)
    assert found.slowdowns["b"] == pytest.approx(0.3, abs=0.01)
    assert all(refit[0] == pytest.approx(1.06, abs=0.01) for refit in found.refits) and found.refits
    alone = fit_contention("a", {"a": [log]}, Affine(), steady=True)
    assert alone.slowdowns == {} and 1.06 < alone.base < 1.06 * 1.3


def test_a_neighbour_that_never_rests_leaves_the_steady_factor_in_doubt() -> None:
    log, _ = contended(800)
    found = fit_contention(
        "a", {"a": [log], "b": [log_of_one_step_until(log.steps[-1].updated_s)]}, Affine(), steady=True
    )
    bases = np.array([refit[0] for refit in found.refits])
    assert found.base < 1.05 and np.std(bases) > 0.02, "not laid to the gateway with certainty"
    both = [refit[0] * (1.0 + refit[1]) for refit in found.refits]
    assert np.std(both) < 0.5 * np.std(bases), "what both make together is known"


def log_of_one_step_until(end_s: float) -> StepLog:
    return StepLog(META, [step(0, 0.0, end_s)], {})


@pytest.mark.parametrize("steady", [True, False])
def test_a_round_of_stalls_only_is_no_error(steady: bool) -> None:
    log, other = contended(800)
    last_s = log.steps[-1].updated_s
    stalls = [step(800 + i, last_s + 2.0 * i, last_s + 2.0 * (i + 1)) for i in range(3)]
    logs = {"a": [StepLog(META, [*log.steps, *stalls], {})], "b": [other]}
    found = fit_contention("a", logs, Affine(), rounds_s=[0.0, last_s + 1e-6, last_s + 99.0], steady=steady)
    assert found.slowdowns["b"] == pytest.approx(0.3, abs=0.02)
    assert len(found.rounds) == 3 and found.rounds[1:] == [1.0, 1.0]


def test_steps_feel_a_neighbour_as_they_feel_the_host() -> None:
    """A neighbour of 0.3 is felt with exponents from 1.5, at one row, down; the fit is told so."""
    felt, one_row_s, mine, theirs, clock = Sensitivity(1.0, 0.5), 0.021, [], [], 0.0
    for number in range(800):
        busy, rows = (number // 20) % 2 == 1, 1 + 30 * ((number // 40) % 2)
        alone = 0.02 + 0.001 * rows
        length = alone * (1.0 + 0.3 * busy * (1.0 + 0.5 * one_row_s / alone))
        mine.append(step(number, clock, clock + length, decode=rows))
        if busy:
            theirs.append(step(number, clock, clock + length))
        clock += length
    logs = {"a": [StepLog(META, mine, {})], "b": [StepLog(META, theirs, {})]}
    found = fit_contention("a", logs, Affine(), sensitivity=felt)
    assert found.slowdowns["b"] == pytest.approx(0.3, abs=0.005)
    assert fit_contention("a", logs, Affine()).slowdowns["b"] > 0.33


def test_what_the_host_did_in_a_round_is_not_the_neighbour() -> None:
    factors = np.repeat([0.94, 1.07, 1.05, 0.96], 400)
    log, other = contended(1600, factors)
    starts = [log.steps[first].schedule_s for first in (0, 400, 800, 1200)]
    found = fit_contention("a", {"a": [log], "b": [other]}, Affine(), rounds_s=starts)
    assert found.slowdowns["b"] == pytest.approx(0.3, abs=0.02)
    assert np.std(found.scatter.decode) < 0.03, "nor is it scatter of single steps"
    warm = np.full(1600, 1.08)
    log, other = contended(1600, warm)
    whole = fit_contention("a", {"a": [log], "b": [other]}, Affine())
    assert whole.slowdowns["b"] == pytest.approx(0.3, abs=0.05), "a host 8 % slower in all rounds alike"


def test_too_few_steps_tell_no_contention() -> None:
    few = StepLog(META, [step(0, 0.0, 0.1)], {})
    other = StepLog(META, [step(0, 0.0, 0.1)], {})
    none = Contention(slowdowns={"b": 0.0}, hand_out_tokens=HAND_OUT_TOKENS)
    assert fit_contention("a", {"a": [few], "b": [other]}, Affine()) == none


def scheduled(own: int, neighbour: int, seconds: float = 60.0) -> dict[str, list[StepLog]]:
    """Replicas that run in every second whose number has their own bit, the slower the more of them do.

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
                factor = 1.0 + 0.2 * siblings + 0.3 * around if name == "a" else 1.0
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
    slowdowns, spreads = [], []
    for _ in range(12):
        factors = np.repeat(np.exp(rng.normal(0.0, 0.15, 40)), 50)
        found = fit_contention(*_one(contended(2000, factors)), seed=1)
        slowdowns.append(found.slowdowns["b"])
        spreads.append(np.std([refit[1] for refit in found.refits]))
    assert 0.5 < np.mean(spreads) / np.std(slowdowns) < 2.5


def test_refits_know_that_rounds_have_moods() -> None:
    """Four rounds of 15 s with moods of 5 %: other rounds' fits scatter as the refits of one of them do."""
    rng = np.random.default_rng(5)
    slowdowns, spreads = [], []
    for _ in range(12):
        moods = np.repeat(np.exp(rng.normal(0.0, 0.05, 4)), 500) * np.repeat(
            np.exp(rng.normal(0.0, 0.07, 20)), 100
        )
        log, other = contended(2000, moods)
        starts = [log.steps[first].schedule_s for first in (0, 500, 1000, 1500)]
        found = fit_contention("a", {"a": [log], "b": [other]}, Affine(), rounds_s=starts)
        slowdowns.append(found.slowdowns["b"])
        spreads.append(np.std([refit[1] for refit in found.refits]))
    assert 0.6 < np.mean(spreads) / np.std(slowdowns) < 2.0


def test_a_rounds_mood_is_not_told_from_a_neighbour_that_ran_through_it() -> None:
    rng = np.random.default_rng(6)
    slowdowns, spreads = [], []
    for _ in range(24):
        moods, mine, theirs, clock = np.exp(rng.normal(0.0, 0.05, 6)), [], [], 0.0
        for number in range(1200):
            turn = number // 200
            length = 0.021 * (1.0 + 0.3 * (turn % 2)) * moods[turn]
            mine.append(step(number, clock, clock + length))
            if turn % 2:
                theirs.append(step(number, clock, clock + length))
            clock += length
        starts = [mine[first].schedule_s for first in range(0, 1200, 200)]
        logs = {"a": [StepLog(META, mine, {})], "b": [StepLog(META, theirs, {})]}
        found = fit_contention("a", logs, Affine(), rounds_s=starts)
        slowdowns.append(found.slowdowns["b"])
        spreads.append(np.std([refit[1] for refit in found.refits]))
    assert np.mean(slowdowns) == pytest.approx(0.3, abs=0.03)
    assert 0.5 < np.mean(spreads) / np.std(slowdowns) < 2.0


def test_a_draw_is_one_of_the_refits() -> None:
    rng = np.random.default_rng(3)
    factors = np.repeat(np.exp(rng.normal(0.0, 0.15, 40)), 50)
    found = fit_contention(*_one(contended(2000, factors)), seed=1)
    drawn = {found.drawn(np.random.default_rng(seed)).slowdowns["b"] for seed in range(20)}
    assert len(drawn) > 5 and found.drawn(rng).scatter is found.scatter


@pytest.mark.parametrize(
    ("refit", "reflected"),
    [
        ([1.03, 0.2, 1.5e-4], [1.01, 0.4, 0.5e-4]),
        ([1.03, 0.2, 3e-4], [1.015, 0.35, 0.0]),  # half of it
        ([1.06, 0.1, 1e-4], [1.0, 0.4, 1e-4]),  # half of it, too
        ([1.0, 0.2, 1e-4], [1.04, 0.4, 1e-4]),
    ],
)
def test_a_refit_is_reflected_as_far_as_all_of_it_may_be(refit: list[float], reflected: list[float]) -> None:
    fit = Contention(slowdowns={"b": 0.3}, token_wait_s=1e-4, base=1.02, refits=[refit])
    one, other = (fit.drawn(np.random.default_rng(0), mirrored) for mirrored in (False, True))
    assert [one.base, one.slowdowns["b"], one.token_wait_s] == pytest.approx(refit)
    assert [other.base, other.slowdowns["b"], other.token_wait_s] == pytest.approx(reflected)


def test_the_reflected_scatter_is_the_other_half_of_the_recording() -> None:
    factors = [1.0 + 0.01 * number for number in range(20)]
    one, other = (
        StepScatter(decode=factors).player(np.random.default_rng(0), half_on).decode_factors(10)
        for half_on in (False, True)
    )
    assert sorted([*one, *other]) == factors


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
    contention = Contention({"b": 0.3})
    contended = ContendedStepTime(Steady(), contention, ["b"], SpeedTrace((1.0, 2.0)))
    contended.watch([[neighbour]], lambda: now[0])
    batch = Batch(2, 2, 20, 10, (), 2)
    assert contended.step_s(batch) == pytest.approx(0.020)
    neighbour.running = 3
    assert contended.step_s(batch) == pytest.approx(0.026)
    np.testing.assert_allclose(contended.decode_run_s(2, 20, 10, 3), [0.026] * 3)
    now[0] = 7.0
    assert contended.step_s(batch) == pytest.approx(0.052), "the host's slowness lasts"
    reading = SpeedTrace((2.0,), 1.5, sensitivity=Sensitivity(1.0, 0.5))
    felt = ContendedStepTime(Steady(), contention, ["b"], reading, sensitivity=Sensitivity(1.0, 0.5))
    felt.watch([[neighbour]], lambda: 0.0)
    slowed = 0.02 * (1.0 + 1.25 * 0.3) * 3.0**1.25
    assert felt.step_s(batch) == pytest.approx(slowed), "half of it reads weights"
    np.testing.assert_allclose(felt.decode_run_s(2, 20, 10, 3), [felt.step_s(batch)] * 3)
    player = StepScatter(decode=[1.5]).player(np.random.default_rng(0))
    siblings = ContendedStepTime(Steady(), Contention({"a": 0.5}), ["a"], own="a")
    siblings.watch([[neighbour, neighbour, neighbour]], lambda: 0.0)
    assert siblings.step_s(batch) == pytest.approx(0.02 * (1 + 2 * 0.5)), "two run beside the one that steps"
    scattered = ContendedStepTime(Steady(), contention, ["b"], None, player)
    assert scattered.step_s(batch) == pytest.approx(1.5 * 0.020)
    np.testing.assert_allclose(scattered.decode_run_s(2, 20, 10, 2), [1.5 * 0.020] * 2)


TOKEN_WAIT_S = 3e-4
OWN = FrontEnd(0.1)


def sharing_the_core(
    steps: int, disturbed: range = range(0), slowdown: float = 0.0, robbed: range = range(0)
) -> tuple[StepLog, StepLog]:
    """Two experts of which the first waits `TOKEN_WAIT_S` for each token that both hand out while both run.

    The other hands out two tokens in each step, which is as long. Every step computes for ten elevenths of
    the time alone, its front end takes the rest. disturbed: steps in which something else takes 30 ms more;
    robbed: those that the hypervisor takes 60 ms from.
    """
    mine, theirs, clock, cpu_s, waited_s = [], [], 0.0, 0.0, 0.0
    for number in range(steps):
        busy, rows = (number // 20) % 2 == 1, 1 + (number // 40) % 4
        own_s = (0.02 + 0.001 * rows) / 1.1 * (1.0 + slowdown * busy)
        traffic = (rows + 2 + HAND_OUT_TOKENS) * busy
        waits_s = 0.1 * own_s + TOKEN_WAIT_S * traffic + 0.03 * (number in disturbed)
        length, began, queued = own_s + waits_s + 0.06 * (number in robbed), cpu_s, waited_s
        cpu_s, waited_s = cpu_s + own_s, waited_s + waits_s
        plain = step(number, clock, clock + length, decode=rows)
        counts = {"cpu_s": cpu_s, "cpu_start_s": began, "waited_s": waited_s, "waited_start_s": queued}
        mine.append(dataclasses.replace(plain, **counts))
        if busy:
            theirs.append(step(number, clock, clock + length, decode=2))
        clock += length
    return StepLog({**META, "one_thread": True}, mine, {}), StepLog(META, theirs, {})


def test_waits_for_the_core_are_told_from_what_the_neighbour_slows() -> None:
    log, other = sharing_the_core(1600, slowdown=0.02)
    found = fit_contention("a", {"a": [log], "b": [other]}, Affine(), own=OWN)
    assert found.token_wait_s == pytest.approx(TOKEN_WAIT_S, rel=0.01)
    assert found.slowdowns["b"] == pytest.approx(0.02, abs=0.005)
    assert [refit[2] for refit in found.refits] == pytest.approx([TOKEN_WAIT_S] * 40, rel=0.02)
    assert np.std([refit[1] for refit in found.refits]) > 0.003, "held to what is usual, with its doubt"
    half = [np.full(1600, 2.0)]
    slowed = fit_contention("a", {"a": [at_half_speed(log)], "b": [at_half_speed(other)]}, Affine(), half)
    assert slowed.token_wait_s == 0.0, "nobody said what the front end takes"
    assert slowed.slowdowns["b"] > 0.05, "so it is the neighbour's, and not held to anything"


def test_a_disturbed_part_of_the_common_load_is_no_traffic() -> None:
    log, other = sharing_the_core(2400, disturbed=range(100, 500))
    found = fit_contention("a", {"a": [log], "b": [other]}, Affine(), own=OWN)
    assert found.token_wait_s == pytest.approx(TOKEN_WAIT_S, rel=0.1)


def test_steps_that_the_hypervisor_took_cores_from_are_not_replayed() -> None:
    """Every third of six hundred steps lost 60 ms, which could be taken off their mean only."""
    log, other = sharing_the_core(2400, robbed=range(400, 1000, 3))
    slow = [stretch(log)]
    assert max(slow[0]) > 1.5
    found = fit_contention("a", {"a": [log], "b": [other]}, Affine(), slow, own=OWN)
    assert len(found.scatter.decode) == pytest.approx(1800, abs=60), "half a second on either side as well"
    assert max(found.scatter.decode) < 1.2
    assert found.token_wait_s == pytest.approx(TOKEN_WAIT_S, rel=0.02)


def test_tokens_are_spread_over_the_steps_that_hand_them_out() -> None:
    other = StepLog(META, [step(0, 1.0, 1.5, decode=4), step(5, 3.0, 4.0, decode=2)], {})
    starts, ends = np.array([0.0, 1.25, 1.4, 2.0, 2.5]), np.array([0.9, 1.5, 1.6, 2.5, 3.5])
    np.testing.assert_allclose(handed_out(starts, ends, other), [0, 2, 0.8, 0, 1], atol=1e-9)
    np.testing.assert_array_equal(handed_out(starts, ends, StepLog(META, [], {})), np.zeros(5))
    silent = dataclasses.replace(step(6, 4.0, 5.0), tokens_out=0)
    other = StepLog(META, [*other.steps, silent], {})
    each = handed_out(np.array([1.0, 2.0, 3.5]), np.array([1.5, 5.0, 4.5]), other, each=3.0)
    np.testing.assert_allclose(each, [7, 5, 2.5], atol=1e-9, err_msg="what hands out nothing counts nothing")


def test_contended_steps_wait_for_the_tokens_of_both() -> None:
    class Neighbour:
        waiting, kv_used_fraction, healthy = 0, 0.0, True

        def __init__(self, running: int) -> None:
            self.running = running

    neighbour, now = Neighbour(0), [0.0]
    known = Contention(token_wait_s=1e-3)
    contended = ContendedStepTime(Affine(), known, ["b"], SpeedTrace((2.0,)))
    other = ContendedStepTime(Steady(), Contention(), ["a"])
    with pytest.raises(ValueError, match="theirs must be 1 step times, got 0"):
        contended.watch([[neighbour]], lambda: now[0])
    contended.watch([[neighbour]], lambda: now[0], [other])
    batch = Batch(4, 4, 40, 10, (), 4)
    assert contended.step_s(batch) == pytest.approx(2 * 0.024), "gateway and client have the other core"
    neighbour.running = 3
    other.step_s(Batch(3, 3, 30, 10, (), 3))
    traffic = 4 + 3 * 0.024 / 0.030
    assert contended.step_s(batch) == pytest.approx(2 * (0.024 + 1e-3 * traffic))
    other.step_s(Batch(102, 2, 20, 10, ((100, 0),), 2))  # of a long prompt, which hands out nothing yet
    traffic = 4 + 2 * 0.024 / 0.020
    assert contended.step_s(batch) == pytest.approx(2 * (0.024 + 1e-3 * traffic))
    talkative = ContendedStepTime(Steady(), Contention(hand_out_tokens=2.5), ["a"])
    contended.watch([[neighbour]], lambda: now[0], [talkative])
    for rows, handed in ((3, 3 + 2.5), (0, 0)):
        talkative.step_s(Batch(100 + rows, 3, 30, 10, ((97 + rows, 0),), rows))
        assert talkative.handed_per_s == pytest.approx(handed / 0.030)
        traffic = 4 + handed * 0.024 / 0.030
        assert contended.step_s(batch) == pytest.approx(2 * (0.024 + 1e-3 * traffic))
    plain = ContendedStepTime(Steady(), known, ["b"])
    plain.watch([[neighbour]], lambda: now[0], [other])
    np.testing.assert_allclose(plain.decode_run_s(4, 40, 10, 2), [plain.step_s(batch)] * 2)
    siblings = ContendedStepTime(Affine(), known, ["a"], own="a")
    siblings.watch([[Neighbour(9), Neighbour(2), Neighbour(0)]], lambda: now[0], [siblings])
    siblings.step_s(Batch(6, 6, 60, 10, (), 6))
    traffic = 6 * 0.024 / 0.026 + 4 / 2
    assert siblings.step_s(batch) == pytest.approx(0.024 + 1e-3 * traffic), "one of two others runs"
