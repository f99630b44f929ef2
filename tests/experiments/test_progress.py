"""The progress display: what a reader sees on terminals wide and narrow, and where there is none."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from experiments.progress import Progress

SHOW = """
import os, time
from experiments.progress import Progress
with Progress({0: 3.0, 1: 1.0}) as progress:
    progress.started(0, "er_8x8b_fp16 users=1000")
    time.sleep(0.3)
    progress.ended(0, failed=False)
    progress.started(1, "er_8x8b_fp16 users=1")
    time.sleep(0.3)
    progress.ended(1, failed=False)
"""


def on_terminal(columns: int) -> list[str]:
    """The lines that a terminal of that width was told to draw, in order, without colours."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen([sys.executable, "-c", SHOW], env=environment, stderr=child, stdout=child)
    os.close(child)
    drawn = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        drawn += piece
    os.close(parent)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("columns", [30, 46, 79, 120])
def test_every_line_fits_the_terminal_and_starts_with_what_matters(columns: int) -> None:
    lines = on_terminal(columns)
    assert max(map(len, lines)) <= columns
    assert any("75% 1/2, about" in line and " s left" in line for line in lines)
    wide = [line for line in lines if "er_8x8b_fp16 users=1000" in line]
    assert bool(wide) == (columns >= 79)
    assert any("━" in line for line in lines) == (columns >= 80)


def test_without_a_terminal_every_job_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress({0: 3.0, 1: 1.0}) as progress:
        progress.started(0, "a users=10")
        progress.started(1, "a users=1")
        progress.ended(0, failed=False)
        progress.ended(1, failed=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/2] a users=10: done, about")
    assert lines[1].startswith("[2/2] a users=1: FAILED")
