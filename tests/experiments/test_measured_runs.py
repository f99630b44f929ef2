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
MEASURED = ROOT / "experiments" / "measured" / "cpu" / "live_cpu"
LOADS = (1, 2, 4, 8, 16)
MOST_BYTES = 2 * 2**20


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measured loop on two CPU cores, moved elsewhere and predicted from what lies beside it."""
    folder = tmp_path_factory.mktemp("again") / "live_cpu"
    shutil.copytree(MEASURED, folder)
    command = [
        sys.executable, "-m", "experiments.validate", "fleet=live_cpu", f"users={list(LOADS)}",
        f"folder={folder}", "measure=false", "replications=4", "tracking.enabled=false",
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


def test_most_figures_lie_in_their_intervals(predicted: Path) -> None:
    rows = pd.read_csv(predicted / "validation.csv")
    assert set(rows["users"]) == set(LOADS) and len(rows) == 110
    assert rows["inside"].mean() > 0.75, "four replications make rough intervals"


def test_steps_held_out_were_predicted_within_five_percent() -> None:
    for name in ("large", "small"):
        fit = json.loads((MEASURED / f"{name}.json").read_text())["fit"]
        assert fit["held_out_median_mape"] < 0.05 and fit["held_out_steps"] > 300


def test_measured_files_are_small_and_name_no_machine() -> None:
    files = [path for path in MEASURED.rglob("*") if path.is_file()]
    assert len(files) > 70 and all(path.stat().st_size < MOST_BYTES for path in files)
    for path in MEASURED.rglob("run.json"):
        record = json.loads(path.read_text())
        experts = record["config"]["fleet"]["experts"].values()
        assert {expert["calibration"] for expert in experts} == {"../../large.json", "../../small.json"}


def _steps(folder: Path) -> list[pd.DataFrame]:
    return [pd.read_parquet(folder / f"steps_{name}.parquet") for name in ("large", "small")]


def test_long_gateway_times_are_moments_in_which_gateway_or_client_got_no_core() -> None:
    """At 8 and 16 users: steps go on in both experts, not a token of anyone reaches a client meanwhile."""
    waits = 0
    for folder in (path for users in (8, 16) for path in sorted(MEASURED.glob(f"runs/u{users}r?"))):
        requests, tokens = (pd.read_parquet(folder / f"{one}.parquet") for one in ("requests", "gaps"))
        for row in requests[requests["gateway_s"] > 0.015].itertuples():
            inbound_s = row.submit_s - row.send_s
            back_s = row.gateway_s - inbound_s
            begin_s = row.send_s if inbound_s > back_s else row.first_token_s - back_s
            end_s = begin_s + max(inbound_s, back_s)
            for steps in _steps(folder):
                over = np.minimum(steps["end_s"], end_s) - np.maximum(
                    steps["end_s"] - steps["period_s"], begin_s
                )
                assert over.clip(lower=0.0).sum() > 0.99 * (end_s - begin_s)
            seen_s = tokens["end_s"][tokens["end_s"].between(begin_s, end_s)].sort_values()
            silence_s = np.diff([begin_s, *seen_s, end_s]).max()
            assert silence_s > 0.95 * (end_s - begin_s)
            waits += 1
    assert waits == 13


def test_tokens_are_held_up_where_both_cores_compute() -> None:
    """Steps after which no client saw a token for 50 ms, up to 8 users: with a core free and with none."""
    held: dict[bool, list[bool]] = {True: [], False: []}
    for folder in sorted(MEASURED.glob("runs/u[1248]r?")):
        tokens_s = np.sort(pd.read_parquet(folder / "gaps.parquet")["end_s"])
        both = _steps(folder)
        for own, other in (both, both[::-1]):
            ends_s = own["end_s"].to_numpy()
            starts_s = ends_s - own["period_s"].to_numpy()
            other_starts_s = (other["end_s"] - other["period_s"]).to_numpy()
            follows = np.append(starts_s[1:], np.inf) < ends_s + 0.005
            upcoming = np.searchsorted(other["end_s"], ends_s, side="right")
            beside = np.append(other_starts_s, np.inf)[upcoming] < ends_s + 0.01
            seen = np.searchsorted(tokens_s, ends_s)
            known = (own["decode_seqs"] > 0).to_numpy() & (seen < len(tokens_s))
            late = np.append(tokens_s, np.nan)[seen] - ends_s > 0.05
            for busy, its in held.items():
                its += late[known & ((follows & beside) == busy)].tolist()
    assert len(held[True]) > 5000 and np.mean(held[True]) > 0.005
    assert len(held[False]) > 4000 and np.mean(held[False]) < 0.0005


@pytest.mark.parametrize(
    ("name", "damaged", "message"),
    [
        ("steps_small.parquet", False, "is missing (the engine steps of server small); measure again with"),
        ("gaps.parquet", False, "is missing (the times between their tokens); measure again with"),
        ("run.json", False, "it cannot be read: No such file or directory); measure it again"),
        ("steps_large.parquet", True, "not the steps of a measured run"),
    ],
)
def test_a_file_that_is_not_there_is_named_before_anything_is_simulated(
    tmp_path: Path, name: str, damaged: bool, message: str
) -> None:
    folder = tmp_path / "live_cpu"
    shutil.copytree(MEASURED, folder)
    path = folder / "runs" / "u16r2" / name
    path.write_text("damaged") if damaged else path.unlink()
    command = [
        sys.executable, "-m", "experiments.validate", "fleet=live_cpu", f"users={list(LOADS)}",
        f"folder={folder}", "measure=false", "tracking.enabled=false",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and f"{path}" in done.stderr and message in done.stderr
    assert "Traceback" not in done.stderr and "simulating" not in done.stderr
