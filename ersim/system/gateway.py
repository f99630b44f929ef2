"""The routing gateway: workers that embed, classify and forward, and a queue before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from ersim.errors import ErsimError
from ersim.system.events import Clock
from ersim.system.inflight import InFlight
from ersim.system.replica import Replica
from ersim.system.turns import Agenda, Turn
from ersim.util.vectors import i64


class Destination(Protocol):
    """Where a gateway can send a request: a replica, or what stands in for one."""

    def submit(self, flight: InFlight, at_s: float) -> None:
        """The request arrives at `at_s`, now or a network delay from now."""
        ...


class Gateway:
    """A resource of `workers` servers with one FIFO queue; None workers serve everyone at once.

    `service_s(request)` is the time a worker spends on a request; `decide(flight)` then names the
    expert's index; `pick(expert)` the replica. A queue of `queue_limit` waiting requests turns
    further ones away (429). `reject(flight, reason)` reports what was turned away.
    """

    __slots__ = (
        "_agenda",
        "_backend_network_s",
        "_decide",
        "_free",
        "_pick",
        "_queue",
        "_queue_limit",
        "_reject",
        "_replicas",
        "_service_s",
        "_unlimited",
        "in_service",
    )

    def __init__(
        self,
        env: Clock,
        *,
        workers: int | None,
        queue_limit: int | None,
        backend_network_s: float,
        service_s: Callable[[InFlight], float],
        decide: Callable[[InFlight], int],
        pick: Callable[[int], int],
        replicas: Sequence[Sequence[Destination]],
        reject: Callable[[InFlight, str], None],
    ) -> None:
        self._agenda: Agenda = env.agenda
        self._unlimited = workers is None
        self._free = 0 if workers is None else workers
        self._queue: deque[InFlight] = deque()
        self._queue_limit = queue_limit
        self._backend_network_s = backend_network_s
        self._service_s = service_s
        self._decide = decide
        self._pick = pick
        self._replicas = [list(row) for row in replicas]
        self._reject = reject
        self.in_service = 0

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return len(self._queue)

    def arrive(self, flight: InFlight) -> None:
        """A request has reached the gateway."""
        if self._unlimited or self._free > 0:
            self._serve(flight)
        elif self._queue_limit is not None and len(self._queue) >= self._queue_limit:
            self._reject(flight, "gateway queue full (429)")
        else:
            self._queue.append(flight)

    def _serve(self, flight: InFlight) -> None:
        self._free -= 1
        self.in_service += 1
        self._agenda.enter(Service(self, flight), self._service_s(flight))

    def served(self, flight: InFlight, now_s: float) -> None:
        """A worker is done with a request, chooses where it goes, and takes the next one."""
        self.in_service -= 1
        self._free += 1
        if self._queue:
            self._serve(self._queue.popleft())
        flight.decided_s = now_s
        expert = flight.expert = self._decide(flight)
        try:
            replica = flight.replica = self._pick(expert)
        except ErsimError as error:
            self._reject(flight, str(error))
            return
        destination = self._replicas[expert][replica]
        if isinstance(destination, Replica):  # a direct call when compiled
            destination.submit(flight, now_s + self._backend_network_s)
        else:
            destination.submit(flight, now_s + self._backend_network_s)


class Service(Turn):
    """The end of one request's service."""

    __slots__ = ("_flight", "_gateway")

    def __init__(self, gateway: Gateway, flight: InFlight) -> None:
        self._gateway = gateway
        self._flight = flight

    def happen(self, now_s: float, number: i64) -> None:
        """The worker is done."""
        self._gateway.served(self._flight, now_s)
