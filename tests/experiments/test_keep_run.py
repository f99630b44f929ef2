"""What is kept of a live folder is what its runs are predicted from, and nothing else."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from ersim.errors import ConfigError, DataError
from experiments import keep_run
from experiments.keep_run import keep

STORED = Path(__file__).parents[2] / "experiments" / "measured" / "cpu" / "live_cpu_pairs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stored run with what a live one has besides."""
    whole = tmp_path / "live"
    shutil.copytree(STORED, whole)
    for name in ("validation.csv", "large.png", "runs/large.steps.jsonl", "runs/u1r0/notes.txt"):
        (whole / name).write_text("x")
    return whole


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_live_folder_becomes_a_stored_run(folder: Path, tmp_path: Path) -> None:
    figures = keep(folder, tmp_path / "kept" / "live")
    assert _files(tmp_path / "kept" / "live") == _files(STORED)
    assert figures["runs"] == 15 and figures["files"] == len(_files(STORED))
    assert figures["bytes"] == sum(map(len, _files(STORED).values()))
    assert figures["largest"]["bytes"] == max(map(len, _files(STORED).values()))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["live"], "no scratch is left"


def test_nothing_is_written_over_and_half_a_run_is_not_kept(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"live exists: name a folder that does not"):
        keep(folder, folder)
    (folder / "runs" / "u2r1" / "steps_small.parquet").unlink()
    with pytest.raises(DataError, match=r"steps_small\.parquet is missing .*; measure again"):
        keep(folder, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    shutil.rmtree(folder / "runs")
    with pytest.raises(DataError, match=r"no measured run in it; measure with ersim-validate"):
        keep(folder, tmp_path / "kept")


def test_the_command_says_what_it_kept_or_why_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["keep_run", str(folder), str(tmp_path / "kept")])
    assert keep_run.main() == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 15
    monkeypatch.setattr(sys, "argv", ["keep_run", str(tmp_path / "nowhere"), str(tmp_path / "other")])
    assert keep_run.main() == 1
    assert "keep_run: " in capsys.readouterr().err
