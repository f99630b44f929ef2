"""Commands that take their time to stop: told once, waited for, and reported by who runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import gpu_session, long_command
from experiments.long_command import OUT_OF_TIME, run_to_its_end

ROOT = Path(__file__).resolve().parents[2]
ALERT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whatever shell this is
SLOW_TO_STOP = """\
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1], "on").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(float(sys.argv[2]))
    pathlib.Path(sys.argv[1], "stopped").touch()
    sys.exit(130)
"""
LIVE = "import sys; from experiments.long_command import run_to_its_end; sys.exit(run_to_its_end(%r)[0])"
SESSION = """\
import sys
from experiments import gpu_session
gpu_session.commands = lambda expert, *others: %r
gpu_session.check_first = lambda profile, validation: None
sys.argv = ["gpu_session", "--experts", "a,b,c"]
sys.exit(gpu_session.main())
"""
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"


def slow(folder: Path, stops_s: float = 1.0) -> list[str]:
    return [sys.executable, "-c", SLOW_TO_STOP, str(folder), str(stops_s)]


def started(code: str, folder: Path) -> subprocess.Popen[str]:
    """A Python process in a group of its own, as a terminal's job, whose slow command runs already."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (folder / "on").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_an_interrupted_command_may_take_its_time_to_stop(tmp_path: Path) -> None:
    process = started(ALERT + LIVE % slow(tmp_path), tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert (tmp_path / "stopped").exists(), "it was killed while it stopped its servers"


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    process = started(ALERT + LIVE % slow(tmp_path, 50.0), tmp_path)
    began_s = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.6)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130 and time.monotonic() - began_s < 20
    assert not (tmp_path / "stopped").exists()


def test_status_and_output_of_what_ends_by_itself() -> None:
    code = "import sys; print('a'); print('b'); sys.exit(3)"
    assert run_to_its_end([sys.executable, "-c", code], 30.0, capture=True) == (3, "a\nb\n")
    assert run_to_its_end([sys.executable, "-c", "pass"]) == (0, "")
    assert run_to_its_end([sys.executable, "-c", "import time; time.sleep(60)"], 0.2) == (OUT_OF_TIME, "")


def test_who_does_not_stop_in_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_command, "STOP_S", 0.5)
    code = (
        "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    )
    note, began_s = tmp_path / "pid", time.monotonic()
    assert run_to_its_end([sys.executable, "-c", code, str(note)], 2.0, capture=True) == (OUT_OF_TIME, "")
    assert time.monotonic() - began_s < 30
    with pytest.raises(ProcessLookupError):  # no zombie either
        os.kill(int(note.read_text()), 0)


def test_an_interrupt_between_two_commands_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(expert: str, both: object, left_s: float) -> dict[str, object]:
        if expert == "b":
            raise KeyboardInterrupt
        return {"expert": expert, "ok": True}

    monkeypatch.setattr(gpu_session, "measure", measure)
    monkeypatch.setattr(gpu_session, "check_first", lambda profile, validation: None)
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--experts", "a,b,c"])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu_session.main() == 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    told = json.loads(capsys.readouterr().out)
    assert told["experts"] == [{"expert": "a", "ok": True}] and told["not_reached"] == ["b", "c"]


@pytest.mark.parametrize(
    ("number", "before"), [(signal.SIGINT, ALERT), (signal.SIGTERM, ALERT), (signal.SIGTERM, DEAF)]
)
def test_an_interrupted_session_tells_what_was_done(
    tmp_path: Path, number: signal.Signals, before: str
) -> None:
    """In a shell's background SIGINT is ignored, by the session's commands too."""
    first = [sys.executable, "-c", "print('{\"steps\": 7}')"]
    process = started(before + SESSION % [first, slow(tmp_path)], tmp_path)
    os.killpg(process.pid, number)
    if number == signal.SIGTERM:  # `timeout` sends it twice
        time.sleep(0.5)
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (tmp_path / "stopped").exists() == (before == ALERT)
    told = json.loads(output.splitlines()[-1])
    (report,) = told["experts"]
    assert report.pop("seconds") > 0
    assert report == {
        "expert": "a", "ok": False, first[2]: {"steps": 7}, "failed": SLOW_TO_STOP, "status": "interrupted",
    }  # fmt: skip
    assert told["not_reached"] == ["b", "c"]
