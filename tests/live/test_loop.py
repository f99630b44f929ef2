"""The whole loop, short: profile, run live, simulate the same, compare; all figures where they belong.

Machines that run tests are shared and noisy, so the bars of `make live` are not asserted here. What
does not depend on the clock is: batches replay, requests go where the simulator says, nothing fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("vllm", reason="needs the real vLLM: make test-live")
pytestmark = pytest.mark.live
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The short live loop in a folder of its own; returns it and the last line of output."""
    folder = tmp_path_factory.mktemp("loop")
    command = [
        sys.executable, "-m", "experiments.live", "live_plan=short", "users=1,4", "seconds=12", "warmup_s=2",
        "repeats=2", "replications=4", f"folder={folder}", f"tracking.uri=sqlite:///{folder}/runs.db",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return folder, figures


def test_the_loop_leaves_calibrations_runs_and_figures(loop: tuple[Path, dict[str, object]]) -> None:
    folder, _ = loop
    for name in ("large.json", "small.json", "fleet.json", "large.png", "validation.csv", "validation.png"):
        assert (folder / name).stat().st_size > 0, name
    for tag in ("u1r0", "u1r1", "u4r0", "u4r1"):
        assert len(pd.read_parquet(folder / "runs" / tag / "requests.parquet")) > 0
        steps = pd.read_parquet(folder / "runs" / tag / "steps_large.parquet")
        assert len(steps) > 0 and (steps["stretch"] >= 1.0).all() and steps["probe_s"].notna().any()


def test_recorded_steps_replay_through_the_engine(loop: tuple[Path, dict[str, object]]) -> None:
    replays = loop[1]["replay"]
    assert isinstance(replays, dict) and set(replays) == {"large", "small"}
    for result in replays.values():
        assert result["steps"] > 100 and result["share"] == 1.0, result["first_difference"]


@pytest.mark.parametrize("repeat", [0, 1])
def test_measured_requests_went_where_the_simulator_says(
    loop: tuple[Path, dict[str, object]], repeat: int
) -> None:
    """Policy and workload are one code: request by request the same expert, prompt and lengths."""
    from ersim.prepare import Preparations
    from experiments.validate import recorded_config
    from testbed.fleet_calibration import load
    from testbed.predict import predict_once

    folder, _ = loop
    run = folder / "runs" / f"u4r{repeat}"
    config, shared = recorded_config(run / "run.json"), Preparations()
    output = predict_once(config, shared, load(folder), 0, repeat=repeat)
    told = output.requests.set_index("request_id")
    real = pd.read_parquet(run / "requests.parquet").set_index("request_id")
    both = told.index.intersection(real.index)
    assert len(both) > 5
    for column in ("expert", "prompt_index", "prompt_tokens", "output_tokens", "user"):
        assert (told.loc[both, column] == real.loc[both, column]).all(), column
    assert (real["status"] == "completed").all()


def test_the_run_is_in_mlflow(loop: tuple[Path, dict[str, object]]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{loop[0]}/runs.db")
    experiment = client.get_experiment_by_name("ersim-live")
    assert experiment is not None
    names = {run.info.run_name for run in client.search_runs([experiment.experiment_id])}
    assert names == {"profile large", "profile small", "validate live_cpu"}
