"""Fits a calibration to recorded engine steps in a file (``ersim-calibrate source=steps``).

A file is the recorder's step log (JSON lines, `testbed.step_log`) or a table (Parquet or CSV) with the
columns of `COLUMNS`, in recorded order. `ersim-profile` makes both log and calibration in one go; this
is for logs that were kept, or that come from another machine.

Steps are fitted as long as they took. A profile takes off what the hypervisor or other processes took of a
CPU and how slow the host was meanwhile (`testbed.core_time`, `testbed.speed_probe`); a log alone does not
tell when its server had the machine to itself, which that rests on, so nothing is taken off here, and
`provenance` holds no speed probe. A log from a busy CPU gives a calibration of that CPU as busy as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ersim.errors import DataError
from ersim.steptime import Calibration, fit_live_calibration
from ersim.types import Batch
from testbed.step_log import StepLog, read_step_log

COLUMNS = (
    "duration_s",
    "tokens",
    "decode_seqs",
    "decode_context_tokens",
    "decode_context_max",
    "sampled_seqs",
    "prefills",  # JSON text: [[chunk tokens, context tokens before], ...]
)
ENGINE_NAMES = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "block_size",
    "async_scheduling",
    "gpu_memory_utilization",
)


def read_table(path: Path) -> tuple[list[Batch], npt.NDArray[np.float64]]:
    """Batches and durations of a table of steps. Raises DataError naming file, column and row."""
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: steps cannot be read ({error})") from error
    for column in COLUMNS:
        if column not in frame:
            raise DataError(f"{path}: column {column} is missing, found {', '.join(map(str, frame.columns))}")
    batches = []
    for number, row in enumerate(frame.itertuples(index=False)):
        try:
            prefills = [(int(chunk), int(context)) for chunk, context in json.loads(row.prefills or "[]")]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path}: row {number}: prefills must be JSON pairs, got {row.prefills!r}"
            ) from error
        batches.append(
            Batch(
                int(row.tokens),
                int(row.decode_seqs),
                int(row.decode_context_tokens),
                int(row.decode_context_max),
                prefills,
                int(row.sampled_seqs),
            )
        )
    return batches, frame["duration_s"].to_numpy(dtype=float)


def usable_steps(log: StepLog) -> tuple[list[Batch], npt.NDArray[np.float64]]:
    """Batches and periods of a step log as recorded, without the first step (it compiles, fills caches)."""
    periods = log.periods_s()
    batches = [step.batch() for step in log.steps]
    keep = [index for index in range(1, len(batches)) if np.isfinite(periods[index]) and periods[index] > 0]
    return [batches[index] for index in keep], periods[keep]


def from_steps(path: Path, gpu: str, model: str, precision: str, tp: int, seed: int) -> Calibration:
    """Fit the steps in `path`. Raises DataError when they cannot be read or are too few."""
    meta: Mapping[str, Any] = {}
    batches: Sequence[Batch]
    if path.suffix in (".parquet", ".csv"):
        batches, durations = read_table(path)
        described = path.with_suffix(".json")
        if described.is_file():
            meta = json.loads(described.read_text(encoding="utf-8"))
    else:
        log = read_step_log(path)
        batches, durations = usable_steps(log)
        meta = log.meta
    blocks = meta.get("num_blocks")
    return fit_live_calibration(
        batches,
        durations,
        name=f"{gpu}/{model}_{precision}_tp{tp}_steps",
        model=model,
        precision=precision,
        gpu=gpu,
        tp=tp,
        vllm_version=None if meta.get("vllm_version") is None else str(meta["vllm_version"]),
        kv_blocks=None if blocks is None else int(blocks),
        engine={name: meta[name] for name in ENGINE_NAMES if name in meta},
        provenance={"source": f"recorded steps, {path.name}", "date": str(meta.get("date", ""))},
        seed=seed,
    )
