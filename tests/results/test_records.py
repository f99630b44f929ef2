"""The rows of a simulated run without pandas: same columns, same rows, same file for any content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ersim.results import REQUEST_COLUMNS, RequestTable, Window, breakdown, check_requests, in_window


def table(errors: list[str | None]) -> RequestTable:
    rows = len(errors)
    columns: dict[str, np.ndarray] = {}
    for name, kind in REQUEST_COLUMNS.items():
        columns[name] = np.full(rows, "x", dtype=object) if kind == "object" else np.arange(rows, dtype=kind)
    columns["status"] = np.array(["failed" if error else "completed" for error in errors], dtype=object)
    columns["expert"] = np.array(["ab"[row % 2] for row in range(rows)], dtype=object)
    columns["error"] = np.array(errors, dtype=object)
    return RequestTable(columns)


@pytest.mark.parametrize("errors", [[None, None, None], [None, "died", None]])
def test_the_parquet_file_holds_the_rows(errors: list[str | None], tmp_path: Path) -> None:
    rows = table(errors)
    rows.write_parquet(tmp_path / "requests.parquet")
    read = check_requests(pd.read_parquet(tmp_path / "requests.parquet"), "it")
    assert list(read.columns) == list(REQUEST_COLUMNS) and len(read) == len(rows)
    assert read["send_s"].tolist() == [0.0, 1.0, 2.0] and read["request_id"].dtype == "int64"
    assert [None if pd.isna(error) else error for error in read["error"]] == errors
    assert read["status"].tolist() == rows["status"].tolist()


def test_figures_are_those_of_the_data_frame() -> None:
    rows, window = table([None] * 9), Window(2.0, 7.0, True)
    assert len(in_window(rows, window)) == len(in_window(rows.frame(), window)) == 5
    assert breakdown(rows, window, "expert") == breakdown(rows.frame(), window, "expert")
    assert list(breakdown(rows, window, "expert")) == ["b", "a"]
