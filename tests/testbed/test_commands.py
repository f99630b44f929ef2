"""The live commands without vLLM: what they compose, refuse and hand on."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from ersim.config import ExpertConfig, FleetConfig, GatewayConfig, SimulationConfig
from ersim.errors import ConfigError, DataError
from experiments import live_tracking
from experiments.gpu_session import commands, measure
from experiments.live import split_arguments
from experiments.live_schema import LiveConfig, list_overrides
from experiments.live_tracking import failures_logged, log_validation
from experiments.long_command import OUT_OF_TIME, run_to_its_end
from experiments.profile import check_precision
from experiments.validate import check_loads, check_recorded, recorded_config
from testbed.contention import Contention
from testbed.fleet import server_specs
from testbed.fleet_calibration import FleetCalibration, load, save, with_calibrations
from testbed.measured_run import FORMAT, VERSION
from testbed.plan import ClosedLoop, ProfilePlan, phases
from testbed.step_scatter import StepScatter

ROOT = Path(__file__).resolve().parents[2]
KNOWN = FleetCalibration(
    "f", {"a": "a.json"},
    {"a": Contention({"b": 0.1}, [[1.0, 0.2, 1e-4]], StepScatter([0.9, 1.1], [1.0]), 1.1, [0.98])},
    {"network_s": 0.001, "base_s": 0.0002, "routing_s": 0.0004, "backend_network_s": 0.003},
    [3, 6], "0.32.0", [[1, 0.001, 0.0, 0.001]], {"a": "d" * 64},
)  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def runs(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_loads_are_one_list_not_a_sweep() -> None:
    assert list_overrides(["users=1,2,4", "seed=3", "users=[5]"]) == ["users=[1,2,4]", "seed=3", "users=[5]"]


def test_both_commands_get_what_concerns_them() -> None:
    first, second = split_arguments(["fleet=f", "users=1,2", "plan.seconds=5", "live_plan=short", "seed=2"])
    assert first == ["fleet=f", "plan.seconds=5", "live_plan=short", "seed=2"]
    assert second == ["fleet=f", "users=1,2", "seed=2"]


def test_a_gpu_session_profiles_then_validates_with_overrides_last() -> None:
    profile, validate = commands("llama3_8b_bf16", "h200-141gb", "1,10", ["workload=sessions"])
    assert "install=true" in profile and "live_plan=gpu" in profile and "install=true" not in validate
    assert "repeats=1" in validate and "repeats=1" not in profile
    assert "users=1,10" in validate and "workload=chat" not in profile + validate


def test_a_short_gpu_session_leaves_three_minutes_of_nine_for_starts() -> None:
    """Load of the profile, common load, and five loads; what starts of vLLM take is not known here."""
    plan = yaml.safe_load((ROOT / "conf/live_plan/gpu_short.yaml").read_text())
    loads = [1, 10, 100, 500, 1000]
    seconds = plan["seconds"] + len(plan["mixed_users"]) * plan["mixed_s"] + len(loads) * 30
    assert seconds <= 6 * 60
    assert not set(loads) & set(plan["mixed_users"]), "no load validates that calibrated"
    bursts = list(phases(ProfilePlan(**plan), 1024))
    assert any(isinstance(phase, ClosedLoop) for phase in bursts) and len(bursts) > 10


def test_a_session_stops_what_runs_when_its_time_is_over() -> None:
    nap = "import time; print('{}', flush=True); time.sleep({})"
    began_s = time.monotonic()
    nap_long = [sys.executable, "-c", nap.format(1, 60)]
    assert run_to_its_end(nap_long, 0.5, capture=True) == (OUT_OF_TIME, "")
    assert time.monotonic() - began_s < 10
    both = [[sys.executable, "-c", nap.format('{"a": 1}', s)] for s in (0, 60)]
    report = measure("e", both, 1.5)
    assert report["ok"] is False and report["status"] == "out of time"
    assert report[both[0][2]] == {"a": 1}, "what was done before is reported"


@pytest.mark.parametrize("said", ["", "no figures"])
def test_a_command_without_figures_does_not_end_the_session(said: str) -> None:
    both = [[sys.executable, "-c", f"print({text!r})"] for text in ('{"a": 1}', said)]
    report = measure("e", both, 60.0)
    assert (report["ok"], report["status"]) == (False, "ended without its figures")
    assert report[both[0][2]] == {"a": 1} and report["failed"] == both[1][2]


def test_a_load_that_calibrated_may_not_validate() -> None:
    check_loads(LiveConfig(users=[1, 2, 4]), KNOWN)
    with pytest.raises(ConfigError, match=r"users must be loads that did not calibrate.*got \[3\]"):
        check_loads(LiveConfig(users=[1, 3]), KNOWN)


def test_fleet_calibrations_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    path = save(KNOWN, tmp_path)
    assert load(tmp_path) == KNOWN
    gateway = load(tmp_path).gateway_config(GatewayConfig())
    assert (gateway.workers, gateway.network_s, gateway.routing_s) == (1, 0.001, 0.0004)
    other = FleetConfig("f", experts={"b": ExpertConfig()})
    with pytest.raises(DataError, match="no calibration of expert b"):
        with_calibrations(other, KNOWN, tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match=r"fleet\.json: not a whole JSON document"):
        load(tmp_path)
    path.write_text(json.dumps({"format": "other"}))
    with pytest.raises(DataError, match="not a fleet calibration"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="ersim-profile"):
        load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("experiments.profile",), "fleet must be chosen"),
        (("experiments.profile", "fleet=nobody"), "nobody"),
        (("experiments.profile", "expert=tiny_bf16", "plan.prefill_tokens=[99999]"), "plan.prefill_tokens"),
        (("experiments.validate", "users=0"), "users must be one or more loads >= 1"),
        (("experiments.validate", "users=4,4"), "each given once, got [4, 4]"),
        (("experiments.validate", "users=[]"), "users must be one or more loads >= 1"),
        (("experiments.validate", "repeats=0"), "repeats must be >= 1, got 0"),
        (("experiments.validate", "replications=0"), "replications must be >= 1, got 0"),
        (("experiments.validate", "warmup_s=90"), "warmup_s must be in"),
        (("experiments.validate", "folder=nowhere"), "ersim-profile"),
        (
            ("experiments.validate", "expert=tiny_bf16", "+expert.live.prot=1", "folder=nowhere"),
            "fleet.experts.tiny_bf16.live must be one of",
        ),
        (("experiments.validate", "expert=tiny_bf16", "fleet=live_cpu"), "fleet=live_cpu has no effect"),
        (("experiments.profile", "expert=tiny_bf16", "+expert.engine.bogus=1"), "engine.bogus is not known"),
        (("experiments.profile", "expert=tiny_bf16", "expert.gpu=h200"), "gpu must be one of: a10,"),
    ],
)
def test_bad_input_is_one_message_and_a_status(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_stored_run_is_predicted_only_as_it_was_measured(tmp_path: Path) -> None:
    level = SimulationConfig(users=4, seed=7, fleet=FleetConfig("f", experts={"a": ExpertConfig()}))
    path = tmp_path / "run.json"
    run = {
        "format": FORMAT, "version": VERSION, "users": 4, "repeat": 0, "start_s": 0.0, "end_s": 1.0,
        "standings": {}, "unfinished": 0, "foreign_cores": 0.0, "engines": {}, "calibrations": {},
        "config": dataclasses.asdict(level),
    }  # fmt: skip
    path.write_text(json.dumps(run))
    check_recorded(path, level)
    with pytest.raises(ConfigError, match=r"seed must be as in the measured run \(7, .*run\.json\), got 8"):
        check_recorded(path, dataclasses.replace(level, seed=8))
    busier = dataclasses.replace(level, workload=dataclasses.replace(level.workload, think_s=9.0))
    with pytest.raises(ConfigError, match=r"workload\.think_s must be as in the measured run"):
        check_recorded(path, busier)
    queued = dataclasses.replace(level, gateway=dataclasses.replace(level.gateway, queue_limit=5))
    with pytest.raises(
        ConfigError, match=r"gateway\.queue_limit must be as in the measured run \(None, .*got 5"
    ):
        check_recorded(path, queued)
    check_recorded(path, dataclasses.replace(level, gateway=KNOWN.gateway_config(level.gateway)))
    crowded = dataclasses.replace(level.fleet, experts={"a": ExpertConfig(replicas=2)})
    with pytest.raises(ConfigError, match=r"fleet\.\S+ must be as in the measured run"):
        check_recorded(path, dataclasses.replace(level, fleet=crowded))
    for changes, message in (
        ({"version": 1}, "not the run.json of a measured run"),
        ({"config": {"userz": 4}}, "config cannot be used"),
        ({"config": {"users": "many"}}, "config cannot be used"),
    ):
        path.write_text(json.dumps({**run, **changes}))
        with pytest.raises(DataError, match=rf"run\.json: {message}.*; measure it again"):
            recorded_config(path)


def test_weights_of_another_precision_than_said_are_refused() -> None:
    check_precision("bf16", None, "fleet.experts.a")
    check_precision("int4", "awq_marlin", "fleet.experts.a")
    with pytest.raises(ConfigError, match=r"fleet\.experts\.a\.precision is fp8, but its server runs unq"):
        check_precision("fp8", None, "fleet.experts.a")
    with pytest.raises(ConfigError, match="weights quantized by gptq"):
        check_precision("fp16", "gptq", "fleet.experts.a")


def test_gpu_servers_that_share_a_machine_say_where(tmp_path: Path) -> None:
    def fleet(*gpus: list[list[int]], tp: int = 1) -> FleetConfig:
        experts = {
            f"e{i}": ExpertConfig(gpu="h100-80gb", tp=tp, live={"gpus": given} if given else {})
            for i, given in enumerate(gpus)
        }
        return FleetConfig("f", experts=experts)

    assert len(server_specs(fleet([[0]], [[1]]), tmp_path)) == 2
    assert len(server_specs(fleet([]), tmp_path)) == 1, "a server alone takes what is there"
    with pytest.raises(ConfigError, match=r"e1\.live\.gpus must be given when 2 servers share the machine"):
        server_specs(fleet([[0]], []), tmp_path)
    with pytest.raises(ConfigError, match=r"e0\.live\.gpus must be 2 of them for each replica"):
        server_specs(fleet([[0]], tp=2), tmp_path)


def test_a_failed_measurement_is_a_failed_run(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/runs.db"
    job = LiveConfig(fleet=FleetConfig("f", experts={"a": ExpertConfig()}))
    job.tracking.uri = uri
    with pytest.raises(ConfigError, match="it died"), failures_logged(job, "validate"):
        raise ConfigError("it died")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ersim-live")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED" and "it died" in run.data.tags["error"]
    job.tracking.enabled = False
    with pytest.raises(ConfigError), failures_logged(job, "validate"):
        raise ConfigError("again")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_store_that_cannot_be_used_neither_costs_a_measurement_nor_hides_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    job = LiveConfig(fleet=FleetConfig("f", experts={"a": ExpertConfig()}))
    job.tracking.uri = f"sqlite:///{tmp_path}/file/runs.db"
    began: list[str] = []
    with (
        pytest.raises(ConfigError, match=r"tracking\.uri .* cannot be used"),
        failures_logged(job, "profile"),
    ):
        began.append("servers")
    assert not began, "it is asked before anything starts"
    monkeypatch.setattr(live_tracking, "connect", lambda uri: None)

    def gone(*given: object) -> None:
        raise ConfigError("the store is gone")

    monkeypatch.setattr(live_tracking, "_new_run", gone)
    with pytest.raises(ConfigError, match="it died"), failures_logged(job, "profile"):
        raise ConfigError("it died")
    assert "not logged: the store is gone" in capsys.readouterr().err


def test_a_store_that_fails_while_it_is_written_to_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    def fails(*given: object, **more: object) -> None:
        raise MlflowException("the disk is full")

    job = LiveConfig(fleet=FleetConfig("f", experts={"a": ExpertConfig()}))
    job.tracking.uri = f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.setattr(MlflowClient, "create_run", fails)
    with pytest.raises(ConfigError, match="it died"), failures_logged(job, "validate"):
        raise ConfigError("it died")
    assert "not logged: the disk is full" in capsys.readouterr().err


def test_a_validation_is_logged_with_its_intervals_and_power(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    job = LiveConfig(fleet=FleetConfig("f", experts={"a": ExpertConfig()}))
    job.tracking.uri = f"sqlite:///{tmp_path}/runs.db"
    figures = {"measured": 1.0, "predicted": 2.0, "error": 1.0, "error_at_slowness_1": math.nan}
    rows = pd.DataFrame(
        [
            {"users": 1, "metric": "median_ttft_ms", **figures, "inside": True},
            {"users": 2, "metric": "median_ttft_ms", **figures, "inside": False},
            {"users": 2, "metric": "share_a", **figures, "inside": None},
        ]
    )
    power = {"measured": True, "why": None, "mean_w": 300.0, "joules": 9000.0, "peak_memory_bytes": 10**11}
    summaries = {
        "1": {"measured": {"power": {"measured": False, "why": "no NVML"}}},
        "2": {"measured": {"power": {**power, "joules_per_output_token": None}}},
    }
    log_validation(job, tmp_path, rows, {"mean_abs_error": {"median_ttft_ms": None}}, summaries)
    client = MlflowClient(job.tracking.uri)
    experiment = client.get_experiment_by_name("ersim-live")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])

    def logged(name: str) -> list[tuple[int, float]]:
        return sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name))

    assert logged("inside/median_ttft_ms") == [(1, 1.0), (2, 0.0)]
    assert logged("measured/median_ttft_ms") == [(1, 1.0), (2, 1.0)]
    assert logged("measured/power/mean_w") == [(2, 300.0)] and logged("measured/power/joules") == [
        (2, 9000.0)
    ]
    assert not any("slowness" in name or name == "inside/share_a" for name in run.data.metrics)
    assert "measured/power/joules_per_output_token" not in run.data.metrics


@pytest.mark.parametrize(
    "call",
    [
        "from experiments import live; sys.argv = ['live']; live.main()",
        "from experiments.long_command import run_to_its_end; run_to_its_end([sys.executable], 60.0, True)",
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_what_a_killed_command_had_started_ends_with_it(tmp_path: Path, call: str) -> None:
    child = tmp_path / "child"
    number_file, part = tmp_path / "pid", tmp_path / "pid.part"
    child.write_text(f"#!/bin/sh\necho $$ > {part}\nmv {part} {number_file}\nexec sleep 60\n")
    child.chmod(0o755)
    code = f"import sys; sys.executable = {str(child)!r}; {call}"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not number_file.exists():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    number = int(number_file.read_text())
    parent.kill()
    parent.wait()
    while runs(number):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)
