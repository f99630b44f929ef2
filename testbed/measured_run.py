"""A measured run as a folder: small files, with everything needed to simulate it again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ersim.config import SimulationConfig
from ersim.util.files import write_atomically, write_json
from testbed.live_run import LiveRun
from testbed.step_log import StepLog


def steps_frame(log: StepLog, start_s: float) -> pd.DataFrame:
    """One row per engine step: when, how long, and what ran; times on the run's clock."""
    batches = [step.batch() for step in log.steps]
    rows: dict[str, Any] = {
        "end_s": log.ends_s() - start_s,
        "period_s": log.periods_s(),
        "tokens": [batch.tokens for batch in batches],
        "decode_seqs": [batch.decode_seqs for batch in batches],
        "decode_context_tokens": [batch.decode_context_tokens for batch in batches],
        "decode_context_max": [batch.decode_context_max for batch in batches],
        "prefill_tokens": [sum(chunk for chunk, _ in batch.prefills) for batch in batches],
        "prefill_chunks": [str(list(batch.prefills)) if batch.prefills else "" for batch in batches],
        "running": [step.running for step in log.steps],
        "waiting": [step.waiting for step in log.steps],
        "blocks_used": [step.blocks_used for step in log.steps],
        "preempted": [len(step.preempted) for step in log.steps],
    }
    return pd.DataFrame(rows)


def _parquet(frame: pd.DataFrame, path: Path) -> None:
    write_atomically(path, lambda temporary: frame.to_parquet(temporary, index=False, compression="zstd"))


def write_run(run: LiveRun, config: SimulationConfig, folder: Path) -> None:
    """Write requests.parquet, gaps.parquet, steps_<expert>.parquet and run.json."""
    _parquet(run.requests, folder / "requests.parquet")
    gaps = {key: np.asarray(value) for key, value in dataclasses.asdict(run.gaps).items()}
    _parquet(pd.DataFrame(gaps), folder / "gaps.parquet")
    for name, log in run.logs.items():
        _parquet(steps_frame(log, run.load.start_s), folder / f"steps_{name}.parquet")
    write_json(
        folder / "run.json",
        {
            "users": run.users,
            "duration_s": run.load.end_s - run.load.start_s,
            "unfinished": run.load.unfinished,
            "engines": {name: dict(log.meta) for name, log in run.logs.items()},
            "config": dataclasses.asdict(config),
        },
    )
