"""The recorder on vLLM's own scheduler, starved and overlapped: what it writes replays step by step.

No server and no model: outputs are scripted (`testbed.oracle`). Servers of the other tests rarely preempt.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.oracle.cases import THEMES, make_case
from testbed.oracle.sides import ErsimSide, compare
from testbed.replay import replay
from testbed.step_log import read_step_log

pytest.importorskip("vllm", reason="needs the real vLLM: make test-live")
pytestmark = pytest.mark.live

SEEDS = range(9_000_000, 9_000_016)


def test_recording_costs_under_2_percent_of_a_step_of_the_experts_here() -> None:
    """All of it: requests that come and go, both calls of a step, the thread that writes."""
    from testbed.recorder_bench import bench

    few, many = bench(rows=1, steps=300), bench(rows=12, steps=300)
    for found in (few, many):
        assert 0.0 < found["told_us"] < found["recorder_us"] < found["scheduler_us"]
    assert few["step_ms_at_2_percent"] < 14.0, "what steps of one row take here, in milliseconds"
    assert many["step_ms_at_2_percent"] < 20.0, "and of twelve"
    assert many["bytes"] < 3 * few["bytes"], "rows that only go on decoding are not written"


def test_recorded_schedulers_replay_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched import async_scheduler, scheduler

    from testbed import recording_scheduler
    from testbed.oracle.vllm_side import Vllm, VllmSide

    monkeypatch.setattr(scheduler, "Scheduler", recording_scheduler.RecordingScheduler)
    monkeypatch.setattr(async_scheduler, "AsyncScheduler", recording_scheduler.RecordingAsyncScheduler)
    vllm, logs = Vllm(), []
    for case in [make_case(seed, theme) for theme in sorted(THEMES) for seed in SEEDS]:
        path = tmp_path / f"{case.theme}{case.seed}.jsonl"
        monkeypatch.setenv("ERSIM_STEP_LOG", str(path))
        side = VllmSide(vllm, case.config)
        compare(case, ErsimSide(case.config), side)
        side.scheduler._log.close()
        logs.append(read_step_log(path))
        result = replay(logs[-1])
        assert result.identical == result.steps, f"{case.seed} {case.theme}: {result.first_difference}"
    steps = [step for log in logs for step in log.steps]
    assert (
        sum(len(step.preempted) for step in steps) > 1000 and sum(step.waiting > 0 for step in steps) > 10_000
    )
    assert sum(len(log.emptied) for log in logs) > 10, "calls that ran nothing, since they preempted who ran"
    assert all(step.decoding is not None and len(step.decoding) == step.decode_seqs for step in steps)
    assert {log.meta["async_scheduling"] for log in logs} == {True, False}
