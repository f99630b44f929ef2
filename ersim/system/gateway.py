"""The routing gateway: workers that embed, classify and forward, and a queue before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from simpy import Environment
from simpy.events import Event

from ersim.errors import ErsimError
from ersim.system.events import Call
from ersim.system.inflight import InFlight
from ersim.system.replica import Replica


class Gateway:
    """A resource of `workers` servers with one FIFO queue; None workers serve everyone at once.

    `service_s(request)` is the time a worker spends on a request; `decide(flight)` then names the
    expert's index; `pick(expert)` the replica. A queue of `queue_limit` waiting requests turns
    further ones away (429). `reject(flight, reason)` reports what was turned away.
    """

    def __init__(
        self,
        env: Environment,
        *,
        workers: int | None,
        queue_limit: int | None,
        backend_network_s: float,
        service_s: Callable[[InFlight], float],
        decide: Callable[[InFlight], int],
        pick: Callable[[int], int],
        replicas: Sequence[Sequence[Replica]],
        reject: Callable[[InFlight, str], None],
    ) -> None:
        self._env = env
        self._free = workers
        self._queue: deque[InFlight] = deque()
        self._queue_limit = queue_limit
        self._backend_network_s = backend_network_s
        self._service_s = service_s
        self._decide = decide
        self._pick = pick
        self._replicas = replicas
        self._reject = reject
        self.in_service = 0

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return len(self._queue)

    def arrive(self, flight: InFlight) -> None:
        """A request has reached the gateway."""
        if self._free is None or self._free > 0:
            self._serve(flight)
        elif self._queue_limit is not None and len(self._queue) >= self._queue_limit:
            self._reject(flight, "gateway queue full (429)")
        else:
            self._queue.append(flight)

    def _serve(self, flight: InFlight) -> None:
        if self._free is not None:
            self._free -= 1
        self.in_service += 1
        Call(self._env, self._service_s(flight), self._served, flight)

    def _served(self, event: Event) -> None:
        self.in_service -= 1
        if self._free is not None:
            self._free += 1
            if self._queue:
                self._serve(self._queue.popleft())
        flight: InFlight = event._value
        now = self._env._now
        flight.decided_s = now
        expert = flight.expert = self._decide(flight)
        try:
            replica = flight.replica = self._pick(expert)
        except ErsimError as error:
            self._reject(flight, str(error))
            return
        self._replicas[expert][replica].submit(flight, now + self._backend_network_s)
