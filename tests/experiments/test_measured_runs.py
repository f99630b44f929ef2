"""The measured runs that come with the project, predicted again: real servers against today's simulator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "experiments" / "measured" / "cpu"
MEASURED = CPU / "live_cpu"
WAITS = CPU / "live_cpu_waits"  # of the recorder that counts what steps wait for their core
RESTLESS = CPU / "live_cpu_restless"  # beside busy tenants; its probe does a product of matrices
MEANS = CPU / "live_cpu_means"  # fitted to the means of steps
PAIRS = CPU / "live_cpu_pairs"  # profiled with batches of six rows too
ALL = [MEASURED, WAITS, RESTLESS, MEANS, PAIRS]
RUNS = pytest.mark.parametrize("measured", ALL, ids=lambda folder: folder.name)
QUIET = pytest.mark.parametrize("measured", [MEASURED, WAITS, MEANS, PAIRS], ids=lambda folder: folder.name)
LOADS = (1, 2, 4, 8, 16)
MOST_BYTES = 2 * 2**20


@pytest.fixture(scope="module", params=ALL, ids=lambda folder: folder.name)
def predicted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured loop on two CPU cores, moved elsewhere and predicted from what lies beside it."""
    folder = tmp_path_factory.mktemp("again") / "live_cpu"
    shutil.copytree(request.param, folder)
    command = [
        sys.executable, "-m", "experiments.validate", "fleet=live_cpu", f"users={list(LOADS)}",
        f"folder={folder}", "measure=false", "tracking.enabled=false",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_bar_that_the_live_loop_must_meet_is_met(predicted: Path) -> None:
    figures = json.loads((predicted / "validation.json").read_text())
    assert figures["bars_met"] == "20/20", figures["errors"]
    assert figures["bars"] == {
        "output_throughput": 0.05, "median_tpot_ms": 0.08, "median_e2el_ms": 0.08, "median_ttft_ms": 0.15,
    }  # fmt: skip


def test_medians_of_the_blind_runs_meet_the_bars_and_are_as_stated() -> None:
    """`live_runs.csv`: every run of the present way of predicting, as it was predicted when it ended."""
    runs = pd.read_csv(CPU / "live_runs.csv")
    assert len(runs) == 7 * 20 and runs.groupby("ended").size().eq(20).all()
    np.testing.assert_allclose(runs.error, runs.predicted / runs.measured - 1, atol=2e-4)
    assert runs.inside.equals((runs.low <= runs.measured) & (runs.measured <= runs.high))
    bars = {"output_throughput": 0.05, "median_tpot_ms": 0.08, "median_e2el_ms": 0.08, "median_ttft_ms": 0.15}
    medians = runs.groupby(["metric", "users"]).error.median().abs().groupby("metric").max()
    stated = {
        "output_throughput": 0.0122, "median_tpot_ms": 0.0439, "median_e2el_ms": 0.0264,
        "median_ttft_ms": 0.0424,
    }  # fmt: skip
    quiet = ["11:36", "11:51", "14:34", "15:39"]
    worst = runs[runs.ended.str[11:16].isin(quiet)].groupby("metric").error.apply(lambda e: e.abs().max())
    met = {name: (part.error.abs() <= part.metric.map(bars)).sum() for name, part in runs.groupby("ended")}
    for metric, bar in bars.items():
        assert medians[metric] == pytest.approx(stated[metric], abs=6e-4) and medians[metric] < bar
    assert worst.round(3).to_dict() == {
        "output_throughput": 0.027, "median_tpot_ms": 0.076, "median_e2el_ms": 0.081, "median_ttft_ms": 0.132,
    }  # fmt: skip
    assert list(met.values()) == [20, 20, 18, 18, 20, 18, 19]


def test_errors_on_steps_held_out_stand_beside_the_bars(predicted: Path) -> None:
    stated = json.loads((predicted / "validation.json").read_text())["held_out"]
    for name, error in stated["error"].items():
        assert error == json.loads((predicted / f"{name}.json").read_text())["fit"]["held_out_median_mape"]
    met = sum(error <= 0.05 for error in stated["error"].values())
    assert set(stated["error"]) == {"large", "small"}
    assert stated["bar"] == 0.05 and stated["bars_met"] == f"{met}/2" and met > 0


def test_most_figures_lie_in_their_intervals(predicted: Path) -> None:
    rows = pd.read_csv(predicted / "validation.csv")
    assert set(rows["users"]) == set(LOADS) and len(rows) == 110
    assert rows["inside"].mean() > 0.85


@QUIET
def test_steps_held_out_were_predicted_within_five_percent(measured: Path) -> None:
    """On the restless host it was 5.8 and 4.4 %."""
    for name in ("large", "small"):
        fit = json.loads((measured / f"{name}.json").read_text())["fit"]
        assert fit["held_out_median_mape"] < 0.05 and fit["held_out_steps"] > 300


@RUNS
def test_measured_files_are_small_and_name_no_machine(measured: Path) -> None:
    files = [path for path in measured.rglob("*") if path.is_file()]
    assert len(files) > 70 and all(path.stat().st_size < MOST_BYTES for path in files)
    for path in measured.rglob("run.json"):
        record = json.loads(path.read_text())
        experts = record["config"]["fleet"]["experts"].values()
        assert {expert["calibration"] for expert in experts} == {"../../large.json", "../../small.json"}


def test_no_request_waits_long_at_the_gateway() -> None:
    """Gateway and client share the experts' cores; with servers bound to theirs they get one in time.

    Not so in the run with waits: its very first request, before anything is judged, took 16.9 ms.
    """
    waits_s = [
        pd.read_parquet(path)["gateway_s"].dropna() for path in MEASURED.glob("runs/u*/requests.parquet")
    ]
    assert sum(map(len, waits_s)) > 700 and max(wait.max() for wait in waits_s) < 0.015


@RUNS
def test_no_token_is_held_up_while_both_cores_compute(measured: Path) -> None:
    """After no step, up to 8 users, with the other expert in one too, did clients see nothing for 50 ms."""
    late: list[bool] = []
    for folder in sorted(measured.glob("runs/u[1248]r?")):
        tokens_s = np.sort(pd.read_parquet(folder / "gaps.parquet")["end_s"])
        both = [pd.read_parquet(folder / f"steps_{name}.parquet") for name in ("large", "small")]
        for own, other in (both, both[::-1]):
            ends_s = own["end_s"].to_numpy()
            starts_s = ends_s - own["period_s"].to_numpy()
            other_starts_s = (other["end_s"] - other["period_s"]).to_numpy()
            follows = np.append(starts_s[1:], np.inf) < ends_s + 0.005
            upcoming = np.searchsorted(other["end_s"], ends_s, side="right")
            beside = np.append(other_starts_s, np.inf)[upcoming] < ends_s + 0.01
            seen = np.searchsorted(tokens_s, ends_s)
            known = (own["decode_seqs"] > 0).to_numpy() & (seen < len(tokens_s))
            held = np.append(tokens_s, np.nan)[seen] - ends_s > 0.05
            late += held[known & follows & beside].tolist()
    assert len(late) > 5000 and not any(late)
