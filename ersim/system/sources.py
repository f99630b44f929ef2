"""Who sends requests: users who wait for their answer, or a stream that waits for nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from simpy import Environment
from simpy.events import Event

from ersim.system.events import Call
from ersim.system.inflight import InFlight
from ersim.types import Request

Arrive = Callable[[InFlight], None]


class ClosedUsers:
    """N users, each with one request in flight at most, thinking between answer and next prompt."""

    def __init__(
        self,
        env: Environment,
        users: int,
        next_request: Callable[[int], Request],
        think_s: Callable[[int], float],
        start_s: Callable[[int], float],
        network_s: float,
        arrive: Arrive,
    ) -> None:
        self._env = env
        self._next_request = next_request
        self._think_s = think_s
        self._network_s = network_s
        self._arrive = arrive
        self.injected = 0
        for user in range(users):
            Call(env, start_s(user) + network_s, self._send, user)

    def _send(self, event: Event) -> None:
        """The event is the arrival at the gateway; the client sent one network delay before."""
        self.injected += 1
        self._arrive(InFlight(self._next_request(event._value), self._env._now - self._network_s))

    def ended(self, flight: InFlight, client_s: float) -> None:
        """The user has the whole answer (or the error) at `client_s`, thinks and asks again."""
        user = flight.request.user
        delay_s = client_s + self._think_s(user) + self._network_s - self._env._now
        Call(self._env, delay_s if delay_s > 0.0 else 0.0, self._send, user)


class OpenArrivals:
    """A stream of requests with given arrival times, one pending event at a time."""

    def __init__(
        self, env: Environment, requests: Iterator[Request], network_s: float, arrive: Arrive
    ) -> None:
        self._env = env
        self._requests = requests
        self._network_s = network_s
        self._arrive = arrive
        self.injected = 0
        self.exhausted = False
        self._schedule_next()

    def _schedule_next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self.exhausted = True
            return
        arrival_s = request.arrival_s or 0.0
        Call(self._env, max(arrival_s + self._network_s - self._env._now, 0.0), self._send, request)

    def _send(self, event: Event) -> None:
        request: Request = event._value
        self.injected += 1
        self._schedule_next()
        self._arrive(InFlight(request, request.arrival_s or 0.0))

    def ended(self, flight: InFlight, client_s: float) -> None:
        """Nobody waits for the answer."""
