"""Work of others on this machine, and measurements made again because of it.

A live run on CPUs measures the servers only while the cores are theirs. What all processes together used,
less what our own used, tells when they were not, without a look at any latency: what is thrown away is
not chosen by its result.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil

Result = TypeVar("Result")
MOST_CORES = 0.1
TRIES = 2
IDLE = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests are in user; stolen: see `stolen_time`


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds since some moment: of all processes, and of this one and its descendants."""

    at_s: float
    all_s: float
    own_s: float

    @classmethod
    def now(cls) -> CpuUse:
        """As the operating system counts them, in hundredths of a second."""
        times = psutil.cpu_times()._asdict()
        used_s = sum(seconds for kind, seconds in times.items() if kind not in IDLE)
        return cls(time.monotonic(), used_s, _own_s())

    def foreign_cores(self, since: CpuUse) -> float:
        """Cores that others kept busy in between, in the mean."""
        foreign_s = (self.all_s - since.all_s) - (self.own_s - since.own_s)
        return max(0.0, foreign_s) / max(self.at_s - since.at_s, 1e-9)


def _own_s() -> float:
    """User and system time of this process and all below it, those that have ended included."""
    this = psutil.Process()
    total_s = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile; its parent counts it
            times = process.cpu_times()
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


def undisturbed(
    measure: Callable[[int], Result], what: str, say: Callable[[str], None] | None = None, tries: int = TRIES
) -> tuple[Result, float]:
    """A measurement, and the cores that others used meanwhile; made again while that is too much.

    measure: gets the number of the attempt. tries: after so many the last one stands.
    """
    for attempt in range(tries):
        began = CpuUse.now()
        result = measure(attempt)
        cores = CpuUse.now().foreign_cores(began)
        if cores <= MOST_CORES:
            break
        if say is not None:
            last = attempt + 1 == tries
            again = "kept, but better measured on a quiet machine" if last else "measured again"
            say(f"{what}: other work on this machine used {cores:.2f} cores; {again}")
    return result, cores
