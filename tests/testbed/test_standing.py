"""How a server stands alone before a load, and what a stored run keeps of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ersim.config import ExpertConfig, FleetConfig, SimulationConfig
from ersim.errors import DataError
from ersim.prepare import Preparations
from ersim.steptime import Calibration, load
from ersim.steptime.calibration import CALIBRATION_DIR, save
from ersim.types import Batch
from experiments.live_schema import LiveConfig
from experiments.profile import _slowed
from experiments.validate import _speeds
from testbed.host_speed import SpeedTrace
from testbed.measured_run import FORMAT, VERSION, read_span_s, read_speed, read_standings, steps_frame
from testbed.plan import check_plan, phases
from testbed.profiling import PhaseTimes, ProfileRun
from testbed.sensitivity import KEY, Sensitivity
from testbed.speed_probe import KEY as PROBE_KEY
from testbed.speed_probe import UsualProbe
from testbed.standing import (
    CHECK,
    LEAST_DOUBT,
    START_STD,
    USUAL_WANDER,
    Standing,
    short_enough,
    standing,
    together,
)
from testbed.step_log import LoggedStep, StepLog, StepRow

META = {"async_scheduling": False}
RUN = {
    "format": FORMAT, "version": VERSION, "users": 1, "repeat": 0, "start_s": 3.0, "end_s": 9.0,
    "standings": {}, "unfinished": 0, "foreign_cores": 0.0, "engines": {}, "calibrations": {}, "config": {},
}  # fmt: skip


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
    assert stands.factor == pytest.approx(1.25, rel=0.001) and stands.steps == 200


def test_a_host_that_was_slow_during_the_check_is_not_the_start() -> None:
    log = log_of(np.full(200, 0.0125), probe_s=0.00025)
    stands = standing(log, phases_of(log, 1), Fixed(), UsualProbe(0.0002, {}))
    assert stands.factor == pytest.approx(1.0)
    felt = Sensitivity(1.0, 0.5)  # every step is one of one row here
    stands = standing(log, phases_of(log, 1), Fixed(), UsualProbe(0.0002, {}), felt)
    assert stands.factor == pytest.approx(1.25 ** (-0.5 / 1.5))
    assert felt.slowed(1.25 * stands.factor, 1.0) == pytest.approx(1.25), "both together make the steps"


def test_the_doubt_is_the_spread_between_phases() -> None:
    log = log_of(np.repeat([0.011, 0.012, 0.013, 0.012], 100))
    stands = standing(log, phases_of(log, 4), Fixed())
    assert stands.factor == pytest.approx(1.2, rel=0.03)
    assert 0.01 < stands.doubt < 0.06


def test_checks_of_one_start_count_by_their_doubt() -> None:
    calm, wild = Standing(0.85, 0.01, 100), Standing(1.3, 0.17, 100)
    both = together([calm, wild, calm])
    assert both.factor == pytest.approx(0.855, rel=0.01) and both.steps == 300
    assert both.doubt < 0.03
    apart = together([Standing(0.9, 0.01), Standing(1.1, 0.01)])
    assert apart.factor == pytest.approx(0.995, abs=0.005)
    assert apart.doubt == pytest.approx(0.1, rel=0.01), "their spread counts"
    assert together([calm]).doubt == pytest.approx(np.hypot(0.01, LEAST_DOUBT), rel=0.01)
    assert 1.0 < together([wild]).factor < 1.15, "one doubtful check moves little"
    assert together([]) == Standing()


def test_wander_is_what_checks_differ_beyond_their_doubt_and_near_what_is_usual() -> None:
    many = together([Standing(factor, 0.01) for factor in (0.9, 1.1) * 40])
    assert many.wander == pytest.approx(np.std(np.log([0.9, 1.1])), rel=0.03), "what was seen"
    rng = np.random.default_rng(0)
    doubtful = together([Standing(float(np.exp(rng.normal(0.0, 0.03))), 0.03) for _ in range(80)])
    assert doubtful.wander < 0.02, "doubt is no wander"
    assert together([Standing(0.85, 0.01)]).wander == pytest.approx(USUAL_WANDER)
    assert together([Standing(0.85, 0.01)] * 3).wander < USUAL_WANDER


def test_a_check_of_one_phase_is_as_doubtful_as_none() -> None:
    log = log_of(np.full(200, 0.013))
    short = standing(log, phases_of(log, 1), Fixed())
    assert short.doubt == START_STD and short.share == 1.0
    both = together([short, Standing(1.0, 0.02), Standing(1.0, 0.02)])
    assert both.factor == pytest.approx(1.0, abs=0.01) and both.doubt < 0.03


def test_a_check_sends_no_prompt_that_the_engine_would_refuse() -> None:
    assert short_enough(CHECK, 2048) == CHECK
    check_plan(short_enough(CHECK, 300), 300)
    assert short_enough(CHECK, 300).prefill_tokens == [128, 276]
    assert short_enough(CHECK, 100).prefill_tokens == [76]


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


def calibration(probe_s: float | None) -> Calibration:
    """As far as the host is concerned."""
    usual = None if probe_s is None else {"seconds": probe_s, "after": {}}
    host = {PROBE_KEY: usual, KEY: {"plain": 1.0, "reads": 0.5}}
    return dataclasses.replace(load(sorted(CALIBRATION_DIR.rglob("*.json"))[0]), provenance=host)


def test_a_stored_run_keeps_its_probes_and_every_round_its_checks(tmp_path: Path) -> None:
    log = log_of(np.full(100, 0.05), probe_s=0.0003)
    frame = steps_frame(log, 0.0)
    np.testing.assert_allclose(frame["probe_s"], 0.0003)
    assert steps_frame(log_of(np.full(9, 0.05), None), 0.0)["probe_s"].isna().all(), "a GPU is not probed"
    for repeat, factor in enumerate((1.2, 1.0)):
        for users in (1, 2):
            folder = tmp_path / f"u{users}r{repeat}"
            folder.mkdir()
            checked = {"a": dataclasses.asdict(Standing(factor, 0.03, 50))}
            (folder / "run.json").write_text(json.dumps({**RUN, "repeat": repeat, "standings": checked}))
            frame.to_parquet(folder / "steps_a.parquet")
    folders = sorted(tmp_path.iterdir())
    standings = read_standings(folders)
    assert standings["a"] == together([Standing(1.2, 0.03, 50), Standing(1.0, 0.03, 50)]), "once a repeat"
    assert read_span_s(folders[0]) == (3.0, 9.0)
    trace = read_speed(folders[0], ["a"], standings, calibration(0.0002))
    assert trace.factor == standings["a"].factor and trace.at(1.0) == pytest.approx(1.5)
    assert trace.sensitivity == Sensitivity(1.0, 0.5) and trace.doubt == standings["a"].doubt
    slower = frame.assign(end_s=frame["end_s"] + 1e-4, probe_s=0.0006)
    pd.concat([slower] * 3).to_parquet(folders[0] / "steps_a-1.parquet")
    both = read_speed(folders[0], ["a", "a-1"], standings, calibration(0.0002))
    assert both.at(1.0) == pytest.approx(3.0), "of all its servers' steps"
    assert both.doubt == pytest.approx(standings["a"].doubt / 2), "the one without a check counts as known"
    assert read_speed(folders[0], ["a"], {}, calibration(None)).is_one, "nothing probed, nothing slow"


def test_a_stored_run_keeps_what_was_stolen_and_which_step_a_probe_followed(tmp_path: Path) -> None:
    """Prefill leaves the caches cold: the host is as it was, and a fifth of its time is stolen."""
    plain = log_of(np.full(100, 0.05), probe_s=0.00033)
    prefill = (StepRow(0, 64, 0, 64, 64),)
    changed = {"decode_seqs": 0, "rows": prefill, "stolen_share": 0.2}
    steps = [dataclasses.replace(step, **changed) for step in plain.steps]  # type: ignore[arg-type]
    steps_frame(StepLog(META, steps, {}), 0.0).to_parquet(tmp_path / "steps_a.parquet")
    usual = {"seconds": 0.0002, "after": {"1": 1.0, "prefill": 1.1}}
    known = dataclasses.replace(calibration(None), provenance={PROBE_KEY: usual})
    trace = read_speed(tmp_path, ["a"], {}, known)
    assert trace.at(1.0) == pytest.approx(1.5) and trace.slowed(1.0, 1.0) == pytest.approx(1.5 * 1.25)


def test_steps_of_common_load_are_cleared_of_host_and_start_by_replica() -> None:
    logs = [log_of(np.full(60, 0.02), probe_s=0.0003), log_of(np.full(60, 0.02), probe_s=0.0002)]
    checked = Standing(1.3, 0.03, 50)
    first, second = _slowed("a", logs, {"a-1": checked}, calibration(0.0002), Fixed())
    felt = 1.5  # every step is one of one row
    np.testing.assert_allclose(first, 1.5**felt, err_msg="the profiled server is its own measure")
    np.testing.assert_allclose(second, together([checked]).factor ** felt)
    steps = [dataclasses.replace(step, stolen_share=0.2) for step in logs[0].steps]
    (stolen,) = _slowed("a", [StepLog(META, steps, {})], {}, calibration(0.0002), Fixed())
    np.testing.assert_allclose(stolen, 1.25 * first)


def test_a_validation_takes_the_starts_from_all_its_runs(tmp_path: Path) -> None:
    frame = steps_frame(log_of(np.full(100, 0.05), probe_s=0.0003), 0.0)
    checks = [Standing(1.4, 0.02, 50), Standing(1.2, 0.02, 50)]
    for repeat, users in itertools.product(range(2), (1, 2)):
        folder = tmp_path / "runs" / f"u{users}r{repeat}"
        folder.mkdir(parents=True)
        told = {"a": dataclasses.asdict(checks[repeat])}
        (folder / "run.json").write_text(json.dumps({**RUN, "repeat": repeat, "standings": told}))
        frame.to_parquet(folder / "steps_a.parquet")
    kept = tmp_path / "a.json"
    known = calibration(0.0002)
    save(known, kept)
    made_for = {"model": known.model, "precision": known.precision, "gpu": known.gpu, "tp": known.tp}
    fleet = FleetConfig("f", experts={"a": ExpertConfig(calibration=str(kept), **made_for)})
    job = LiveConfig(fleet=fleet, users=[1, 2], repeats=2)
    both = _speeds(job, SimulationConfig(fleet=fleet), Preparations(), tmp_path, 2)
    for speeds in both:
        assert speeds["a"].factor == together(checks).factor > 1.2
        assert speeds["a"].wander > 0.0 and speeds["a"].at(1.0) == pytest.approx(1.5)
    assert len(both) == 2, "one a repeat"


def test_damaged_or_old_runs_are_named(tmp_path: Path) -> None:
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "steps_b.parquet")
    with pytest.raises(DataError, match=r"steps_b\.parquet"):
        read_speed(tmp_path, ["b"], {}, calibration(None))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"run\.json: not the run\.json of a measured run"):
        read_standings([tmp_path])
    for damaged in ("5", "null", '{"start_s": 1.0}'):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(DataError, match=r"run\.json: not the run\.json of a measured run"):
            read_standings([tmp_path])


def test_a_trace_is_drawn_as_far_as_it_is_in_doubt() -> None:
    trace = SpeedTrace((1.5,), 1.2, 0.03, 0.04)

    def drawn(start: int, run: int) -> float:
        return trace.drawn(np.random.default_rng(start), np.random.default_rng([run, 1])).median

    both = [drawn(seed, seed) for seed in range(400)]
    assert np.std(np.log(both)) == pytest.approx(0.05, rel=0.1)
    assert np.median(both) == pytest.approx(1.8, rel=0.01)
    assert np.std(np.log([drawn(0, seed) for seed in range(400)])) == pytest.approx(0.04, rel=0.1)
    sure = SpeedTrace((1.0,))
    assert sure.drawn(np.random.default_rng(0), np.random.default_rng(1)) == sure
