"""What a stored run says of itself; which ones are refused: damaged, old, measured with something else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ersim.config import ExpertConfig, FleetConfig, SimulationConfig
from ersim.errors import DataError
from ersim.results import Gaps
from experiments.validate import recorded_config
from testbed.live_run import LiveRun
from testbed.load import LoadResult
from testbed.measured_run import (
    FORMAT,
    VERSION,
    check_measured_with,
    read_record,
    read_run,
    read_span_s,
    read_standings,
    read_versions,
    write_run,
)
from testbed.standing import Standing

STANDING = dataclasses.asdict(Standing(1.2, 0.03, 50))
RUN: dict[str, Any] = {
    "format": FORMAT,
    "version": VERSION,
    "users": 4,
    "repeat": 0,
    "start_s": 3.0,
    "end_s": 9.0,
    "standings": {"a": STANDING},
    "unfinished": 0,
    "engines": {"a": {"vllm_version": "0.32.0"}},
    "calibrations": {"a": "d" * 64},
    "foreign_cores": 0.02,
    "config": {},
}


def stored(folder: Path, **changes: Any) -> Path:
    """A folder with the run.json above, changed."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**RUN, **changes}))
    return folder


def test_a_written_run_is_read_again(tmp_path: Path) -> None:
    requests, gaps = pd.DataFrame({"x": [1]}), Gaps.concatenate([])
    run = LiveRun(4, LoadResult([], 5.0, 8.0, []), {}, {}, requests, gaps)
    config = SimulationConfig(users=4)
    write_run(run, config, tmp_path, {"a": Standing(1.2, 0.03, 50)}, {"a": "d" * 64}, 2)
    record = read_record(tmp_path)
    assert (record.start_s, record.end_s, record.repeat) == (5.0, 8.0, 2)
    assert record.standings == {"a": Standing(1.2, 0.03, 50)} and record.calibrations == {"a": "d" * 64}
    assert record.config["users"] == 4


def test_a_folder_of_runs_may_be_moved_with_its_calibrations(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    (before / "runs" / "u1r0").mkdir(parents=True)
    (before / "a.json").write_text("{}")
    experts = {
        "a": ExpertConfig(calibration=str(before / "a.json")),
        "b": ExpertConfig(calibration="auto"),
    }
    run = LiveRun(4, LoadResult([], 5.0, 8.0, []), {}, {}, pd.DataFrame({"x": [1]}), Gaps.concatenate([]))
    config = SimulationConfig(fleet=FleetConfig("f", experts=experts))
    write_run(run, config, before / "runs" / "u1r0", {}, {})
    before.rename(after)
    assert str(tmp_path) not in (after / "runs" / "u1r0" / "run.json").read_text()
    found = recorded_config(after / "runs" / "u1r0" / "run.json").fleet.experts
    assert found["a"].calibration == str((after / "a.json").resolve()) and found["b"].calibration == "auto"


def test_runs_of_another_version_are_refused_by_every_reader(tmp_path: Path) -> None:
    refused = r"run\.json: not the run\.json of a measured run .*format 'ersim-measured-run' version 3, got "
    old = {key: value for key, value in RUN.items() if key not in ("format", "version", "calibrations")}
    (tmp_path / "run.json").write_text(json.dumps(old))
    for read in (read_span_s, read_record):
        with pytest.raises(DataError, match=refused + "format None version None.*; measure it again"):
            read(tmp_path)
    for read_all in (read_standings, read_versions):
        with pytest.raises(DataError, match=refused):
            read_all([tmp_path])
    for changes in ({"version": 1}, {"version": 4}, {"version": True}, {"format": "ersim-step-log"}):
        with pytest.raises(DataError, match=refused):
            read_record(stored(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"foreign_cores": -1.0}, "foreign_cores must be a number >= 0, got -1"),
        ({"standings": None}, "standings must be an object, got null"),
        ({"standings": []}, r"standings must be an object, got \[\]"),
        ({"standings": {"a": 5}}, r"standings\.a must be an object, got 5"),
        ({"standings": {"a": {"factor": 1.0}}}, r"standings\.a\.doubt is missing"),
        ({"standings": {"a": {**STANDING, "probe_s": 1e-4}}}, r"standings\.a\.probe_s must be absent"),
        *(
            ({"standings": {"a": {**STANDING, "factor": factor}}}, rf"standings\.a\.factor must.*, got {got}")
            for factor, got in (
                (None, "null"), ("1", "'1'"), (-1, "-1"), (float("nan"), "nan"), (0, "0"), (True, "True"),
            )
        ),
        ({"standings": {"a": STANDING | {"doubt": None}}}, r"standings\.a\.doubt must be .*, got null"),
        ({"standings": {"a": STANDING | {"wander": 10**400}}}, r"standings\.a\.wander must be .* >= 0"),
        ({"engines": None}, "engines must be an object, got null"),
        ({"engines": {"a": "0.32.0"}}, r"engines\.a must be an object, got '0\.32\.0'"),
        ({"engines": {"a": {}}}, r"engines\.a\.vllm_version must be a non-empty string, got null"),
        ({"calibrations": []}, "calibrations must be an object"),
        ({"calibrations": {"a": None}}, r"calibrations\.a must be a non-empty string, got null"),
        ({"config": 5}, "config must be an object, got 5"),
        ({"repeat": "0"}, "repeat must be an integer >= 0, got '0'"),
        ({"repeat": True}, "repeat must be an integer >= 0, got True"),
        ({"start_s": None}, "start_s must be a number, got null"),
        ({"end_s": 2.0}, r"end_s must be a number >= 3, got 2\.0"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"run\.json: {message}.*; measure it again$"):
        read_record(stored(tmp_path, **changes))


def test_a_run_that_is_not_there_or_no_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run\.json: not the run\.json .*cannot be read.*; measure it again"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match=r"run\.json: not a whole JSON document .*; measure it again"):
        read_record(tmp_path)


def test_gaps_without_a_column_are_one_line(tmp_path: Path) -> None:
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "requests.parquet")
    pd.DataFrame({"end_s": [1.0], "gap_s": [0.1], "count": [1]}).to_parquet(tmp_path / "gaps.parquet")
    with pytest.raises(
        DataError, match=r"not a whole measured run \(gaps\.parquet: no column tokens\); measure it again"
    ):
        read_run(tmp_path)


def test_a_run_is_predicted_only_with_the_calibrations_it_was_measured_with(tmp_path: Path) -> None:
    first, second = stored(tmp_path / "u1r0"), stored(tmp_path / "u2r0", standings={})  # as on GPUs
    check_measured_with([first, second], {"a": "d" * 64})
    for folder in (first, second):
        wrong = (
            r"run\.json: measured with another calibration of expert a \(d{12}\) .*\(e{12}\); measure again"
        )
        with pytest.raises(DataError, match=f"{folder.name}/{wrong}"):
            check_measured_with([folder], {"a": "e" * 64})
    with pytest.raises(DataError, match=r"calibration of expert b \(none\)"):
        check_measured_with([first], {"a": "d" * 64, "b": "e" * 64})
    with pytest.raises(DataError, match=r"calibration of expert a .*\(none\); measure again"):
        check_measured_with([first], {})
