"""Other work on the machine is told from our own, and what it disturbed is measured again."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import time

import pytest

from testbed import foreign_work
from testbed.foreign_work import MOST_CORES, CpuUse, undisturbed

BURN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


def test_our_own_processes_are_not_foreign_and_those_of_others_are() -> None:
    began = CpuUse.now()
    subprocess.run([sys.executable, "-c", BURN.format(1.0)], check=True)
    now = CpuUse.now()
    own_s, all_s = now.own_s - began.own_s, now.all_s - began.all_s
    assert 0.2 < own_s <= all_s + 0.1, "an ended child's time is its parent's"
    assert now.foreign_cores(began) == pytest.approx((all_s - own_s) / (now.at_s - began.at_s), abs=0.01)
    below = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN.format(60.0)!r}])"
    child = subprocess.Popen(
        [sys.executable, "-c", below], start_new_session=True
    )  # as a server's supervisor
    began = CpuUse.now()
    time.sleep(1.5)
    own_s = CpuUse.now().own_s - began.own_s
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert own_s > 0.3, "who runs below a child of ours is ours"
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BURN.format(2.0)!r}])"
    subprocess.run([sys.executable, "-c", orphan], check=True)  # who takes orphans is not us
    began = CpuUse.now()
    time.sleep(1.2)
    assert CpuUse.now().foreign_cores(began) > 0.3


def test_time_that_was_idle_or_stolen_is_nobodys_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As psutil names Linux's kinds; guests are counted in user already."""
    kinds = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
    times = collections.namedtuple("times", kinds)(5.0, 0.25, 2.0, 900.0, 30.0, 0.125, 0.5, 70.0, 3.0, 0.25)
    monkeypatch.setattr(foreign_work.psutil, "cpu_times", lambda: times)
    assert CpuUse.now().all_s == 7.875


def test_a_disturbed_measurement_is_made_again_at_most_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(*cores: float) -> tuple[int, float, list[str]]:
        """Attempt that stands, its foreign cores and what was said, when attempts were disturbed so much."""
        readings = iter(
            [use for one in cores for use in (CpuUse(0.0, 0.0, 0.0), CpuUse(10.0, 10.0 * one, 0.0))]
        )
        monkeypatch.setattr(foreign_work.CpuUse, "now", classmethod(lambda cls: next(readings)))
        said: list[str] = []
        result, used = undisturbed(lambda attempt: attempt, "u1r0", said.append)
        return result, used, said

    assert outcome(MOST_CORES / 2) == (0, pytest.approx(MOST_CORES / 2), [])
    attempt, used, said = outcome(0.5, 0.0)
    assert (attempt, used) == (1, 0.0)
    assert said == ["u1r0: other work on this machine used 0.50 cores; measured again"]
    attempt, used, said = outcome(0.5, 0.3)
    assert (attempt, used) == (1, pytest.approx(0.3))
    assert said[-1].startswith("u1r0: other work on this machine used 0.30 cores; kept")
