"""Calibrations beside measurements they were not made from; skipped where the raw data are not at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ersim.errors import DataError
from experiments.second_opinion import all_reduces, attention, linear_maps, weight_only

TABLES = Path(__file__).resolve().parents[3] / "shared" / "data" / "gpu-op-tables"
needs_tables = pytest.mark.skipif(not TABLES.is_dir(), reason="raw operator tables not at hand")


@pytest.mark.parametrize("checks", [linear_maps, attention, all_reduces, weight_only])
def test_missing_measurements_are_named(checks, tmp_path):
    with pytest.raises(DataError, match="is missing; give the folder"):
        list(checks(tmp_path))


@needs_tables
def test_two_groups_linear_maps_agree_where_both_measured():
    found = {
        what: float(np.abs(errors).mean()) for what, errors, _ in (*linear_maps(TABLES), *weight_only(TABLES))
    }
    assert found["A100 linear maps, llama3.1-8b bf16 tp1, decode steps, 1 to 128 tokens"] < 0.05
    assert found["H200 linear maps in bf16, decode steps, 1 to 128 tokens"] < 0.05
    assert found["H200 linear maps in int4, decode steps, 1 to 128 tokens"] > 0.15, (
        "else its interval is too wide"
    )


@needs_tables
def test_attention_is_compared_with_rows_of_its_own_tp():
    errors = {what: found for what, found, _ in attention(TABLES)}
    assert len(errors["A100 decode attention, llama3.1-8b tp1, 4 rows and 256 tokens up"]) == 17
    assert np.abs(errors["A100 decode attention, llama3.1-8b tp1, 4 rows and 256 tokens up"]).max() < 0.5
