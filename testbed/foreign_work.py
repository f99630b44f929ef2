"""What others took of this machine while something was measured.

A live run on CPUs measures the servers only while the cores are theirs. What all processes together used
of the cores that ours may run on, less what our own used, tells when they were not, and so does what the
hypervisor took from the engines' steps (`core_time`). Neither looks at any latency.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import psutil

Result = TypeVar("Result")
MOST_CORES = 0.1
MOST_STOLEN = 0.03
"""Of the steps' time. In four profiles it was at most 0.02, in a fifth 0.1 to 0.3: requests waited 10 ms
instead of 4 to be let in, and little of what was fitted held for the quiet minutes after it."""
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


@dataclass(frozen=True)
class Disturbance:
    """What others took during a measurement.

    cores: that other processes used of those that are ours, in the mean. stolen: share of the steps' time
    that the hypervisor gave to other machines.
    """

    cores: float
    stolen: float = 0.0

    @property
    def amount(self) -> float:
        """Over what is too much: above 1 a measurement is worth making again (see `calmly`)."""
        return max(self.cores / MOST_CORES, self.stolen / MOST_STOLEN)

    @property
    def by_hypervisor(self) -> bool:
        """Whether it took more than other processes did."""
        return self.stolen / MOST_STOLEN > self.cores / MOST_CORES

    @property
    def words(self) -> str:
        """What was taken, a sentence."""
        if self.by_hypervisor:
            return f"the hypervisor took {100 * self.stolen:.0f} % of the steps' time"
        return f"other work on our cores used {self.cores:.2f} of them"

    @property
    def figure(self) -> str:
        """The same as short as can be."""
        return f"{100 * self.stolen:.0f} % stolen" if self.by_hypervisor else f"{self.cores:.2f} cores used"
