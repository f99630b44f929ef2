"""Figures of a run small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ersim.errors import DataError
from ersim.results import REQUEST_COLUMNS, Gaps, Window, breakdown, check_requests, summarise


@pytest.fixture
def frame() -> pd.DataFrame:
    """Two completed requests of 3 tokens, one of 1 token, one failed."""
    rows = {
        "send_s": [0.0, 1.0, 2.0, 2.0],
        "first_token_s": [1.0, 1.5, 2.5, np.nan],
        "last_token_s": [2.0, 3.5, 2.5, 3.0],
        "output_tokens": [3, 3, 1, 0],
        "prompt_tokens": [10, 20, 30, 40],
        "cached_tokens": [0, 16, 0, 0],
        "status": ["completed"] * 3 + ["failed"],
        "expert": ["a", "b", "a", "b"],
        "domain": ["law", "law", "code", "code"],
        "gateway_s": [0.002] * 4,
    }
    data = {name: rows.get(name, [0] * 4) for name in REQUEST_COLUMNS}
    return pd.DataFrame(data)


GAPS = Gaps(
    end_s=np.array([1.5, 2.0, 2.5, 3.5]),
    gap_s=np.array([0.5, 0.5, 1.0, 1.0]),
    count=np.array([1, 1, 1, 1]),
    tokens=np.array([2, 1, 2, 2]),
)


def test_rates_latencies_and_counts(frame: pd.DataFrame) -> None:
    window = Window(0.0, 4.0, True)
    found = summarise(frame, GAPS, window, ttft_objective_s=0.6, tpot_objective_s=0.9)
    assert found["completed"] == 3
    assert found["failed"] == 1
    assert found["request_throughput"] == pytest.approx(0.75)
    assert found["output_throughput"] == pytest.approx(7 / 4)
    assert found["total_token_throughput"] == pytest.approx((7 + 60) / 4)
    assert found["mean_ttft_ms"] == pytest.approx(1000 * (1.0 + 0.5 + 0.5) / 3)
    assert found["median_tpot_ms"] == pytest.approx(750.0)
    assert found["mean_itl_ms"] == pytest.approx(750.0)
    assert found["median_e2el_ms"] == pytest.approx(2000.0)
    assert found["request_goodput"] == pytest.approx(0.25)  # only the one-token request meets both
    assert found["prefix_hit_rate"] == pytest.approx(16 / 60)


def test_window_excludes_its_start_and_includes_its_end(frame: pd.DataFrame) -> None:
    found = summarise(frame, GAPS, Window(2.0, 3.5, True), ttft_objective_s=9, tpot_objective_s=9)
    assert found["completed"] == 2


def test_breakdown_shares_sum_to_one(frame: pd.DataFrame) -> None:
    blocks = breakdown(frame, Window(0.0, 4.0, True), "expert")
    assert blocks["a"]["completed"] == 2
    assert sum(block["share"] for block in blocks.values()) == pytest.approx(1.0)


def test_missing_column_is_named(frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=r"run\.parquet: columns missing: send_s"):
        check_requests(frame.drop(columns="send_s"), "run.parquet")
