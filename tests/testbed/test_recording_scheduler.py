"""The recorder's speed probe, what it writes of a step, and of engines that lack some settings."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ersim.engine import EngineConfig
from testbed.core_time import undisturbed_s
from testbed.probe_works import WITH_PRODUCT, WITHOUT_PRODUCT
from testbed.replay import recorded_config
from testbed.step_log import StepLog, read_step_log


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recorder's module on top of stand-ins for the two schedulers of vLLM."""
    for name, scheduler in (("async_scheduler", "AsyncScheduler"), ("scheduler", "Scheduler")):
        module = types.ModuleType(f"vllm.v1.core.sched.{name}")
        setattr(module, scheduler, type(scheduler, (), {}))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    torch = types.ModuleType("torch")
    used: list[Any] = []

    def product(rows: Any, weights: Any) -> Any:
        used.append((rows, weights))
        return rows @ weights

    stand_ins = {"mm": product, "ones": np.ones, "full": np.full, "bfloat16": np.float16, "used": used}
    for name, stand_in in stand_ins.items():
        setattr(torch, name, stand_in)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delitem(sys.modules, "testbed.recording_scheduler", raising=False)
    yield importlib.import_module("testbed.recording_scheduler")
    sys.modules.pop("testbed.recording_scheduler", None)


def clock(wall_s: list[float], cpu_s: list[float]) -> types.SimpleNamespace:
    """A `time` whose readings come in this order."""
    wall, cpu = iter(wall_s), iter(cpu_s)
    return types.SimpleNamespace(monotonic=lambda: next(wall), thread_time=lambda: next(cpu))


