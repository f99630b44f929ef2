"""Work of others on this machine, and measurements made again because of it.

A live run on CPUs measures the servers only while the cores are theirs. What all processes together used
of the cores that ours may run on, less what our own used, tells when they were not, without a look at any
latency: which attempt is kept is not chosen by its result, only by how much it was disturbed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import psutil

Result = TypeVar("Result")
MOST_CORES = 0.1
TRIES = 2
IDLE = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests are in user; stolen: see `stolen_time`


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds since some moment: of every core of the machine, and of this process and its descendants.

    cores: those that this process and its descendants may use, at that moment.
    """

    at_s: float
    core_s: tuple[float, ...]
    own_s: float
    cores: frozenset[int]

    @classmethod
    def now(cls) -> CpuUse:
        """As the operating system counts them, in hundredths of a second."""
        used_s = []
        for core in psutil.cpu_times(percpu=True):
            used_s.append(sum(seconds for kind, seconds in core._asdict().items() if kind not in IDLE))
        return cls(time.monotonic(), tuple(used_s), *_own())

    def foreign_cores(self, since: CpuUse) -> float:
        """Cores that others kept busy in between, in the mean, of those that are ours to use.

        What others do elsewhere on a large machine, or outside of this container's cores, takes none from us.
        """
        cores = self.cores | since.cores
        count = min(len(self.core_s), len(since.core_s))
        if not cores or max(cores) >= count:  # counted by other numbers than they are bound by
            cores = frozenset(range(count))
        all_s = sum(self.core_s[core] - since.core_s[core] for core in cores)
        foreign_s = all_s - (self.own_s - since.own_s)
        return max(0.0, foreign_s) / max(self.at_s - since.at_s, 1e-9)


def _own() -> tuple[float, frozenset[int]]:
    """User and system time of this process and all below it, those that have ended included; their cores."""
    this = psutil.Process()
    total_s, cores = 0.0, set(_allowed(this))
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile; its parent counts it
            times = process.cpu_times()
            total_s += times.user + times.system + times.children_user + times.children_system
            cores.update(_allowed(process))
    return total_s, frozenset(cores)


def _allowed(process: psutil.Process) -> Collection[int]:
    """Cores that a process may run on; none where the system does not tell."""
    return process.cpu_affinity() or () if hasattr(process, "cpu_affinity") else ()


def watched(measure: Callable[[], Result]) -> tuple[Result, float]:
    """A measurement made once, and the cores that others used meanwhile."""
    began = CpuUse.now()
    result = measure()
    return result, CpuUse.now().foreign_cores(began)


def undisturbed(
    measure: Callable[[int], Result], what: str, say: Callable[[str], None] | None = None, tries: int = TRIES
) -> tuple[Result, float]:
    """A measurement, and the cores that others used meanwhile; made again while that is too much.

    measure: gets the number of the attempt. tries: after so many the least disturbed one stands, whatever
    it measured.
    """
    kept: tuple[Result, float] | None = None
    for attempt in range(tries):
        result, cores = watched(partial(measure, attempt))
        if kept is None or cores < kept[1]:
            kept = result, cores
        if cores <= MOST_CORES:
            break
        if say is not None:
            again = "measured again"
            if attempt + 1 == tries:
                again = f"kept the attempt with {kept[1]:.2f}, but better measured on a quiet machine"
            say(f"{what}: other work on our cores used {cores:.2f} of them; {again}")
    assert kept is not None
    return kept
