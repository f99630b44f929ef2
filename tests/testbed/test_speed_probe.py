"""What the recorder's probe notes of the host: the time of its work, and what was stolen meanwhile."""

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


def test_stolen_time_is_put_on_top_of_the_probe(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of 0.2 ms while a fifth of the wanted time was stolen is 0.25 ms; the next one is 20 ms later."""
    readings = iter([10.0, 10.0002, 10.0201, 10.0203, 10.0205])
    monkeypatch.setattr(recorder, "time", types.SimpleNamespace(monotonic=lambda: next(readings)))
    asked: list[float] = []
    probe = recorder.SpeedProbe()
    probe._stolen = lambda now_s: asked.append(now_s) or 0.2
    assert probe() == pytest.approx(0.00025)
    assert probe() is None and asked == [10.0002]
    assert probe() == pytest.approx(0.00025)


def test_the_probe_goes_through_all_of_its_memory(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "PROBE_PERIOD_S", 0.0)
    probe = recorder.SpeedProbe()
    places = []
    for _ in range(17):
        places.append(probe._at)
        assert probe() > 0.0
    assert places[:2] == [0, 1 << 16] and len(np.unique(places)) == 16 and places[16] == 0
