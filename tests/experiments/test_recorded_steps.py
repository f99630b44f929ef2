"""`ersim-calibrate source=steps` on a table of steps, and what a bad table says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from ersim.errors import DataError
from experiments.recorded_steps import from_steps, usable_steps
from testbed.step_log import LoggedStep, StepLog


def _table(steps: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(steps):
        decode = int(rng.integers(1, 15))
        contexts = rng.integers(1, 900, size=decode)
        chunk = int(rng.integers(16, 700)) if rng.random() < 0.3 else 0
        tokens = decode + chunk
        rows.append(
            {
                "duration_s": (0.01 + 2e-5 * tokens + 1e-7 * contexts.sum()) * rng.lognormal(0, 0.02),
                "tokens": tokens,
                "decode_seqs": decode,
                "decode_context_tokens": int(contexts.sum()),
                "decode_context_max": int(contexts.max()),
                "sampled_seqs": decode + (chunk > 0),
                "prefills": json.dumps([[chunk, 0]] if chunk else []),
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_table_of_steps_becomes_a_calibration(tmp_path, suffix):
    path = tmp_path / f"steps.{suffix}"
    frame = _table()
    frame.to_parquet(path) if suffix == "parquet" else frame.to_csv(path, index=False)
    path.with_suffix(".json").write_text(json.dumps({"num_blocks": 99, "max_num_seqs": 16}))
    calibration = from_steps(path, "cpu", "llama-139m", "bf16", 1, seed=0)
    assert (calibration.source, calibration.kv_blocks) == ("steps", 99)
    assert calibration.fit["held_out_mape"] < 0.03


def test_a_log_is_fitted_as_long_as_its_steps_took():
    """Stolen time and slow probes in a log change nothing: only a profile knows when a server was alone."""
    plain = [
        LoggedStep(n, t, t, t + 0.01, t + 0.01, 1, 0, 1, 1, 10, 10, (), (), (), 1, 1e-5, None, 2e-4)
        for n, t in enumerate(np.arange(20) * 0.01)
    ]
    stolen = [dataclasses.replace(step, stolen_share=0.5, probe_s=6e-4) for step in plain]
    (batches, told), (_, busy) = (
        usable_steps(StepLog({"async_scheduling": False}, s, {})) for s in (plain, stolen)
    )
    assert len(batches) == 19, "the first compiles"
    np.testing.assert_allclose(told, 0.01)
    np.testing.assert_array_equal(told, busy)


def test_a_missing_column_and_bad_prefills_are_named(tmp_path):
    path = tmp_path / "steps.parquet"
    _table(40).drop(columns="tokens").to_parquet(path)
    with pytest.raises(DataError, match="column tokens is missing"):
        from_steps(path, "cpu", "llama-139m", "bf16", 1, seed=0)
    _table(40).assign(prefills="[1,").to_parquet(path)
    with pytest.raises(DataError, match="row 0: prefills must be JSON pairs"):
        from_steps(path, "cpu", "llama-139m", "bf16", 1, seed=0)
