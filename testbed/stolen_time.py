"""Time that a virtual machine's processes wanted and did not get, since the host gave it to others.

Linux counts it where the hypervisor tells (`steal` in /proc/stat); nothing in the machine can be blamed for
it or sees it as load. On the machine that our live figures come from it came and went within minutes. It
stretches a step, whatever that step does (see `core_time`).
"""

from __future__ import annotations

from pathlib import Path

STAT = Path("/proc/stat")
WINDOW_S = 1.0  # counted in hundredths of a second: less would be coarse
LARGEST = 0.9
BUSY = (1, 2, 3, 6, 7)  # user, nice, system, irq, softirq in the line of all cores; guests are in user
STOLEN = 8


class StolenShare:
    """Stolen over stolen and used time of all cores in the last second, or since the call before if that
    is longer ago; 0 where nobody counts it, and where the count went back (machines that were moved)."""

    def __init__(self, stat: Path = STAT) -> None:
        self._stat = stat
        self._share = 0.0
        self._read_s: float | None = None
        self._before = self._read()

    def __call__(self, now_s: float) -> float:
        """As of now, monotonic seconds; at most `LARGEST`."""
        if self._read_s is None:
            self._read_s = now_s
        elif now_s - self._read_s >= WINDOW_S:
            used, stolen = self._read()
            used_before, stolen_before = self._before
            gone, wanted = stolen - stolen_before, used - used_before + stolen - stolen_before
            self._share = min(LARGEST, max(0.0, gone / wanted)) if wanted > 0 else 0.0
            self._read_s, self._before = now_s, (used, stolen)
        return self._share

    def _read(self) -> tuple[int, int]:
        """Used and stolen hundredths of a second since the machine started."""
        try:
            counts = self._stat.read_text(encoding="ascii").partition("\n")[0].split()
            return sum(int(counts[index]) for index in BUSY), int(counts[STOLEN])
        except (OSError, ValueError, IndexError):  # no Linux, or one that does not count it
            return 0, 0
