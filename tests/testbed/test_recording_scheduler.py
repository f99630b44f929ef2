"""The recorder's speed probe: the time of its work, now and then."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import numpy as np
import pytest


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
