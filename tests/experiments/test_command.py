"""The `ersim` command: single runs, and bad input that ends in one clear message with nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

QUICK = ("uncertainty=none", "workload.requests=150")
BAD_INPUT = {
    "unknown fleet": (("fleet=er_nope",), 1, ["er_nope", "er_8x8b_fp16", "tp8_70b_fp16"]),
    "no name for a group": (("fleet=null",), 1, ["ersim: fleet must be one of", "er_mixed", "got 'null'"]),
    "unknown group": (("flet=er_mixed",), 1, ["flet", "did you mean fleet?"]),
    "unknown key": (("workload.think=3",), 1, ["workload", "did you mean think_s?"]),
    "unknown key of an expert": (("fleet.experts.code.modell=x",), 1, ["did you mean model?", "precision"]),
    "unknown expert": (
        ("fleet=er_mixed", "fleet.experts.code_mat.replicas=2"),
        1,
        ["er_mixed", "'code_mat'", "did you mean code_math?", "science_medicine", "llama3_8b_int4"],
    ),
    "unknown expert, added": (
        ("+fleet.experts.cook.tp=2",),
        1,
        ["'cook'", "history", "expert@fleet.experts.cook"],
    ),
    "unknown expert, removed": (("~fleet.experts.cook",), 1, ["'cook'", "history"]),
    "a name for an expert's values": (
        ("fleet.experts.code=llama3_8b_int4",),
        1,
        ["expert@fleet.experts.code=llama3_8b_int4"],
    ),
    "unknown file for an expert": (("expert@fleet.experts.code=nope",), 1, ["nope", "llama3_8b_int4"]),
    "gpu at the top": (("gpu=h900",), 1, ["fleet.gpu=NAME", "no 'h900'", "h100-80gb"]),
    "calibration at the top": (
        ("calibration=best",),
        1,
        ["calibration=list", "fleet.experts.EXPERT.calibration"],
    ),
    "quotes in a mapping": (
        ("prompts=file", 'workload.prompts.quality_columns={"*":"score__*"}'),
        1,
        ["'+workload.prompts.quality_columns={*:score__*}'"],
    ),
    "wrong type": (("users=many",), 1, ["users", "many", "Integer"]),
    "no users": (("users=0",), 2, ["users must be >= 1, got 0"]),
    "unknown precision": (("fleet.experts.code.precision=int3",), 2, ["precision", "int4", "'int3'"]),
    "unknown model": (("fleet.experts.code.model=llama9",), 2, ["llama9", "llama3.1-8b"]),
    "unknown gpu": (("fleet.gpu=h900",), 2, ["h900", "h100-80gb"]),
    "unknown policy": (("router.policy=magic",), 2, ["magic", "round_robin"]),
    "unknown balancer": (("router.balancer=magic",), 2, ["magic", "least_outstanding"]),
    "70B on one small GPU": (
        ("fleet=er_8x70b_int4", "fleet.gpu=l4"),
        2,
        ["does not fit"],
    ),
    "prompt file missing": (("prompts=file", "workload.prompts.path=gone.csv"), 2, ["gone.csv"]),
    "trace missing": (("workload=trace", "workload.trace_path=gone.csv"), 2, ["gone.csv"]),
    "value that must be given": (("workload=trace",), 2, ["workload.trace_path"]),
}


def left_behind(folder: Path) -> list[Path]:
    """All files below `folder`."""
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("case", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_message_and_nothing_written(case: tuple, ersim: Callable) -> None:
    arguments, code, said = case
    run = ersim(*QUICK, *arguments)
    assert run.code == code
    assert [text for text in said if text not in run.err] == []
    assert "Traceback" not in run.err
    assert left_behind(run.folder) == []


def test_a_sweep_with_one_bad_value_starts_no_job(ersim: Callable) -> None:
    run = ersim("-m", *QUICK, "users=1,10,0", "fleet=er_mixed,er_8x8b_fp16")
    assert run.code == 2
    assert "users must be >= 1, got 0" in run.err and "no job was started" in run.err
    assert left_behind(run.folder) == []


def test_a_sweep_with_an_unknown_fleet_starts_no_job(ersim: Callable) -> None:
    run = ersim("-m", *QUICK, "users=1,10", "fleet=er_mixed,er_nope")
    assert run.code == 1
    assert "er_nope" in run.err and "er_8x8b_fp16" in run.err
    assert [path.name for path in left_behind(run.folder)] == []


def test_a_single_run_leaves_files_that_explain_it(ersim: Callable) -> None:
    run = ersim(*QUICK, "users=7", "seed=3", "hydra.run.dir=out")
    assert run.code == 0, run.err
    out = run.folder / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["users"] == 7 and summary["seed"] == 3
    assert run.record["output_throughput"] == summary["output_throughput"]
    requests = pd.read_parquet(out / "requests.parquet")
    assert len(requests) >= 150
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["users"] == 7 and config["fleet"]["experts"]["code"]["gpu"] == "h100-80gb"
    calibration = json.loads((out / "calibration.json").read_text())
    assert set(calibration) == set(config["fleet"]["experts"])
    assert "output tokens/s" in run.out and "TTFT p99, ms" in run.out


def test_an_open_loop_is_headed_by_its_rate_not_by_users(ersim: Callable) -> None:
    run = ersim(*QUICK, "workload=poisson", "workload.rate_rps=12.5")
    assert run.code == 0, run.err
    assert "12.5 requests/s offered" in run.out.splitlines()[0]
    assert run.record["request_rate"] == 12.5 and run.record["max_concurrency"] is None


def test_the_same_command_gives_the_same_bytes(ersim: Callable) -> None:
    for name in ("one", "two"):
        assert ersim(*QUICK, f"hydra.run.dir={name}").code == 0
    folder = Path.cwd()
    for file in ("summary.json", "requests.parquet"):
        assert (folder / "one" / file).read_bytes() == (folder / "two" / file).read_bytes()


def test_a_run_that_fails_says_why_and_keeps_its_configuration(ersim: Callable) -> None:
    lengths = (
        "lengths=constant workload.lengths.prompt_tokens=9000"  # longer than max_model_len: all rejected
    )
    run = ersim(*QUICK, *lengths.split(), "hydra.run.dir=out")
    assert run.code == 1
    assert "no request finished" in run.err and "Traceback" not in run.err
    error = json.loads((run.folder / "out" / "error.json").read_text())
    assert "no request finished" in error["error"]
    assert (run.folder / "out" / "config.yaml").is_file()
    assert not (run.folder / "out" / "summary.json").exists()


def test_help_and_cfg_name_the_groups(ersim: Callable) -> None:
    shown = ersim("--help")
    assert shown.code == 0
    assert "er_8x8b_int4" in shown.out and "ersim experiment=flagship" in shown.out
    composed = ersim("--cfg", "job", "fleet=tp8_70b_fp16")
    config = yaml.safe_load(composed.out)
    assert config["router"]["policy"] == "fixed" and config["gateway"]["workers"] is None


def test_the_command_line_wins_over_a_baselines_own_router(ersim: Callable) -> None:
    config = yaml.safe_load(ersim("--cfg", "job", "fleet=tp8_70b_fp16", "router=round_robin").out)
    assert config["router"]["policy"] == "round_robin"


def test_calibrations_are_listed(ersim: Callable) -> None:
    run = ersim("calibration=list")
    assert run.code == 0
    names = {row["name"] for row in run.record["calibrations"]}
    assert any("llama3.1-70b" in name for name in names) and "held-out" in run.out


def test_fitted_routers_are_kept_where_an_environment_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.paths import cache_dir

    monkeypatch.setenv("ERSIM_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.setenv("ERSIM_CACHE", "")
    assert cache_dir() is None
    monkeypatch.delenv("ERSIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "ersim"


def test_an_unknown_expert_of_a_fleet_of_ones_own_lists_that_fleets_experts(ersim: Callable) -> None:
    Path("mine/fleet").mkdir(parents=True)
    Path("mine/fleet/own.yaml").write_text(
        "defaults: [{/expert@experts.cooking: llama3_8b_int4}, _self_]\nname: own\n"
    )
    run = ersim("--config-dir", "mine", "fleet=own", "fleet.experts.code.tp=2")
    assert run.code == 1 and "fleet own has no expert 'code'" in run.err and "cooking" in run.err


def test_a_star_stands_for_every_model_on_the_command_line_too(ersim: Callable) -> None:
    pd.DataFrame(
        {
            "prompt": [f"text {n} about music and law" for n in range(40)],
            "score__llama": [n % 2 for n in range(40)],
            "score__qwen": [1 - n % 2 for n in range(40)],
        }
    ).to_csv("mine.csv")
    options = ("prompts=file", "workload.prompts.path=mine.csv", "workload.prompts.domain_column=null")
    run = ersim(
        *QUICK,
        *options,
        "+workload.prompts.quality_columns={*:score__*}",
        "router=random",
        "hydra.run.dir=out",
    )
    assert run.code == 0, run.err
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    assert config["workload"]["prompts"]["quality_columns"] == {"*": "score__*"}


def test_a_single_run_that_fails_is_a_failed_run_in_mlflow(ersim: Callable) -> None:
    lengths = "lengths=constant workload.lengths.prompt_tokens=9000 tracking.enabled=true"
    run = ersim(*QUICK, *lengths.split())
    assert run.code == 1
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.folder.parent / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ersim")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FAILED" and "no request finished" in logged.data.tags["error"]
    assert logged.inputs.dataset_inputs[0].dataset.name == "built-in"
