"""The recorder's speed probe, and what it writes of engines that lack some settings."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed.replay import recorded_config
from testbed.step_log import read_step_log


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recorder's module on top of stand-ins for the two schedulers of vLLM."""
    for name, scheduler in (("async_scheduler", "AsyncScheduler"), ("scheduler", "Scheduler")):
        module = types.ModuleType(f"vllm.v1.core.sched.{name}")
        setattr(module, scheduler, type(scheduler, (), {}))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.delitem(sys.modules, "testbed.recording_scheduler", raising=False)
    yield importlib.import_module("testbed.recording_scheduler")
    sys.modules.pop("testbed.recording_scheduler", None)


def test_the_probe_tells_its_time_at_most_every_20_ms(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([10.0, 10.0002, 10.0201, 10.0203, 10.0205])
    monkeypatch.setattr(recorder, "time", types.SimpleNamespace(monotonic=lambda: next(readings)))
    probe = recorder.SpeedProbe()
    assert probe() == pytest.approx(0.0002)
    assert probe() is None
    assert probe() == pytest.approx(0.0002)


def test_the_probe_goes_through_all_of_its_memory(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "PROBE_PERIOD_S", 0.0)
    probe = recorder.SpeedProbe()
    places = []
    for _ in range(17):
        places.append(probe._at)
        assert probe() > 0.0
    assert places[:2] == [0, 1 << 16] and len(np.unique(places)) == 16 and places[16] == 0


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
