"""How a server stands alone before a load, and what a stored run keeps of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ersim.errors import DataError
from ersim.types import Batch
from testbed.host_speed import SpeedTrace
from testbed.measured_run import read_span_s, read_speed, steps_frame
from testbed.plan import check_plan, phases
from testbed.profiling import PhaseTimes, ProfileRun
from testbed.standing import CHECK, Standing, standing
from testbed.step_log import LoggedStep, StepLog

META = {"async_scheduling": False}


class Fixed:
    """Every step takes 10 ms."""

    def step_s(self, batch: Batch) -> float:
        return 0.01

    def decode_run_s(self, decode_seqs: int, context_tokens: int, context_max: int, steps: int) -> np.ndarray:
        return np.full(steps, 0.01)


def log_of(lengths_s: np.ndarray, probe_s: float | None = 0.0002) -> StepLog:
    """Decode steps of one row, back to back from 0."""
    ends = np.cumsum(lengths_s)
    starts = ends - lengths_s
    steps = [
        LoggedStep(
            number, s0, s0 + 0.0005, u1 - 0.0005, u1, 1, 0, 1, 1, 10, 10, (), (), (), 1, 1e-5, None, probe_s
        )
        for number, (s0, u1) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    ]
    return StepLog(META, steps, {})


def phases_of(log: StepLog, count: int) -> ProfileRun:
    """The log's time in `count` equal phases, behind a warm-up without steps."""
    edges = np.linspace(0.0, log.steps[-1].updated_s, count + 1)
    ranges = itertools.pairwise(edges)
    times = [
        PhaseTimes(f"p{i}", float(low) - 1e-6, float(high) + 1e-6, 1, 0)
        for i, (low, high) in enumerate(ranges)
    ]
    return ProfileRun([PhaseTimes("warmup", -9.0, -8.0, 1, 0), *times])


def test_the_factor_is_measured_over_calibrated_and_stalls_do_not_count() -> None:
    lengths = np.full(200, 0.0125)
    lengths[[20, 77, 150]] = 0.5
    log = log_of(lengths)
    stands = standing(log, phases_of(log, 1), Fixed())
    assert stands.factor == pytest.approx(1.25, rel=0.001)
    assert (stands.probe_s, stands.steps) == (0.0002, 200)


def test_the_doubt_is_the_spread_between_phases() -> None:
    log = log_of(np.repeat([0.011, 0.012, 0.013, 0.012], 100))
    stands = standing(log, phases_of(log, 4), Fixed())
    assert stands.factor == pytest.approx(1.2, rel=0.03)
    assert 0.01 < stands.doubt < 0.06


def test_a_check_without_steps_is_an_error() -> None:
    log = log_of(np.full(3, 0.01))
    with pytest.raises(DataError, match="no step of the check was recorded"):
        standing(log, ProfileRun([PhaseTimes("decode", 50.0, 60.0, 4, 4)]), Fixed())


def test_the_check_is_a_plan_like_any_other_and_short() -> None:
    check_plan(CHECK, 2048)
    names = [phase.name for phase in phases(CHECK, 4)]
    assert names[0] == "warmup" and len(names) == 1 + CHECK.rounds * 3
    tokens = sum(output for phase in phases(CHECK, 4) for _, output in getattr(phase, "jobs", ()))
    assert tokens < 300


def test_slowness_is_the_factor_times_the_probe_since_the_check(tmp_path: Path) -> None:
    log = log_of(np.full(100, 0.05), probe_s=0.0003)
    alone = Standing(1.2, 0.03, 0.0002, 50)
    frame = steps_frame(log, 0.0, alone)
    np.testing.assert_allclose(frame["host_slowness"], 1.2 * 1.5)
    assert (steps_frame(log, 0.0)["host_slowness"] == 1.0).all(), "a GPU is not checked"
    frame.to_parquet(tmp_path / "steps_a.parquet")
    run = {"start_s": 3.0, "end_s": 9.0, "standings": {"a": dataclasses.asdict(alone)}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    trace = read_speed(tmp_path, {"a": ["a"]})["a"]
    assert trace.median == pytest.approx(1.8) and trace.doubt == 0.03
    assert read_span_s(tmp_path) == (3.0, 9.0)
    drawn = [trace.drawn(np.random.default_rng(seed)).median for seed in range(400)]
    assert np.std(np.log(drawn)) == pytest.approx(0.03, rel=0.2)
    assert SpeedTrace((1.0,)).drawn(np.random.default_rng(0)).bins == (1.0,)
    slower = frame.assign(end_s=frame["end_s"] + 1e-4, host_slowness=3.0)
    pd.concat([slower] * 3).to_parquet(tmp_path / "steps_a-1.parquet")
    both = read_speed(tmp_path, {"a": ["a", "a-1"]})["a"]
    assert both.median == pytest.approx(3.0), "of all its servers' steps"
    assert both.doubt == pytest.approx(0.015), "the one that was not checked counts as known"
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "steps_b.parquet")
    with pytest.raises(DataError, match=r"steps_b\.parquet"):
        read_speed(tmp_path, {"b": ["b"]})
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"run\.json: not the run\.json of a measured run"):
        read_speed(tmp_path, {"a": ["a"]})
