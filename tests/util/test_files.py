"""Files are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ersim.util.files import set_aside, to_json, write_atomically, write_json


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


def test_earlier_results_are_set_aside_not_lost(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    (folder / "u1r0").mkdir(parents=True)
    (folder / "u1r0" / "run.json").write_text("first")
    set_aside(folder, "*/run.json")
    assert not folder.exists()
    (folder / "models").mkdir(parents=True)  # a start that failed leaves this much
    set_aside(folder, "*/run.json")
    assert not folder.exists()
    assert (tmp_path / "runs.previous" / "u1r0" / "run.json").read_text() == "first"
    set_aside(folder, "*/run.json")  # nothing there at all
    (folder / "u1r0").mkdir(parents=True)
    (folder / "u1r0" / "run.json").write_text("another")
    set_aside(folder, "*/run.json", "broken")
    assert (tmp_path / "runs.previous" / "u1r0" / "run.json").read_text() == "first"
    assert (tmp_path / "runs.broken" / "u1r0" / "run.json").read_text() == "another"
