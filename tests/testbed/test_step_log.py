"""The recorder's file, read back: a real server's log, hand-made ones, and damaged ones.

`data/recorded_steps.jsonl` is the log of one ersim-profile run: vLLM 0.32.0 on CPU, 75 million
weights in int8, closed loops and designed batches, prefix caching on.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ersim.errors import DataError
from ersim.types import Batch
from testbed.contention import ContendedStepTime, Contention, busy_share, fit_contention
from testbed.host_speed import SpeedTrace
from testbed.replay import replay
from testbed.step_log import LoggedStep, StepLog, StepRow, periods_s, read_step_log

RECORDED = Path(__file__).parent / "data" / "recorded_steps.jsonl"


def step(number: int, s0: float, u1: float, decode: int = 1, rows: tuple[StepRow, ...] = ()) -> LoggedStep:
    return LoggedStep(
        number, s0, s0 + 0.001, u1 - 0.001, u1, decode, 0, 1, decode, 10 * decode, 10,
        rows, (), (), decode, 1e-5,
    )  # fmt: skip


def test_a_recorded_server_replays_to_the_same_batches() -> None:
    log = read_step_log(RECORDED)
    result = replay(log)
    assert result.steps > 300
    assert result.share >= 0.99, result.first_difference


def test_a_wrong_scheduler_is_seen() -> None:
    log = read_step_log(RECORDED)
    small = StepLog({**log.meta, "max_num_batched_tokens": 128, "max_num_seqs": 2}, log.steps, log.requests)
    result = replay(small)
    assert result.share < 0.9 and result.first_difference is not None


def test_tokens_are_conserved_in_the_log() -> None:
    log = read_step_log(RECORDED)
    finished = [r for r in log.requests.values() if r.status == "FINISHED_LENGTH_CAPPED"]
    assert len(finished) > 20 and all(r.output_tokens == r.max_tokens for r in finished)
    assert sum(s.tokens_out for s in log.steps) >= sum(r.output_tokens or 0 for r in finished)
    short = 0
    for logged in log.steps:
        batch = logged.batch()
        assert batch.sampled_seqs >= logged.tokens_out
        short += batch.sampled_seqs > logged.tokens_out
        assert batch.tokens == batch.decode_seqs + sum(chunk for chunk, _ in batch.prefills)

    assert short <= 2, "only rows aborted while their step ran emit nothing"


def test_recording_costs_less_than_two_percent() -> None:
    assert 0 < read_step_log(RECORDED).record_overhead() < 0.02


def test_synchronous_periods_run_from_output_to_output_while_there_is_work() -> None:
    steps = [step(0, 1.0, 1.1), step(1, 1.102, 1.2), step(3, 2.0, 2.05)]
    np.testing.assert_allclose(periods_s(steps, False), [0.1, 0.1, 0.05])


def test_asynchronous_periods_do_not_double() -> None:
    steps = [step(0, 1.0, 1.101), step(1, 1.01, 1.201), step(2, 1.11, 1.301)]
    np.testing.assert_allclose(periods_s(steps, True)[1:], [0.1, 0.1], atol=1e-9)


def test_between_keeps_whole_steps_only() -> None:
    log = StepLog({"async_scheduling": False}, [step(0, 1.0, 1.1), step(1, 1.1, 1.2), step(2, 1.2, 1.3)], {})
    assert [s.number for s in log.between(1.05, 1.25).steps] == [1]


def test_a_cut_last_line_is_ignored_and_a_broken_one_is_named(tmp_path: Path) -> None:
    text = RECORDED.read_text()
    cut = tmp_path / "cut.jsonl"
    cut.write_text(text[:-20])
    assert len(read_step_log(cut).steps) >= len(read_step_log(RECORDED).steps) - 1
    broken = tmp_path / "broken.jsonl"
    broken.write_text(text.replace('["s"', '["s', 1))
    with pytest.raises(DataError, match=r"broken\.jsonl: line \d+ is not JSON"):
        read_step_log(broken)


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="recorder"):
        read_step_log(tmp_path / "absent.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="no line with the engine's constants"):
        read_step_log(empty)
    old = tmp_path / "old.jsonl"
    old.write_text(json.dumps(["m", {"format": 99}]) + "\n")
    with pytest.raises(DataError, match="format must be 1, got 99"):
        read_step_log(old)


def test_a_restarted_server_counts_anew(tmp_path: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    twice.write_text(RECORDED.read_text() * 2)
    assert len(read_step_log(twice).steps) == len(read_step_log(RECORDED).steps)


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


def test_busy_share_is_the_overlap_with_the_neighbours_steps() -> None:
    other = StepLog({"async_scheduling": False}, [step(0, 1.0, 1.5), step(5, 3.0, 4.0)], {})
    starts, ends = np.array([0.0, 1.25, 1.4, 2.0, 2.5]), np.array([0.9, 1.5, 1.6, 2.5, 3.5])
    np.testing.assert_allclose(busy_share(starts, ends, other), [0, 1, 0.5, 0, 0.5], atol=1e-9)


def test_contention_by_a_neighbour_is_recovered() -> None:
    """10 % base cost; while the neighbour runs 30 % more and 2 ms for each row."""
    mine, theirs, clock = [], [], 0.0
    for number in range(800):
        busy, rows = (number // 20) % 2 == 1, 1 + (number // 40) % 4
        length = (0.02 + 0.001 * rows) * (1.1 + 0.3 * busy) + 0.002 * rows * busy
        mine.append(step(number, clock, clock + length, decode=rows))
        if busy:
            theirs.append(step(number, clock, clock + length))
        clock += length
    meta = {"async_scheduling": False}
    log, other = StepLog(meta, mine, {}), StepLog(meta, theirs, {})
    found = fit_contention(log, Affine(), {"b": other})
    assert found.base == pytest.approx(1.1, abs=0.01)
    assert found.slowdowns["b"] == pytest.approx(0.3, abs=0.02)
    assert found.row_s == pytest.approx(0.002, rel=0.1)
    doubled = [dataclasses.replace(s, schedule_s=2 * s.schedule_s, updated_s=2 * s.updated_s) for s in mine]
    slow = np.full(len(mine), 2.0)
    same = fit_contention(StepLog(meta, doubled, {}), Affine(), {"b": StepLog(meta, [], {})}, slow)
    alone = fit_contention(log, Affine(), {"b": StepLog(meta, [], {})})
    assert same.base == pytest.approx(alone.base, rel=0.02), "a host at half its speed is no contention"


def test_too_few_steps_tell_no_contention() -> None:
    few = StepLog({"async_scheduling": False}, [step(0, 0.0, 0.1)], {})
    assert fit_contention(few, Affine(), {"b": few}) == Contention(slowdowns={"b": 0.0})


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
