"""Helpers for tests that run the `ersim` command in this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments import simulate

os.environ["ERSIM_CACHE"] = ""  # tests fit, and leave the user's cache alone
QUICK = ("uncertainty=none", "workload.requests=150", "workload.prompts.limit=200")


@dataclass
class Run:
    """What a command left: its exit code, what it printed, the folder it ran in."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """The last line of standard output, which is JSON for every command that measures."""
        loaded: dict[str, Any] = json.loads(self.out.strip().splitlines()[-1])
        return loaded


@pytest.fixture
def ersim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Run]:
    """Run `ersim <arguments>` inside an empty folder, with a tracking store of its own."""
    home = tmp_path / "run"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    monkeypatch.setattr("experiments.report.MLFLOW", tmp_path / "store")

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["ersim", *arguments])
        capfd.readouterr()
        try:
            simulate.main()
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = capfd.readouterr()
        return Run(code, out, err, home)

    return run