def test_the_probe_tells_its_time_at_most_every_20_ms(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its thread had the core, whoever took that meanwhile."""
    times = clock([10.0, 10.009, 10.028, 10.0295, 10.0297], [5.0, 5.0002, 5.1, 5.1001])
    monkeypatch.setattr(recorder, "time", times)
    probe = recorder.SpeedProbe()
    assert probe() == pytest.approx(0.0002)
    assert probe() is None, "19 ms after the last"
    assert probe() == pytest.approx(0.0001)


def test_the_probe_takes_no_more_of_the_time_than_it_may(
    recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that is slow at its work is asked less often: 2 ms, of 200."""
    times = clock(
        [10.0, 10.002, 10.201, 10.203, 10.204, 10.253, 10.255, 10.256], [1, 1.002, 2, 2.0005, 3, 3.0005]
    )
    monkeypatch.setattr(recorder, "time", times)
    probe = recorder.SpeedProbe()
    assert probe() == pytest.approx(0.002)
    assert probe() is None, "199 ms later"
    assert probe() == pytest.approx(0.0005)
    assert probe() is None, "49 ms later, of 50"
    assert probe() == pytest.approx(0.0005)


def test_the_probe_goes_through_all_of_its_memory(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "PROBE_PERIOD_S", 0.0)
    monkeypatch.setattr(recorder, "MOST_PROBED", 1.0)
    probe = recorder.SpeedProbe()
    far, used = probe._far, sys.modules["torch"].used  # type: ignore[attr-defined]
    read: list[int] = []

    class Far:
        def __getitem__(self, part: slice) -> Any:
            read.append(part.start)
            return far[part]

    probe._far = Far()
    used.clear()
    for _ in range(65):
        probe._due_s = 0.0
        assert probe() > 0.0
    assert read[:2] == [0, 1 << 16] and len(set(read)) == 16 and read[16] == 0
    pieces = [id(weights) for _, weights in used]
    assert len(set(pieces)) == 64 and pieces[64] == pieces[0]
    rows, weights = used[0]
    assert (rows.shape, weights.shape) == ((12, 512), (512, 512))
    assert rows.dtype == weights.dtype == np.float16, "as the stand-in for bfloat16 is"


def test_where_several_threads_compute_the_probe_has_no_product(recorder: Any) -> None:
    used = sys.modules["torch"].used  # type: ignore[attr-defined]
    assert recorder.SpeedProbe(WITHOUT_PRODUCT)() > 0.0 and used == []


def test_a_clock_too_coarse_for_the_probe_says_nothing(
    recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "time", clock([10.0, 10.001], [5.0, 5.0]))
    assert recorder.SpeedProbe()() is None


@pytest.mark.parametrize(
    ("probed", "one_thread", "work"),
    [("1", True, WITH_PRODUCT), ("1", False, WITHOUT_PRODUCT), ("", True, None)],
)
def test_a_log_says_which_work_its_probe_does(
    recorder: Any, monkeypatch: pytest.MonkeyPatch, probed: str, one_thread: bool, work: int | None
) -> None:
    monkeypatch.setenv("ERSIM_SPEED_PROBE", probed)
    monkeypatch.setattr(recorder, "_computes_in_one_thread", lambda config: one_thread)
    assert recorder._probed_work(None) == work


def test_settings_that_a_release_lacks_are_written_as_it_behaves(
    recorder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No reader misses them, the engine starts, and what is there is taken from it."""
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.11.0", raising=False)
    monkeypatch.setattr(recorder, "_computes_in_one_thread", lambda config: False)
    pool = types.SimpleNamespace(num_gpu_blocks=64)
    scheduler = types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(policy="fcfs", enable_chunked_prefill=True),
        cache_config=types.SimpleNamespace(enable_prefix_caching=True),
        vllm_config=types.SimpleNamespace(model_config=types.SimpleNamespace(model="m", quantization=None)),
        kv_cache_manager=types.SimpleNamespace(block_pool=pool),
        max_num_running_reqs=8, max_num_scheduled_tokens=256, max_model_len=512, block_size=16,
    )  # fmt: skip

    def constants() -> Mapping[str, Any]:
        path = tmp_path / "steps.jsonl"
        path.write_text(json.dumps(["m", recorder._meta(scheduler)]) + "\n")
        return read_step_log(path).meta

    old = recorded_config(constants())
    assert (old.watermark, old.scheduler_reserve_full_isl) == (0.0, False)
    assert (old.async_scheduling, old.long_prefill_token_threshold) == (False, 0)
    told = {
        "watermark": 0.02, "scheduler_reserve_full_isl": True, "async_scheduling": True,
        "long_prefill_token_threshold": 100,
    }  # fmt: skip
    vars(scheduler.scheduler_config).update(told)
    new = dataclasses.asdict(recorded_config(constants()))
    assert {name: new[name] for name in told} == told


def recorded_twice(recorder: Any, monkeypatch: pytest.MonkeyPatch, path: Path) -> StepLog:
    """Two steps of one decoding request, the second scheduled before the first one's outputs are there.

    The thread has used a second more whenever its time is asked for, and waited for its core an hour.
    """
    base, seconds, cpu_s = recorder.AsyncScheduler, itertools.count(100.0), itertools.count(1.0)
    decode = types.SimpleNamespace(
        num_scheduled_tokens={"r": 1}, scheduled_new_reqs=(), preempted_req_ids=None
    )
    monkeypatch.setattr(base, "schedule", lambda self: decode, raising=False)
    monkeypatch.setattr(base, "update_from_output", lambda *_: {}, raising=False)
    clock = types.SimpleNamespace(monotonic=lambda: next(seconds), thread_time=lambda: next(cpu_s))
    monkeypatch.setattr(recorder, "time", clock)
    monkeypatch.setattr(recorder, "SpeedProbe", lambda work: lambda: 0.25)
    monkeypatch.setattr(recorder, "StolenShare", lambda: lambda now_s: 0.123456)
    waited_s = itertools.count(3600.0, 3600.0)
    monkeypatch.setattr(recorder, "CoreWait", lambda: lambda: next(waited_s))
    work = WITH_PRODUCT if os.environ.get("ERSIM_SPEED_PROBE") == "1" else None
    meta = dataclasses.asdict(EngineConfig()) | {"format": 4, "vllm_version": "0.32.0", "speed_probe": work}
    monkeypatch.setattr(recorder, "_meta", lambda scheduler: meta)
    monkeypatch.setenv("ERSIM_STEP_LOG", str(path))
    scheduler = recorder.RecordingAsyncScheduler()
    pool = types.SimpleNamespace(num_gpu_blocks=9, get_num_free_blocks=lambda: 7)
    scheduler.kv_cache_manager = types.SimpleNamespace(block_pool=pool)
    scheduler.running, scheduler.waiting, scheduler._index = [None], [], {"r": 0}
    scheduler.requests = {"r": types.SimpleNamespace(num_computed_tokens=9, num_prompt_tokens=4)}
    scheduler.schedule()
    scheduler.schedule()
    scheduler.update_from_output(None, None)
    scheduler.update_from_output(None, None)
    scheduler._log.close()
    return read_step_log(path)


def test_each_step_has_its_own_threads_time_probe_and_stolen_share(
    recorder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ERSIM_SPEED_PROBE", "1")
    steps = recorded_twice(recorder, monkeypatch, tmp_path / "cpu.jsonl").steps
    assert [(step.number, step.cpu_start_s, step.cpu_s) for step in steps] == [(0, 1.0, 3.0), (1, 2.0, 4.0)]
    waits = [(step.waited_start_s, step.waited_s) for step in steps]
    assert waits == [(3600.0, 10800.0), (7200.0, 14400.0)]
    assert [(step.probe_s, step.stolen_share) for step in steps] == [(0.25, 0.1235)] * 2
    assert all(step.schedule_s < step.scheduled_s < step.update_s < step.updated_s for step in steps)
    assert {(step.decode_seqs, step.decode_context_tokens, step.blocks_used) for step in steps} == {(1, 8, 1)}
    assert [step.decoding for step in steps] == [(0,), (0,)]
    lines = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [line[-2:] for line in lines if line[0] == "s"] == [[[0], []], [[], []]], (
        "who stays is not told again"
    )


def test_a_gpu_is_neither_probed_nor_stolen_from(
    recorder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ERSIM_SPEED_PROBE", raising=False)
    log = recorded_twice(recorder, monkeypatch, tmp_path / "gpu.jsonl")
    unknown = [(step.probe_s, step.stolen_share, step.waited_start_s, step.waited_s) for step in log.steps]
    assert unknown == [(None,) * 4] * 2
    np.testing.assert_array_equal(undisturbed_s(log), log.periods_s())


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({}, True),
        ({"threads": "2"}, False),
        ({"threads": None}, False),
        ({"cpu": False}, False),
        ({"ranks": 2}, False),
        ({"backend": "mp"}, False),
    ],
)
def test_the_engines_thread_works_alone_only_where_no_other_thread_or_process_does(
    recorder: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], alone: bool
) -> None:
    given = {"threads": "1", "cpu": True, "ranks": 1, "backend": "uni", **changes}
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(is_cpu=lambda: given["cpu"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, platforms.__name__, platforms)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given["threads"] is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given["threads"])
    parallel = types.SimpleNamespace(world_size=given["ranks"], distributed_executor_backend=given["backend"])
    assert recorder._computes_in_one_thread(types.SimpleNamespace(parallel_config=parallel)) is alone


def test_the_base_is_the_one_that_the_server_would_have_chosen(
    recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RecordingScheduler", lambda **_: "one after the other")
    monkeypatch.setattr(recorder, "RecordingAsyncScheduler", lambda **_: "overlapping")
    for settings, base in (
        ({}, "one after the other"),
        ({"async_scheduling": False}, "one after the other"),
        ({"async_scheduling": True}, "overlapping"),
    ):
        config = types.SimpleNamespace(scheduler_config=types.SimpleNamespace(**settings))
        assert recorder.make_scheduler(vllm_config=config) == base
