"""Turns: what happens at a moment, without a SimPy event for each moment.

A `simpy.Event` is made, triggered and thrown away with a list of callbacks, though nobody but its
maker waits for it. Users, gateway and replicas therefore enter themselves in a queue of `Turn`s,
which are there for good. SimPy's own events wait in SimPy's own queue; both count their entries
with the same numbers, so that there is one order in time and one tie-break (who was entered first
goes first), as if all stood in one queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

from ersim.util.heaps import Heap, Item, make_heap
from ersim.util.vectors import i64, mypyc_attr

Entry = tuple[float, int, int, object]
"""SimPy's own: time, priority, number, event."""

NORMAL_PRIORITY: Final = 1
"""`simpy.events.NORMAL`, the priority of all turns."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Turn(Item):
    """Whoever can be entered in an `Agenda`."""

    __slots__ = ()

    def happen(self, now_s: float, number: i64) -> None:
        """It is `now_s` and entry `number` is due; entries are never taken back: see if it still holds."""
        raise NotImplementedError


class Agenda:
    """What is to come, for a `Clock`. `events` is the queue of SimPy's own events.

    now_s: the time. entered: how many entries there have been. stopped: set it and `drain` returns
    after the turn.
    """

    __slots__ = ("_turns", "entered", "events", "now_s", "stopped")

    def __init__(self) -> None:
        self._turns: Heap = make_heap()
        self.events: list[Entry] = []
        self.entered: i64 = 0
        self.now_s = 0.0
        self.stopped = False

    def enter(self, turn: Turn, delay_s: float) -> i64:
        """Let `turn` happen `delay_s` from now; returns the entry's number."""
        number = self.entered
        self.entered = number + 1
        self._turns.push(self.now_s + delay_s, number, turn)
        return number

    def next_s(self) -> float:
        """When the next turn is; infinity for never."""
        return self._turns.key() if self._turns.size else float("inf")

    def is_turn_next(self) -> bool:
        """Whether a turn comes before SimPy's next event."""
        if not self._turns.size:
            return False
        if not self.events:
            return True
        time_s, priority, number, _ = self.events[0]
        return (self._turns.key(), NORMAL_PRIORITY, self._turns.number()) < (time_s, priority, number)

    def take_turn(self) -> None:
        """Let the next turn happen."""
        turns = self._turns
        self.now_s = now_s = turns.key()
        number = turns.number()
        cast("Turn", turns.pop()).happen(now_s, number)

    def drain(self, simpy_step: Callable[[], None]) -> None:
        """Take turns and SimPy's events in their order until `stopped`, or nothing is left."""
        turns, events = self._turns, self.events
        while not self.stopped:
            if turns.size and (not events or self.is_turn_next()):
                self.take_turn()
            elif events:
                simpy_step()
            else:
                return
