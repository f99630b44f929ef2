"""A value that no group can have is one line that names key, value and what there is instead."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ersim.errors import ConfigError
from experiments import calibrate, profile, route, simulate, validate
from experiments.group_values import check_groups
from experiments.paths import conf_dir

COMMANDS = {
    "ersim": simulate,
    "ersim-profile": profile,
    "ersim-validate": validate,
    "ersim-route": route,
    "ersim-calibrate": calibrate,
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fleet=null"], r"^fleet must be one of: er_2x70b_fp16, .*; got 'null'; leave it out"),
        (["seed=3", "router=2"], r"^router must be one of: .*predictive.*; got '2'"),
        (["workload=true"], r"^workload must be one of: bursty, "),
        (["+fleet=null"], r"^fleet must be one of"),
        (["-m", "fleet=er_mixed,null"], r"^fleet must be one of: .*; got 'null'"),
        (["expert@fleet.experts.code=null"], r"^expert@fleet\.experts\.code must be one of: llama3_70b"),
        (["expert=null"], r"^expert=null: expert is not chosen here: use expert@fleet\.experts\.EXPERT=NAME"),
        (["live_plan=null"], r"^live_plan=null: live_plan is not chosen here: use another command"),
        (["hydra/launcher=null"], r"^hydra/launcher must be a name, got 'null'"),
        (["~router=3"], r"^~router takes no value, got '3'"),
    ],
)
def test_what_is_no_name_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        check_groups(arguments, conf_dir(), "config")
    assert "\n" not in str(raised.value)


def test_what_hydra_takes_or_refuses_itself_is_left_to_it(tmp_path: Path) -> None:
    fine = ["fleet=er_mixed", "fleet=[]", "fleet={}", "~fleet", "~router=cluster", "workload.requests=null"]
    check_groups([*fine, "--help", "not an override", "fleet=", "nobody=null"], conf_dir(), "config")
    check_groups(["fleet=live_cpu,er_mixed", "users=1,2"], conf_dir(), "config")
    check_groups([], conf_dir(), "config")
    check_groups(["mine=null"], conf_dir(), "config")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"^mine must be one of: own; got 'null'"):
        check_groups(["--config-dir", str(tmp_path), "+mine=null"], conf_dir(), "config")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("gpu=null", "field 'gpu' is not Optional"),
        ("model=null", "field 'model' is not Optional"),
        ("gpu=1", "gpu must be one of: a10, "),
        ("model=1", "model must be one of: codellama-34b, "),
    ],
)
def test_a_commands_own_key_of_a_groups_name_is_its_own_to_check(
    override: str, told: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ersim-calibrate", override, "source=roofline"])
    with pytest.raises(SystemExit) as ended:
        calibrate.main()
    err = capfd.readouterr().err
    assert ended.value.code == 1 and told in err and "is not chosen here" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_it_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    override = "hydra/output=null" if command == "ersim-calibrate" else "fleet=null"
    monkeypatch.setattr(sys, "argv", [command, override])
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command].main()  # type: ignore[attr-defined]
    told = capsys.readouterr()
    assert ended.value.code == 1 and not told.out
    (line,) = told.err.splitlines()
    assert line.startswith(f"{command}: {override.partition('=')[0]} must be ") and "got 'null'" in line
