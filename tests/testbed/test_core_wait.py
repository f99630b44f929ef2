"""What a thread waited for its core, as Linux counts it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from testbed.core_wait import FILE, CoreWait

counted = pytest.mark.skipif(not Path(FILE).exists(), reason="the kernel does not count it")
BUSY = "import time; print(flush=True); end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def spin(seconds: float) -> float:
    """CPU seconds that the thread had of so many."""
    end_s, began_s = time.monotonic() + seconds, time.thread_time()
    while time.monotonic() < end_s:
        pass
    return time.thread_time() - began_s


@counted
def test_a_thread_that_shares_its_core_waits_for_what_it_does_not_get() -> None:
    before = os.sched_getaffinity(0)
    other = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        core = min(before)
        os.sched_setaffinity(other.pid, {core})
        os.sched_setaffinity(0, {core})
        wait = CoreWait()
        began_s, waited_s = time.monotonic(), wait()
        had_s = spin(1.0)
        ended_s, total_s = time.monotonic(), wait()
    finally:
        os.sched_setaffinity(0, before)
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()
    assert waited_s is not None and total_s is not None
    lacked_s = ended_s - began_s - had_s
    assert lacked_s > 0.1, "the other one had its turn"
    assert 0.5 * lacked_s < total_s - waited_s <= lacked_s + 0.01


@counted
def test_it_is_the_thread_that_asked_first() -> None:
    wait, told = CoreWait(), []

    def ask() -> None:
        spin(0.01)
        told.append(wait())

    one = threading.Thread(target=ask)
    one.start()
    one.join()
    assert told[0] is not None
    assert wait() is None, "that thread has ended, and nobody else is meant"


@pytest.mark.parametrize("text", [None, "", "12\n", "a b c\n", "0 0 0\n"])
def test_where_nobody_counts_nothing_is_known(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "schedstat"
    if text is not None:
        path.write_text(text)
    wait = CoreWait(str(path))
    assert wait() is None and wait() is None
