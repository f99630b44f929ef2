"""The recorder's file, read back: a real server's log, hand-made ones, and damaged ones.

`data/recorded_steps.jsonl` is the log of one ersim-profile run: vLLM 0.32.0 on CPU, 75 million
weights in int8, closed loops and designed batches, prefix caching on.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ersim.engine import EngineConfig
from ersim.errors import DataError
from experiments.recorded_steps import from_steps
from testbed.access_log import read_access_log
from testbed.replay import replay
from testbed.step_log import LoggedStep, StepLog, StepRow, periods_s, read_step_log

RECORDED = Path(__file__).parent / "data" / "recorded_steps.jsonl"
META_LINE = RECORDED.read_text().splitlines()[0]


def step(number: int, s0: float, u1: float, decode: int = 1, rows: tuple[StepRow, ...] = ()) -> LoggedStep:
    return LoggedStep(
        number, s0, s0 + 0.001, u1 - 0.001, u1, decode, 0, 1, decode, 10 * decode, 10,
        rows, (), (), decode, 1e-5,
    )  # fmt: skip


def test_a_recorded_server_replays_to_the_same_batches() -> None:
    log = read_step_log(RECORDED)
    result = replay(log)
    assert result.steps > 300
    assert result.identical == result.steps, result.first_difference
    assert result.share == 1.0 and result.first_difference is None


def test_every_fact_that_the_recorder_wrote_is_compared() -> None:
    """One altered value in one recorded step, and that step differs by its name."""
    log = read_step_log(RECORDED)
    number = next(i for i, one in enumerate(log.steps) if one.rows and one.decode_seqs > 1 and one.hits)
    one = log.steps[number]
    row, hit = one.rows[0], one.hits[0]
    altered: dict[str, dict[str, Any]] = {
        "running": {"running": one.running + 1},
        "waiting": {"waiting": one.waiting + 1},
        "blocks used": {"blocks_used": one.blocks_used + 1},
        "decode rows": {"decode_seqs": one.decode_seqs + 1},
        "decode context": {"decode_context_tokens": one.decode_context_tokens + 1},
        "largest decode context": {"decode_context_max": one.decode_context_max - 1},
        "preempted": {"preempted": (0,)},
        "tokens out": {"tokens_out": one.tokens_out + 1},
        "prefix hits": {"hits": ((hit[0], hit[1] + 1), *one.hits[1:])},
        "other rows": {"rows": (dataclasses.replace(row, request=row.request + 1), *one.rows[1:])},
    }
    for name, values in altered.items():
        steps = [*log.steps]
        steps[number] = dataclasses.replace(one, **values)
        result = replay(StepLog(log.meta, steps, log.requests))
        assert (result.steps, result.identical) == (len(steps), len(steps) - 1), name
        assert result.first_difference is not None
        assert result.first_difference.startswith(f"step {one.number} at ")
        assert f"s: {name}: recorded " in result.first_difference


def test_the_same_lengths_in_another_order_are_another_step() -> None:
    """Two requests of one length change places: the sums are the same, the requests are not."""
    log = read_step_log(RECORDED)
    number, one = next((i, step) for i, step in enumerate(log.steps) if len(step.rows) == 1)
    other = next(
        r for r in log.requests.values()
        if r.index != one.rows[0].request and r.prompt_tokens == one.rows[0].prompt_tokens
    )  # fmt: skip
    steps = [*log.steps]
    steps[number] = dataclasses.replace(one, rows=(dataclasses.replace(one.rows[0], request=other.index),))
    result = replay(StepLog(log.meta, steps, log.requests))
    assert result.identical == result.steps - 1


def test_another_request_that_decodes_at_the_same_length_is_another_step() -> None:
    log = read_step_log(RECORDED)
    number, one = next((i, step) for i, step in enumerate(log.steps) if step.decode_seqs == 1)
    assert one.decoding is None, "this log is of a recorder that did not say"
    for decoding, same in (((0,), True), ((1,), False)):
        steps = [*log.steps]
        steps[number] = dataclasses.replace(one, decoding=decoding)
        result = replay(StepLog(log.meta, steps, log.requests))
        assert result.identical == result.steps - (not same)
        difference = "decoding: recorded [1], replayed [0]"
        assert same or (result.first_difference or "").endswith(difference)


def decode_line(number: int, rows: int, *changes: list[int]) -> list[Any]:
    begin = [
        "s",
        number,
        number,
        number,
        number + 0.5,
        number + 0.5,
        rows,
        0,
        1,
        rows,
        8 * rows,
        8 * (rows > 0),
    ]
    return [*begin, [], [], [], rows, 1e-5, None, None, None, None, None, None, *changes]


def test_who_decodes_is_told_by_who_joins_and_leaves(tmp_path: Path) -> None:
    """Of calls that ran nothing too, and anew for a server that was started again."""
    path = tmp_path / "joins.jsonl"
    calls = [
        decode_line(0, 2, [3, 1], []), decode_line(1, 2, [], []), decode_line(2, 0, [], [1, 3]),
        decode_line(3, 1, [3], []), json.loads(META_LINE), decode_line(0, 1, [7], []),
        decode_line(1, 2, [8, 9], [7]),
    ]  # fmt: skip
    path.write_text("\n".join([META_LINE, *map(json.dumps, calls[:4])]) + "\n")
    assert [one.decoding for one in read_step_log(path).steps] == [(1, 3), (1, 3), (3,)]
    path.write_text("\n".join([META_LINE, *map(json.dumps, calls)]) + "\n")
    assert [one.decoding for one in read_step_log(path).steps] == [(7,), (8, 9)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (([1], []), "says 2 decode rows, and who joins and leaves makes 1"),
        (([1, 2], [3]), "says 2 decode rows, and who joins and leaves makes 2"),
        (([1, 2],), "says who joins the decode rows, and not who leaves them"),
        (([1, -2], []), "decode rows that join must be a list of integers >= 0, got"),
    ],
)
def test_decode_rows_that_do_not_add_up_are_refused(
    tmp_path: Path, changes: tuple[list[int], ...], message: str
) -> None:
    path = tmp_path / "joins.jsonl"
    path.write_text(f"{META_LINE}\n{json.dumps(decode_line(0, 2, *changes))}\n")
    with pytest.raises(DataError, match=rf"joins\.jsonl: line 2 .*{message}.*; record it again"):
        read_step_log(path)


def test_an_empty_log_is_no_agreement() -> None:
    log = read_step_log(RECORDED)
    result = replay(StepLog(log.meta, [], {}))
    assert result.share is None and result.to_dict() == {
        "steps": 0, "identical": 0, "share": None,
        "first_difference": "the log holds no step: nothing was compared",
    }  # fmt: skip


def test_a_call_that_only_preempts_is_replayed_too(tmp_path: Path) -> None:
    """A prompt of three blocks where there are two: it loses them, and begins anew in the call after."""
    meta = dataclasses.asdict(
        EngineConfig(
            max_num_seqs=4, max_num_batched_tokens=4, max_model_len=64, block_size=4, num_blocks=3,
            enable_prefix_caching=False, scheduler_reserve_full_isl=False,
        )
    )  # fmt: skip
    running, waiting = [1, 0], [0, 1]
    first, second = [[0, 4, 0, 12, 12]], [[0, 4, 4, 12, 12]]
    calls = [
        [*running, 1, 0, 0, 0, first, [], [[0, 0]], 0],
        [*running, 2, 0, 0, 0, second, [], [], 0],
        [*waiting, 0, 0, 0, 0, [], [0], [], 0],
        [*running, 1, 0, 0, 0, first, [], [], 0],
    ]
    lines = [["m", {**meta, "format": 2, "vllm_version": "0.32.0"}], ["a", 0.5, 0, "x", 12, 4, 0, []]]
    lines += [["s", n, n + 1.0, n + 1.1, n + 1.8, n + 1.9, *call, 1e-5] for n, call in enumerate(calls)]
    path = tmp_path / "starved.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = read_step_log(path)
    assert [one.number for one in log.steps] == [0, 1, 3] and [one.number for one in log.emptied] == [2]
    assert replay(log).to_dict() == {"steps": 4, "identical": 4, "share": 1.0, "first_difference": None}


def test_a_wrong_scheduler_is_seen() -> None:
    log = read_step_log(RECORDED)
    small = StepLog({**log.meta, "max_num_batched_tokens": 128, "max_num_seqs": 2}, log.steps, log.requests)
    result = replay(small)
    assert result.share is not None and result.share < 0.9 and result.first_difference is not None


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


def test_a_line_cut_by_a_kill_is_forgiven_when_another_server_follows(tmp_path: Path) -> None:
    text = RECORDED.read_text()
    again = tmp_path / "again.jsonl"
    again.write_text(text[:-20] + "\n" + text)
    assert len(read_step_log(again).steps) == len(read_step_log(RECORDED).steps)
    again.write_text(text[:-20] + "\n" + text.split("\n", 1)[1])
    with pytest.raises(DataError, match=r"again\.jsonl: line \d+ is not JSON"):
        read_step_log(again)
    again.write_text(text + "no JSON\n")
    with pytest.raises(DataError, match=r"again\.jsonl: line \d+ is not JSON"):
        read_step_log(again)


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="recorder"):
        read_step_log(tmp_path / "absent.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="no line with the engine's constants"):
        read_step_log(empty)
    old = tmp_path / "old.jsonl"
    old.write_text(json.dumps(["m", {"format": 99}]) + "\n")
    with pytest.raises(DataError, match="format must be one of 1, 2, 3, 4, got 99"):
        read_step_log(old)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'["s",1,2]', "must have 16 to 24 values after 's', got 2"),
        (b'["a",1]', "must have 7 values after 'a', got 1"),
        (
            b'["f",1,2,"FINISHED_STOPPED",3,0,"ab"]',
            "block hashes must be a list of .*, got 'ab'",
        ),
        (b'["m",5]', "constants must be an object, got 5"),
        (b'["m",{"format":2}]', "lacks the engine's vllm_version"),
        (b'["m",{"format":[2]}]', r"format must be one of 1, 2, 3, 4, got \[2\]"),
        (b'["x",1]', "must begin with one of m, a, f, s, got 'x'"),
        (b"[[1],2]", r"must begin with one of m, a, f, s, got \[1\]"),
        (b'{"a": 1}', r"must be a JSON array, got \{'a': 1\}"),
        (b"[]", r"must be a JSON array, got \[\]"),
        (b'["s",0,1,1,2,2,1,0,1,0,0,0,[[0,5]],[],[],1,0.1]', r"other rows must be .*, got \[\[0, 5\]\]"),
        (b'["s",0,1,1,"2",2,1,0,1,1,8,8,[],[],[],1,0.1]', "u0 must be a finite number, got '2'"),
        (b'["s",0,1,1,NaN,2,1,0,1,1,8,8,[],[],[],1,0.1]', "u0 must be a finite number, got nan"),
        (b'["s",0,1,1,2,2,1,0,1,1,8,-8,[],[],[],1,0.1]', "largest decode context must be .*, got -8"),
        (b'["s",0,1,1,2,2,1,0,1,1,8,8,[],[],[],1,0.1,9,0]', "probe must be a number above 0 or null, got 0"),
        (
            b'["s",0,1,1,2,2,1,0,1,1,8,8,[],[],[],1,0.1,9,0.1,1.0]',
            r"stolen share must be a number from 0 to below 1 or null, got 1\.0",
        ),
        (
            b'["s",0,1,1,2,2,1,0,1,1,8,8,[],[],[],1,0.1,9,0.1,0.5,8,"1"]',
            "seconds waited must be a finite number or null, got '1'",
        ),
        (b'["a",1.0,true,"x",5,5,0,[]]', "index must be an integer >= 0, got True"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_damaged_line_is_named_with_the_remedy(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(META_LINE.encode() + b"\n" + line + b'\n["x"]\n')
    with pytest.raises(DataError, match=rf"damaged\.jsonl: line 2 .*{message}.*; record it again"):
        read_step_log(path)


def test_calibrating_with_a_damaged_log_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_text(f'{META_LINE}\n["s",1,2]\n')
    with pytest.raises(DataError, match=r"damaged\.jsonl: line 2 must have .*; record it again"):
        from_steps(path, "h100-80gb", "llama3.1-8b", "bf16", 1, 0)


ACCESS = {
    "id": "a", "received_s": 1.0, "routing_s": 0.1, "queued_s": 0.0, "submitted_s": None, "first_in_s": None,
    "first_out_s": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "b"}', "is no line of an access log: received_s is missing"),
        (json.dumps({**ACCESS, "id": 5}).encode(), "id must be a non-empty string, got 5"),
        (
            json.dumps({**ACCESS, "first_in_s": "1"}).encode(),
            "first_in_s must be .* or null, got '1'",
        ),
        (b"[1]", r"must be a JSON object, got \[1\]"),
        (b"5", "must be a JSON object, got 5"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"{", "is not JSON"),
    ],
)
def test_a_damaged_access_log_is_named_with_the_remedy(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "access.jsonl"
    good = json.dumps(ACCESS).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(DataError, match=rf"access\.jsonl: line 2 .*{message}.*; measure again"):
        read_access_log(path)


def test_an_access_log_may_end_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_text(json.dumps(ACCESS) + '\n{"id": "b", "rec')
    assert read_access_log(path) == {"a": ACCESS}
    with pytest.raises(DataError, match=r"absent\.jsonl: an access log cannot be read"):
        read_access_log(tmp_path / "absent.jsonl")


def test_a_restarted_server_counts_anew(tmp_path: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    twice.write_text(RECORDED.read_text() * 2)
    assert len(read_step_log(twice).steps) == len(read_step_log(RECORDED).steps)


def test_steps_within_several_spans_and_none_of_the_gap() -> None:
    log = read_step_log(RECORDED)
    starts = [step.schedule_s for step in log.steps]
    first, last = (starts[0], starts[40]), (starts[90], log.steps[-1].updated_s)
    kept = [step.number for step in log.within([first, last]).steps]
    both = [*log.between(*first).steps, *log.between(*last).steps]
    assert kept == [step.number for step in both] and len(kept) == len(log.steps) - 50
