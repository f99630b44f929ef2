"""The live commands without vLLM: what they compose, refuse and hand on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ersim.config import ExpertConfig, FleetConfig, GatewayConfig
from ersim.errors import ConfigError, DataError
from experiments.gpu_session import commands
from experiments.live import split_arguments
from experiments.live_schema import LiveConfig, list_overrides
from experiments.validate import check_loads
from testbed.contention import Contention
from testbed.fleet_calibration import FleetCalibration, load, save, with_calibrations
from testbed.step_scatter import StepScatter

ROOT = Path(__file__).resolve().parents[2]
KNOWN = FleetCalibration(
    "f", {"a": "a.json"},
    {"a": Contention(1.05, {"b": 0.1}, 0.001, 0.002, [[1.0, 0.2, 0.0, 0.0]], StepScatter([0.9, 1.1], [1.0]))},
    {"network_s": 0.001, "base_s": 0.0002, "routing_s": 0.0004, "backend_network_s": 0.003},
    [3, 6], "0.32.0", [[0.001, 0.0, 0.001]],
)  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_loads_are_one_list_not_a_sweep() -> None:
    assert list_overrides(["users=1,2,4", "seed=3", "users=[5]"]) == ["users=[1,2,4]", "seed=3", "users=[5]"]


def test_both_commands_get_what_concerns_them() -> None:
    first, second = split_arguments(["fleet=f", "users=1,2", "plan.seconds=5", "live_plan=short", "seed=2"])
    assert first == ["fleet=f", "plan.seconds=5", "live_plan=short", "seed=2"]
    assert second == ["fleet=f", "users=1,2", "seed=2"]


def test_a_gpu_session_profiles_then_validates_with_overrides_last() -> None:
    profile, validate = commands("llama3_8b_bf16", "h200-141gb", "1,10", ["workload=sessions"])
    assert "install=true" in profile and "live_plan=gpu" in profile and "install=true" not in validate
    assert "users=1,10" in validate and "workload=chat" not in profile + validate


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
        (("experiments.validate", "users=0"), "users must be all >= 1"),
        (("experiments.validate", "warmup_s=90"), "warmup_s must be in"),
        (("experiments.validate", "folder=nowhere"), "ersim-profile"),
        (
            ("experiments.validate", "expert=tiny_bf16", "+expert.live.prot=1", "folder=nowhere"),
            "ersim-profile",
        ),
    ],
)
def test_bad_input_is_one_message_and_a_status(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr
