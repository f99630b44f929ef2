"""Files are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ersim.util.files import to_json, write_atomically, write_json


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "summary.json"
    write_json(target, {"a": 1})

    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fails)
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_numpy_and_non_finite_values_become_json() -> None:
    value = {"n": np.int64(3), "x": np.array([1.0, np.nan]), "inf": float("inf"), 1: (True, None)}
    assert json.loads(to_json(value)) == {"n": 3, "x": [1.0, None], "inf": None, "1": [True, None]}
