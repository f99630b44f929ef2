"""Both environments say what is wrong with the Python that should make them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OLD = "exit 1"
WITHOUT_VENV = '[ "$1" = -m ] && { mkdir -p "$3"; exit 1; }\nexit 0'


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["venv", "venv-live"])
@pytest.mark.parametrize(
    ("code", "message"),
    [(OLD, "ersim needs Python 3.11 or later; {python} is older: make {target} PYTHON="),
     (WITHOUT_VENV, "Python's venv module failed (on Debian and Ubuntu: install python3-venv)")],
)  # fmt: skip
def test_a_python_that_cannot_be_used_is_named(tmp_path: Path, target: str, code: str, message: str) -> None:
    python, folder = tmp_path / "python", tmp_path / "venv"
    python.write_text(f"#!/bin/sh\n{code}\n")
    python.chmod(0o755)
    command = ["make", target, f"PYTHON={python}", f"VENV={folder}", f"LIVE_VENV={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message.format(python=python, target=target) in done.stdout
    assert not folder.exists(), "half an environment stays"
