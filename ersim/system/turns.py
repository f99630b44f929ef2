"""Turns: what happens at a moment, without a SimPy event for each moment.

A `simpy.Event` is made, triggered and thrown away with a list of callbacks, though nobody but its
maker waits for it. Users, gateway and replicas therefore enter themselves in the queue of SimPy's
events as `Turn`s, which are there for good: one queue, one order in time, one tie-break (who was
entered first goes first), and SimPy's own events stand among them as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Final

Entry = tuple[float, int, int, object]
"""SimPy's own: time, priority, number, event."""

NORMAL_PRIORITY: Final = 1
"""`simpy.events.NORMAL`."""


class Turn:
    """Whoever can be entered in an `Agenda`."""

    __slots__ = ()

    def happen(self, now_s: float, number: int) -> None:
        """It is `now_s` and entry `number` is due; entries are never taken back: see if it still holds."""
        raise NotImplementedError


class Agenda:
    """What is to come, for a `Clock`: the queue and the numbers are SimPy's too.

    now_s: the time. stopped: set it and `drain` returns after the turn.
    """

    __slots__ = ("now_s", "numbers", "queue", "stopped")

    def __init__(self) -> None:
        self.queue: list[Entry] = []
        self.numbers = count()
        self.now_s = 0.0
        self.stopped = False

    def enter(self, turn: Turn, delay_s: float) -> int:
        """Let `turn` happen `delay_s` from now; returns the entry's number."""
        number = next(self.numbers)
        heappush(self.queue, (self.now_s + delay_s, NORMAL_PRIORITY, number, turn))
        return number

    def drain(self, simpy_step: Callable[[], None]) -> None:
        """Take turns and SimPy's events in their order until `stopped`, or nothing is left."""
        queue = self.queue
        while queue and not self.stopped:
            turn = queue[0][3]
            if isinstance(turn, Turn):
                now_s, _, number, _ = heappop(queue)
                self.now_s = now_s
                turn.happen(now_s, number)
            else:
                simpy_step()
