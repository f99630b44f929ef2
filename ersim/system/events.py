"""The one SimPy event the hot path uses: call a function later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simpy import Environment
from simpy.events import NORMAL, Event


class Call(Event):
    """An event that calls `function(event)` after `delay_s`; `argument` is the event's value.

    A `simpy.Timeout` with one callback, built in one step: the gateway and the replicas make one
    per request and per engine step.
    """

    __slots__ = ()

    def __init__(
        self, env: Environment, delay_s: float, function: Callable[[Event], None], argument: Any = None
    ) -> None:
        self.env = env
        self.callbacks = [function]
        self._value = argument
        self._ok = True
        self._defused = False
        env.schedule(self, NORMAL, delay_s)
