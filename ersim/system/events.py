"""The clock: a SimPy environment in which users, gateway and replicas take their turns."""

from __future__ import annotations

from collections.abc import Callable

from simpy import Environment
from simpy.events import Event

from ersim.system.turns import Agenda


class Numbers:
    """The agenda's numbers as SimPy asks for them."""

    __slots__ = ("_agenda",)

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda

    def __iter__(self) -> Numbers:
        return self

    def __next__(self) -> int:
        agenda = self._agenda
        number = agenda.entered
        agenda.entered = number + 1
        return number


class Clock(Environment):
    """A SimPy environment in every respect: processes, timeouts and resources of your own run on it too.

    `agenda` holds the turns; both have the same time, and one order.
    """

    def __init__(self) -> None:
        self.agenda = Agenda()
        super().__init__()
        self._queue = self.agenda.events  # type: ignore[assignment]
        self._eid = Numbers(self.agenda)  # type: ignore[assignment]

    @property
    def _now(self) -> float:
        return self.agenda.now_s

    @_now.setter
    def _now(self, now_s: float) -> None:
        self.agenda.now_s = float(now_s)

    def peek(self) -> float:
        """When the next turn or event is; infinity for never."""
        return min(self.agenda.next_s(), super().peek())

    def step(self) -> None:
        """Take the next turn or process the next event; raises EmptySchedule when there is neither."""
        if self.agenda.is_turn_next():
            self.agenda.take_turn()
        else:
            super().step()

    def call_later(self, delay_s: float, function: Callable[[Event], None]) -> None:
        """Call `function(event)` after `delay_s`."""
        event = self.timeout(delay_s)
        assert event.callbacks is not None
        event.callbacks.append(function)
