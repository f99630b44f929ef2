"""The measured runs that come with the project, predicted again: real servers against today's simulator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

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
