"""Other work on the machine is told from our own."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import time

import pytest

from testbed import foreign_work
from testbed.foreign_work import MOST_CORES, MOST_STOLEN, CpuUse, Disturbance, watched

BURN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


def all_s(use: CpuUse) -> float:
    return sum(use.core_s[core] for core in use.cores)


def use(at_s: float, core_s: tuple[float, ...], own_s: float = 0.0, cores: tuple[int, ...] = (0,)) -> CpuUse:
    return CpuUse(at_s, core_s, own_s, frozenset(cores))


def test_our_own_processes_are_not_foreign_and_those_of_others_are() -> None:
    began = CpuUse.now()
    subprocess.run([sys.executable, "-c", BURN.format(1.0)], check=True)
    now = CpuUse.now()
    own_s, every_s = now.own_s - began.own_s, all_s(now) - all_s(began)
    assert 0.2 < own_s <= every_s + 0.1, "an ended child's time is its parent's"
    others_s = max(0.0, every_s - own_s)  # both are counted in hundredths of a second
    assert now.foreign_cores(began) == pytest.approx(others_s / (now.at_s - began.at_s), abs=0.01)
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
    monkeypatch.setattr(foreign_work.psutil, "cpu_times", lambda percpu: [times, times] if percpu else None)
    assert CpuUse.now().core_s == (7.875, 7.875)


def test_only_work_on_cores_that_are_ours_disturbs() -> None:
    """A large shared host, or a container on one: what others do on its other cores takes none from us."""
    began = use(0.0, (0.0,) * 4, 0.0, (1, 2))
    now = use(10.0, (10.0, 4.0, 3.0, 10.0), 5.0, (1, 2))
    assert now.foreign_cores(began) == pytest.approx((4.0 + 3.0 - 5.0) / 10.0)
    wider = use(10.0, (10.0, 4.0, 3.0, 10.0), 5.0, (1, 2, 3))  # a server was given a core that we have not
    assert wider.foreign_cores(began) == pytest.approx((4.0 + 3.0 + 10.0 - 5.0) / 10.0)
    numbered_anew = use(10.0, (1.0, 2.0), 1.0, (6, 7))
    assert numbered_anew.foreign_cores(use(0.0, (0.0, 0.0), 0.0, (6, 7))) == pytest.approx(0.2)
    unknown = use(10.0, (1.0, 2.0), 1.0, ())
    assert unknown.foreign_cores(use(0.0, (0.0, 0.0), 0.0, ())) == pytest.approx(0.2)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes are not bound to cores here")
def test_our_cores_are_those_of_this_process_and_all_below_it() -> None:
    everywhere = os.sched_getaffinity(0)
    first = min(everywhere)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        os.sched_setaffinity(0, {first})
        assert CpuUse.now().cores == everywhere, "the child may still run everywhere"
        child.kill()
        child.wait()
        assert CpuUse.now().cores == {first}
    finally:
        os.sched_setaffinity(0, everywhere)
        child.kill()
        child.wait()


def test_work_and_stolen_time_count_by_what_is_too_much_of_each() -> None:
    assert Disturbance(MOST_CORES / 2, MOST_STOLEN / 4).amount == 0.5
    assert Disturbance(MOST_CORES / 2, MOST_STOLEN).amount == 1.0
    assert Disturbance(2 * MOST_CORES, MOST_STOLEN).words == "other work on our cores used 0.20 of them"
    assert Disturbance(2 * MOST_CORES, 3 * MOST_STOLEN).figure == "9 % stolen"


def test_what_is_measured_once_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([use(0.0, (0.0,)), use(10.0, (5.0,))])
    monkeypatch.setattr(foreign_work.CpuUse, "now", classmethod(lambda cls: next(readings)))
    assert watched(lambda: "once") == ("once", pytest.approx(0.5))
