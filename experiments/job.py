"""One run: simulate, and leave a folder that explains itself even when the run fails."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ersim.errors import ErsimError
from ersim.util.files import write_json, write_text
from experiments.schema import to_run, to_simulation

SUMMARY, ERROR, CONFIG = "summary.json", "error.json", "config.yaml"


def run_job(config: DictConfig, folder: Path, workers: int = 1) -> dict[str, Any]:
    """Simulate `config` into `folder` on `workers` processes and return the summary.

    Writes config.yaml first; then summary.json, requests.parquet and what else `Result.write`
    leaves, or error.json (kind, message, traceback, seconds). Raises what the simulation raised.
    """
    import ersim
    from experiments.check import preparations

    began_s = time.perf_counter()
    write_text(folder / CONFIG, OmegaConf.to_yaml(config, resolve=True))
    (folder / ERROR).unlink(missing_ok=True)
    try:
        result = ersim.simulate(to_simulation(to_run(config)), preparations(), workers)
        result.write(folder)
        summary: dict[str, Any] = dict(result.summary)
        return summary
    except Exception as error:
        write_json(folder / ERROR, describe_error(error, time.perf_counter() - began_s))
        raise


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_error(error: Exception, elapsed_s: float) -> dict[str, Any]:
    """What error.json holds; a traceback only for errors that ersim did not raise on purpose."""
    record: dict[str, Any] = {"error": str(error), "kind": type(error).__name__, "elapsed_s": elapsed_s}
    partial = getattr(error, "partial", None)
    if partial:
        record["finished"] = partial
    if not isinstance(error, ErsimError):
        record["traceback"] = "".join(traceback.format_exception(error))
    return record


def job_weight(config: DictConfig) -> float:
    """A guess of a job's cost, for the order of jobs and the progress bar's time left.

    Requests to simulate, by replications; small fleets take more steps in all, not more requests.
    """
    requests = config.workload.requests or max(2000, 10 * int(config.users))
    replications = str(config.get("replications") or config.uncertainty.replications)
    count = int(replications) if replications.isdigit() else int(config.uncertainty.min_replications)
    return float(requests * count)
