"""Profiles and validations into MLflow: scalars as params, errors as metrics, files as artifacts."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ersim.errors import ErsimError
from experiments.live_schema import LiveConfig, say
from experiments.tracking import connect, experiment_id, metric_name

POWER = ("mean_w", "joules", "joules_per_output_token", "peak_memory_bytes")  # see `measured.power_figures`


def _new_run(job: LiveConfig, name: str, kind: str) -> tuple[Any, str]:
    client = connect(job.tracking.uri)
    experiment = experiment_id(client, f"{job.tracking.experiment}-live", job.tracking.uri)
    run = client.create_run(experiment, run_name=name, tags={"ersim.kind": kind})
    return client, str(run.info.run_id)


def _finish(
    client: Any, run_id: str, metrics: Sequence[tuple[str, float, int]], params: Mapping[str, Any],
    files: Sequence[Path],
) -> None:  # fmt: skip
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        [Metric(metric_name(key), float(value), now, step) for key, value, step in metrics],
        [Param(key, str(value)) for key, value in params.items()],
    )
    for path in files:
        if path.is_file():
            client.log_artifact(run_id, str(path))
    client.set_terminated(run_id)
    say(f"MLflow: run {run_id}")


@contextlib.contextmanager
def failures_logged(job: LiveConfig, kind: str) -> Iterator[None]:
    """Leave a FAILED run with the error in MLflow when what happens inside raises; the error goes on.

    Raises ConfigError, before anything happens inside, for a store that cannot be used; one that stops
    answering meanwhile costs a line.
    """
    tracked = job.tracking.enabled is not False and job.fleet is not None
    if tracked:
        connect(job.tracking.uri)
    try:
        yield
    except BaseException as error:
        if tracked:
            from mlflow.exceptions import MlflowException

            try:
                _log_failure(job, kind, error)
            except (ErsimError, MlflowException, OSError) as unlogged:
                say(f"not logged: {unlogged}")
        raise


def _log_failure(job: LiveConfig, kind: str, error: BaseException) -> None:
    """One FAILED run with the error's text."""
    assert job.fleet is not None
    client, run_id = _new_run(job, f"{kind} {job.fleet.name}", kind)
    client.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:5000])
    client.set_terminated(run_id, "FAILED")
    say(f"MLflow: failed run {run_id}")


def log_profile(job: LiveConfig, folder: Path, figures: Mapping[str, Any]) -> None:
    """One run per expert: held-out error, noise, calibration file and figure."""
    assert job.fleet is not None
    for name, item in figures["experts"].items():
        expert = job.fleet.experts[name]
        client, run_id = _new_run(job, f"profile {name}", "profile")
        numbers = [
            (key, item[key], 0)
            for key in ("held_out_mape", "held_out_median_mape", "mape", "step_noise", "recorder_overhead")
        ]
        found = figures["contention"][name]
        numbers += [(f"contention/{key}", found[key], 0) for key in ("base", "token_wait_s")]
        numbers += [(f"contention/slowdown/{other}", by, 0) for other, by in found["slowdowns"].items()]
        params = {
            "fleet": figures["fleet"], "expert": name, "model": expert.model, "precision": expert.precision,
            "gpu": expert.gpu, "tp": expert.tp, "steps": item["steps"], "kv_blocks": item["kv_blocks"],
            "vllm_version": item["vllm_version"], "digest": item["digest"], "seed": job.seed,
        }  # fmt: skip
        files = [folder / f"{name}.json", folder / f"{name}.png", folder / "fleet.json"]
        _finish(client, run_id, numbers, params, files)


def _validated(rows: pd.DataFrame) -> list[tuple[str, float, int]]:
    """Every finite figure of the comparison at step = users; inside is 1 or 0."""
    numbers: list[tuple[str, float, int]] = []
    for row in rows.itertuples():
        for kind in ("measured", "predicted", "error", "error_at_slowness_1", "inside"):
            told = getattr(row, kind)
            value = math.nan if told is None else float(told)
            if abs(value) < 1e300:
                numbers.append((f"{kind}/{row.metric}", value, int(row.users)))
    return numbers


def _power(summaries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float, int]]:
    """Measured power and energy of every load at step = users; none where it was not measured."""
    numbers: list[tuple[str, float, int]] = []
    for users, item in summaries.items():
        power = item["measured"]["power"]
        for name in POWER if power["measured"] else ():
            if power[name] is not None:
                numbers.append((f"measured/power/{name}", float(power[name]), int(users)))
    return numbers


def log_validation(
    job: LiveConfig,
    folder: Path,
    rows: pd.DataFrame,
    figures: Mapping[str, Any],
    summaries: Mapping[str, Mapping[str, Any]],
) -> None:
    """One run: figures, errors, whether inside the interval, and measured power, each at step = users.

    summaries: by load, each with what was measured.
    """
    assert job.fleet is not None
    client, run_id = _new_run(job, f"validate {job.fleet.name}", "validate")
    numbers = [*_validated(rows), *_power(summaries)]
    means = figures["mean_abs_error"].items()
    numbers += [(f"mean_error/{key}", value, 0) for key, value in means if value is not None]
    params = {"fleet": job.fleet.name, "seed": job.seed, "seconds": job.seconds, "router": job.router.policy}
    files = [
        folder / "validation.csv",
        folder / "validation.png",
        folder / "validation.json",
        folder / "fleet.json",
    ]
    _finish(client, run_id, numbers, params, files)
