"""Runs a command that takes its time to stop: it has servers to end and a failure to record."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

from testbed.supervisor import parent_death_signal

STOP_S = 30.0  # the time that a command gets to stop its servers when its own time is over
OUT_OF_TIME = 124
INTERRUPTED = 130


def run_to_its_end(
    command: Sequence[str], left_s: float | None = None, capture: bool = False
) -> tuple[int, str]:
    """(status, standard output) of a command; the output is "" unless it is captured and the command ended.

    After `left_s` seconds it is told to stop, and killed STOP_S later: status OUT_OF_TIME. It has a session
    of its own, so that Ctrl-C reaches it once, through here, and it may stop what it started: status
    INTERRUPTED. A second Ctrl-C does not wait for that. Linux ends it when this process is killed.
    """
    pipe = subprocess.PIPE if capture else None
    child = subprocess.Popen(
        command, stdout=pipe, text=True, start_new_session=True, preexec_fn=parent_death_signal()
    )
    try:
        output, _ = child.communicate(timeout=left_s)
        return child.returncode, output or ""
    except subprocess.TimeoutExpired:
        child.terminate()
        return _stopped(child, OUT_OF_TIME, STOP_S), ""
    except KeyboardInterrupt:
        # what was started in a shell's background ignores SIGINT, and so do its children
        deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        child.send_signal(signal.SIGTERM if deaf else signal.SIGINT)
        return _stopped(child, INTERRUPTED, None), ""


def _stopped(child: subprocess.Popen[str], status: int, grace_s: float | None) -> int:
    """Wait for a command that was told to stop; `status`, or INTERRUPTED when the wait was interrupted."""
    try:
        child.communicate(timeout=grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    except KeyboardInterrupt:
        return INTERRUPTED
    return status
