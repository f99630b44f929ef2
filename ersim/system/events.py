"""The clock: a SimPy environment whose queue also holds the turns of users, gateway and replicas."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop

from simpy import Environment
from simpy.events import Event

from ersim.system.turns import Agenda, Turn


class Clock(Environment):
    """A SimPy environment in every respect: processes, timeouts and resources of your own run on it too.

    `agenda` enters turns in the same queue; both have the same time.
    """

    def __init__(self) -> None:
        self.agenda = Agenda()
        super().__init__()
        self._queue = self.agenda.queue  # type: ignore[assignment]
        self._eid = self.agenda.numbers

    @property
    def _now(self) -> float:
        return self.agenda.now_s

    @_now.setter
    def _now(self, now_s: float) -> None:
        self.agenda.now_s = float(now_s)

    def step(self) -> None:
        """Take the next turn or process the next event; raises EmptySchedule when there is neither."""
        queue = self.agenda.queue
        if queue and isinstance(queue[0][3], Turn):
            now_s, _, number, turn = heappop(queue)
            self.agenda.now_s = now_s
            turn.happen(now_s, number)  # type: ignore[attr-defined]
        else:
            super().step()

    def call_later(self, delay_s: float, function: Callable[[Event], None]) -> None:
        """Call `function(event)` after `delay_s`."""
        event = self.timeout(delay_s)
        assert event.callbacks is not None
        event.callbacks.append(function)
