"""What a validation says of itself: errors with and without the measured speed of the host, and failures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ersim.config import ExpertConfig, FleetConfig, RouterConfig, SimulationConfig, WorkloadConfig
from ersim.engine import EngineConfig
from ersim.errors import ConfigError, DataError
from ersim.prepare import Preparations
from ersim.results import Gaps, Window
from ersim.steptime.calibration import CALIBRATION_DIR
from ersim.steptime.calibration import load as load_calibration
from ersim.steptime.calibration import save as save_calibration
from experiments.live_schema import LiveConfig
from experiments.validate import (
    _bars_met,
    _errors,
    _failed,
    _mean_abs,
    _predictions,
    _rows,
    check_probe,
    check_versions,
    logged_version,
    table,
    validate,
)
from testbed.contention import Contention
from testbed.fleet_calibration import FleetCalibration
from testbed.fleet_calibration import save as save_fleet
from testbed.host_speed import SpeedTrace
from testbed.live_run import level_config
from testbed.measured_run import FORMAT as RUN_FORMAT
from testbed.measured_run import VERSION as RUN_VERSION
from testbed.measured_run import read_versions
from testbed.pooled import answered
from testbed.predict import predict_once
from testbed.probe_works import FORMER, TODAY, WITH_PRODUCT
from testbed.speed_probe import probed_work
from testbed.step_log import FORMATS

SUMMARY = {"output_throughput": 100.0, "median_tpot_ms": 20.0, "per_expert": {"a": {"share": 1.0}}}


def test_each_load_is_predicted_at_the_hosts_speed_and_at_slowness_1() -> None:
    fleet = FleetConfig("f", experts={"a": ExpertConfig()})
    known = FleetCalibration("f", {}, {"a": Contention()}, {})
    job = LiveConfig(fleet=fleet, replications=2, seconds=12.0, warmup_s=1.0)
    config = SimulationConfig(users=4, fleet=fleet, workload=WorkloadConfig(think_s=0.5))
    level, shared = level_config(config, 4, job.seconds), Preparations()
    output = predict_once(level, shared, known, 0)
    judged = [answered((output.requests, output.gaps), Window(job.warmup_s, job.seconds, True))]
    assert len(judged[0]) > 3
    told, plain = _predictions(job, level, shared, known, judged, [{"a": SpeedTrace((2.0,))}])
    assert told["median_tpot_ms"] == pytest.approx(2 * plain["median_tpot_ms"], rel=0.05)
    told, plain = _predictions(job, level, shared, known, judged, [{"a": SpeedTrace((1.0, 1.0))}])
    assert told is plain, "a host that was not slowed (a GPU's) is simulated once"


def test_a_trace_in_doubt_is_not_taken_for_one() -> None:
    assert SpeedTrace((1.0, 1.0)).is_one
    assert not SpeedTrace((1.0, 1.1)).is_one and not SpeedTrace((1.0,), doubt=0.02).is_one
    assert not SpeedTrace((1.0,), factor=1.1).is_one


def test_both_errors_stand_side_by_side_in_table_and_figures() -> None:
    told = {**SUMMARY, "output_throughput": 98.0, "median_tpot_ms": 21.0}
    plain = {**SUMMARY, "output_throughput": 80.0, "median_tpot_ms": 20.5}
    rows = pd.DataFrame(_rows(4, SUMMARY, told, plain, ["a"]))
    assert rows["metric"].tolist() == ["output_throughput", "median_tpot_ms", "share_a"]
    assert rows["error"].tolist() == pytest.approx([-0.02, 0.05, 0.0])
    assert rows["error_at_slowness_1"].tolist() == pytest.approx([-0.2, 0.025, 0.0])
    bars = {"output_throughput": 0.05, "median_tpot_ms": 0.08}
    assert _bars_met(_errors(rows, "error", bars), bars, [4]) == "2/2"
    assert _bars_met(_errors(rows, "error_at_slowness_1", bars), bars, [4]) == "1/2"
    head, first, *_ = table(rows).splitlines()
    assert head.endswith("error at slowness 1") and first.endswith("-20.0%") and len(first) == len(head)


def test_a_figure_that_is_missing_has_not_met_its_bar() -> None:
    told = {"output_throughput": 98.0, "per_expert": SUMMARY["per_expert"]}  # no request ended: no TPOT
    rows = pd.DataFrame(_rows(4, SUMMARY, told, told, ["a"]))
    bars = {"output_throughput": 0.05, "median_tpot_ms": 0.08}
    errors = _errors(rows, "error", bars)
    assert _bars_met(errors, bars, [4]) == "1/2" and _bars_met(errors, bars, [4, 8]) == "1/4"
    assert (
        _bars_met({}, bars, [4]) == "0/2"
        and _bars_met({"median_tpot_ms": {4: float("nan")}}, bars, [4]) == "0/2"
    )
    assert _mean_abs(errors) == {"output_throughput": 0.02, "median_tpot_ms": None}


def test_requests_without_an_answer_are_counted_in_all_repeats() -> None:
    gaps = Gaps.concatenate([])
    frames = [pd.DataFrame({"status": states}) for states in (["completed", "failed"], ["rejected"], [])]
    assert _failed([(frame, gaps) for frame in frames]) == 2


def test_servers_of_another_vllm_than_the_calibrations_are_refused_before_any_load(tmp_path: Path) -> None:
    log = tmp_path / "a.steps.jsonl"
    meta = dataclasses.asdict(EngineConfig()) | {"format": FORMATS[-1], "vllm_version": "0.32.0"}
    log.write_text(json.dumps(["m", meta]) + "\n")
    versions = {"a": logged_version(log)}
    check_versions(versions, FleetCalibration("f", {}, {}, {}, vllm_version="0.32.0"))
    with pytest.raises(ConfigError, match=r"a runs vLLM 0\.32\.0, its calibration was made with 0\.19\.0"):
        check_versions(versions, FleetCalibration("f", {}, {}, {}, vllm_version="0.19.0"))


def test_a_profile_beside_another_probe_is_refused_before_anything_is_moved_or_started() -> None:
    shipped = load_calibration(CALIBRATION_DIR / "h100-80gb" / "llama3.1-8b_bf16_tp1_tables.json")
    probed = {"seconds": 3e-4, "after": {}}

    def check(made_with: dict[str, Any] | None, *works: int | None) -> None:
        provenance = {**shipped.provenance, "speed_probe": made_with}
        check_probe(dataclasses.replace(shipped, provenance=provenance), works, "expert a")

    check(probed, FORMER)
    check({**probed, "work": WITH_PRODUCT}, *TODAY)
    check(None, WITH_PRODUCT)
    check(probed, None)
    again = r"expert a: its calibration .* another speed probe \(.*work 1, now 2 or 3\): profile again"
    with pytest.raises(ConfigError, match=again):
        check(probed, *TODAY)
    with pytest.raises(ConfigError, match=r"work 3, now 2\): profile again"):
        check({**probed, "work": 3}, 2)
    assert probed_work({}) == FORMER and probed_work({"speed_probe": None}) is None


def test_a_stored_run_names_the_vllm_it_was_measured_with(tmp_path: Path) -> None:
    run = {
        "format": RUN_FORMAT, "version": RUN_VERSION, "users": 1, "repeat": 0, "start_s": 0.0, "end_s": 1.0,
        "standings": {}, "unfinished": 0, "foreign_cores": 0.0, "calibrations": {}, "config": {},
        "engines": {"a": {"vllm_version": "0.31.0"}, "b": {"vllm_version": "0.32.0"}},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(run))
    versions = read_versions([tmp_path])
    assert versions == {"a": "0.31.0", "b": "0.32.0"}
    with pytest.raises(ConfigError, match=r"a runs vLLM 0\.31\.0, its calibration was made with 0\.32\.0"):
        check_versions(versions, FleetCalibration("f", {}, {}, {}, vllm_version="0.32.0"))


def test_stored_runs_are_predicted_only_with_what_they_were_measured_with(tmp_path: Path) -> None:
    """A profile made anew, and one that broke off before it wrote fleet.json, each say so."""
    shipped = load_calibration(CALIBRATION_DIR / "h100-80gb" / "llama3.1-8b_bf16_tp1_tables.json")
    save_calibration(shipped, tmp_path / "a.json")
    gateway = dict.fromkeys(("network_s", "base_s", "routing_s", "backend_network_s"), 0.001)
    digest = load_calibration(tmp_path / "a.json").digest
    known = FleetCalibration("f", {"a": "a.json"}, {"a": Contention()}, gateway, digests={"a": digest})
    save_fleet(known, tmp_path)
    folder = tmp_path / "runs" / "u4r0"
    folder.mkdir(parents=True)
    run = {
        "format": RUN_FORMAT, "version": RUN_VERSION, "users": 4, "repeat": 0, "start_s": 0.0, "end_s": 1.0,
        "standings": {}, "unfinished": 0, "foreign_cores": 0.0, "engines": {}, "config": {},
        "calibrations": {"a": digest},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    fleet = FleetConfig("f", experts={"a": ExpertConfig()})
    job = LiveConfig(fleet=fleet, users=[4], repeats=1, measure=False, folder=str(tmp_path))
    with pytest.raises(DataError, match=r"requests\.parquet is missing \("):  # all checks before passed
        validate(job)
    save_calibration(dataclasses.replace(shipped, residual_rel_std=0.5), tmp_path / "a.json")
    with pytest.raises(DataError, match=r"fleet\.json was made with .*; profile the fleet again"):
        validate(job)
    digests = {"a": load_calibration(tmp_path / "a.json").digest}
    save_fleet(dataclasses.replace(known, digests=digests), tmp_path)
    with pytest.raises(DataError, match=r"u4r0/run\.json: measured with another .*; measure again"):
        validate(job)


def test_a_budget_that_no_expert_meets_is_refused_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, calibrations, digests = {}, {}, {}
    for name, model in (("big", "llama3.1-70b"), ("small", "llama3.1-8b")):
        path = CALIBRATION_DIR / "h100-80gb" / f"{model}_bf16_tp4_tables.json"
        save_calibration(load_calibration(path), tmp_path / f"{name}.json")
        experts[name] = ExpertConfig(model=model, tp=4, gpu="h100-80gb")
        calibrations[name] = f"{name}.json"
        digests[name] = load_calibration(tmp_path / f"{name}.json").digest
    gateway = dict.fromkeys(("network_s", "base_s", "routing_s", "backend_network_s"), 0.001)
    contention = {name: Contention() for name in experts}
    save_fleet(FleetCalibration("f", calibrations, contention, gateway, digests=digests), tmp_path)

    def never(*given: object) -> None:
        raise AssertionError(given)

    monkeypatch.setattr("experiments.validate._measure", never)
    router = RouterConfig(policy="prompt_length", params={"budget": 1e-6})
    fleet = FleetConfig("f", experts=experts)
    job = LiveConfig(fleet=fleet, users=[4], folder=str(tmp_path), router=router)
    with pytest.raises(ConfigError, match=r"router\.params\.budget must be >= .*, the weak tier's price"):
        validate(job)
