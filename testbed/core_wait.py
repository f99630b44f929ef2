"""Time that a thread was ready to run while another one of this machine had its core.

Linux counts it for each thread (second figure of /proc/<process>/task/<thread>/schedstat). What the
hypervisor takes while the thread waits is in it; what it takes while the thread has its core is in neither
this nor the thread's CPU time (`core_time`).
"""

from __future__ import annotations

import os

FILE = "/proc/thread-self/schedstat"
LONGEST = 128  # characters of three counts


class CoreWait:
    """Seconds that the thread which asks has waited for its core so far; always the same thread."""

    def __init__(self, file: str = FILE) -> None:
        self._path = file
        self._file: int | None = None
        self._known = True

    def __call__(self) -> float | None:
        """Two microseconds; None where the operating system does not count it."""
        if not self._known:
            return None
        try:
            if self._file is None:  # of the thread that asks: it may not be the one that made this object
                self._file = os.open(self._path, os.O_RDONLY)
            _, waited, turns = map(int, os.pread(self._file, LONGEST, 0).split())
            if not turns:  # zeros stand for counts that are switched off: who asks has had its turn
                raise ValueError
            return waited / 1e9
        except (OSError, ValueError, IndexError, AttributeError):  # no Linux, or one without these counts
            self._known = False
            return None
