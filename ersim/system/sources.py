"""Who sends requests: users who wait for their answer, or a stream that waits for nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ersim.system.events import Clock
from ersim.system.inflight import InFlight
from ersim.system.turns import Agenda, Turn
from ersim.types import Request
from ersim.util.vectors import i64
from ersim.workload.base import Workload

Arrive = Callable[[InFlight], None]


class Source(Turn):
    """What the end of a request means to those who send. injected: requests sent so far."""

    __slots__ = ("injected",)

    def __init__(self) -> None:
        self.injected = 0

    def ended(self, flight: InFlight, client_s: float) -> None:
        """The sender has the whole answer (or the error) at `client_s`."""
        raise NotImplementedError


class ClosedUsers(Source):
    """N users, each with one request in flight at most, thinking between answer and next prompt."""

    __slots__ = ("_agenda", "_arrive", "_network_s", "_users", "_workload")

    def __init__(
        self,
        env: Clock,
        users: int,
        workload: Workload,
        network_s: float,
        arrive: Arrive,
    ) -> None:
        super().__init__()
        self._agenda: Agenda = env.agenda
        self._workload = workload
        self._network_s = network_s
        self._arrive = arrive
        self._users: list[User] = []
        for number in range(users):
            user = User(self, number)
            self._users.append(user)
            self._agenda.enter(user, workload.start_s(number) + network_s)

    def send(self, user: int, now_s: float) -> None:
        """A request arrives at the gateway; the client sent it one network delay before."""
        self.injected += 1
        self._arrive(InFlight(self._workload.next_request(user), now_s - self._network_s))

    def ended(self, flight: InFlight, client_s: float) -> None:
        """The user has the whole answer (or the error) at `client_s`, thinks and asks again."""
        user = flight.request.user
        agenda = self._agenda
        delay_s = client_s + self._workload.think_s(user) + self._network_s - agenda.now_s
        agenda.enter(self._users[user], delay_s if delay_s > 0.0 else 0.0)


class User(Turn):
    """One user, whose turn is the arrival of the next request at the gateway."""

    __slots__ = ("_number", "_source")

    def __init__(self, source: ClosedUsers, number: int) -> None:
        self._source = source
        self._number = number

    def happen(self, now_s: float, number: i64) -> None:
        """Ask."""
        self._source.send(self._number, now_s)


class OpenArrivals(Source):
    """A stream of requests with given arrival times, one entry in the agenda at a time."""

    __slots__ = ("_agenda", "_arrive", "_network_s", "_next", "_requests")

    def __init__(self, env: Clock, requests: Iterator[Request], network_s: float, arrive: Arrive) -> None:
        super().__init__()
        self._agenda: Agenda = env.agenda
        self._requests = requests
        self._network_s = network_s
        self._arrive = arrive
        self._next: Request | None = None
        self._enter_next()

    def _enter_next(self) -> None:
        self._next = request = next(self._requests, None)
        if request is not None:
            delay_s = (request.arrival_s or 0.0) + self._network_s - self._agenda.now_s
            self._agenda.enter(self, delay_s if delay_s > 0.0 else 0.0)

    def happen(self, now_s: float, number: i64) -> None:
        """The next request arrives at the gateway."""
        request = self._next
        assert request is not None
        self.injected += 1
        self._enter_next()
        self._arrive(InFlight(request, request.arrival_s or 0.0))

    def ended(self, flight: InFlight, client_s: float) -> None:
        """Nobody waits for the answer."""
