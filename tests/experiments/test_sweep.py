"""Sweeps: what they leave on disk and in MLflow, when all jobs succeed and when some fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.report import finish

QUICK = ("uncertainty=none", "workload.requests=150", "hydra.sweep.dir=sweep")


def store_of(folder: Path) -> Any:
    """An MLflow client of the test's own store."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'store' / 'mlflow.db'}")


def runs_of(client: Any) -> tuple[Any, list[Any]]:
    """The parent run and the jobs' runs of the only sweep in the store."""
    experiment = client.get_experiment_by_name("ersim")
    runs = list(client.search_runs([experiment.experiment_id]))
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    return parents[0], children


def test_a_sweep_is_compared_drawn_and_logged(ersim: Callable) -> None:
    run = ersim("-m", *QUICK, "users=1,20", "fleet=er_8x8b_int4,tp8_70b_fp16")
    assert run.code == 0, run.err
    sweep = run.folder / "sweep"
    table = pd.read_csv(sweep / "comparison.csv")
    assert len(table) == 4 and set(table["status"]) == {"finished"}
    assert set(table["line"]) == {"er_8x8b_int4", "tp8_70b_fp16"}
    assert (table["output_throughput"] > 0).all()
    figures = {path.name for path in (sweep / "figures").iterdir()}
    assert figures == {"throughput.png", "ttft.png", "tpot.png", "e2e.png", "overview.png", "cost.png"}
    assert run.record["finished"] == 4 and len(run.record["results"]) == 4
    assert "er_8x8b_int4" in run.out and "make ui" in run.out
    assert "[4/4]" in run.err

    client = store_of(run.folder)
    parent, children = runs_of(client)
    assert parent.info.status == "FINISHED" and len(children) == 4
    job = next(child for child in children if child.data.params["line"] == "tp8_70b_fp16")
    assert {key: job.data.params[key] for key in ("tp", "model", "router", "gpus")} == {
        "tp": "8",
        "model": "llama3.1-70b",
        "router": "fixed",
        "gpus": "8",
    }
    users = int(job.data.params["users"])
    history = client.get_metric_history(job.info.run_id, "output_throughput")
    assert [metric.step for metric in history] == [users]
    row = table[(table["line"] == "tp8_70b_fp16") & (table["users"] == users)].iloc[0]
    assert history[0].value == pytest.approx(row["output_throughput"])
    curve = client.get_metric_history(parent.info.run_id, "sweep/tp8_70b_fp16/output_throughput")
    assert [metric.step for metric in curve] == [1, 20]
    assert job.inputs.dataset_inputs[0].dataset.name
    artifacts = {item.path for item in client.list_artifacts(job.info.run_id)}
    assert {"summary.json", "config.yaml", "calibration.json"} <= artifacts
    assert {item.path for item in client.list_artifacts(parent.info.run_id, "figures")} == {
        f"figures/{name}" for name in figures
    }


def test_failed_jobs_are_failed_runs_and_the_rest_is_kept(ersim: Callable) -> None:
    # 4,000 prompt tokens do not fit a maximal length of 2,000: every request is rejected.
    run = ersim(
        "-m",
        *QUICK,
        "lengths=constant",
        "users=5",
        "fleet=tp8_70b_fp16",
        "workload.lengths.prompt_tokens=500,4000",
        "fleet.experts.all.engine.max_model_len=2000",
    )
    assert run.code == 1
    assert "1 of 2 jobs failed" in run.err and "no request finished" in run.err
    assert "Traceback" not in run.err
    table = pd.read_csv(run.folder / "sweep" / "comparison.csv")
    assert sorted(table["status"]) == ["failed", "finished"]
    parent, children = runs_of(store_of(run.folder))
    assert parent.info.status == "FAILED"
    assert sorted(child.info.status for child in children) == ["FAILED", "FINISHED"]
    failed = next(child for child in children if child.info.status == "FAILED")
    assert "no request finished" in failed.data.tags["error"]
    sets = {
        (item.inputs.dataset_inputs[0].dataset.name, item.inputs.dataset_inputs[0].dataset.digest)
        for item in children
    }
    assert len(sets) == 1  # the failed run names the prompt set that the finished one names
    error = json.loads(next((run.folder / "sweep").glob("*/error.json")).read_text())
    assert error["kind"] == "SimulationError"


def test_logging_again_changes_nothing_until_the_results_change(ersim: Callable) -> None:
    run = ersim("-m", *QUICK, "users=1,2")
    sweep = run.folder / "sweep"
    client = store_of(run.folder)
    first, _ = runs_of(client)
    assert finish(sweep)["mlflow"]["state"] == "unchanged"
    job = next(sweep.glob("1_*"))
    (job / "summary.json").unlink()  # as if the job had never ended
    again = finish(sweep)
    assert again["mlflow"]["state"] == "logged" and again["missing"] == 1
    second, children = runs_of(client)  # the earlier runs are gone
    assert second.info.run_id != first.info.run_id
    assert len(children) == 1 and second.info.status == "FAILED"


def test_processes_and_one_process_give_the_same_bytes(ersim: Callable) -> None:
    for launcher in ("processes", "basic"):
        options = (f"hydra/launcher={launcher}", f"hydra.sweep.dir={launcher}", "tracking.enabled=false")
        assert ersim("-m", *QUICK, "users=1,30", *options).code == 0
    here = Path.cwd()
    for one in sorted((here / "processes").glob("*/summary.json")):
        other = here / "basic" / one.relative_to(here / "processes")
        assert one.read_bytes() == other.read_bytes()
        assert (
            one.with_name("requests.parquet").read_bytes() == other.with_name("requests.parquet").read_bytes()
        )


def test_a_worker_that_dies_costs_its_own_job(ersim: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from experiments import simulate

    original = simulate._task

    def dies_at_two_users(config: Any) -> None:
        if config.users == 2:
            os._exit(9)
        original(config)

    monkeypatch.setattr(simulate, "_task", dies_at_two_users)
    run = ersim("-m", *QUICK, "users=1,2,3", "hydra.launcher.workers=2", "tracking.enabled=false")
    assert run.code == 1 and "1 of 3 jobs failed" in run.err and "exit code 9" in run.err
    table = pd.read_csv(run.folder / "sweep" / "comparison.csv").set_index("users")
    assert table["status"].to_dict() == {1: "finished", 2: "failed", 3: "finished"}


def test_seeds_are_averaged_into_one_line(ersim: Callable) -> None:
    run = ersim("-m", *QUICK, "users=2,4", "seed=0,1", "tracking.enabled=false")
    assert run.code == 0, run.err
    table = pd.read_csv(run.folder / "sweep" / "comparison.csv")
    assert table["line"].nunique() == 1 and sorted(table["seed"].unique()) == [0, 1]
    by_seed = table[table["users"] == 2].set_index("seed")["output_throughput"]
    assert by_seed[0] != by_seed[1]


def test_an_unreachable_store_costs_a_warning_not_the_sweep(ersim: Callable) -> None:
    run = ersim("-m", *QUICK, "users=1,2", "tracking.uri=sqlite:////proc/no/such/place.db")
    assert run.code == 0
    assert "not logged" in run.err and "ersim-report" in run.err
    assert len(pd.read_csv(run.folder / "sweep" / "comparison.csv")) == 2


def test_all_jobs_write_below_the_sweeps_own_folder(ersim: Callable) -> None:
    run = ersim("-m", *QUICK[:2], "users=1,2,3", "tracking.enabled=false")  # the folder's name holds the time
    assert run.record["finished"] == 3
    assert len(list((run.folder / "multirun" / "adhoc").iterdir())) == 1
