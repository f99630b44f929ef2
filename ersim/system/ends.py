"""How requests end: recorded, counted, and told to whoever sent them."""

from __future__ import annotations

import math
from typing import Final

from ersim.results.records import COMPLETED, FAILED, REJECTED, STATUSES
from ersim.system.inflight import InFlight
from ersim.system.log import RequestLog
from ersim.system.sources import Source
from ersim.system.turns import Agenda

_COMPLETED: Final = STATUSES.index(COMPLETED)
_FAILED: Final = STATUSES.index(FAILED)
_REJECTED: Final = STATUSES.index(REJECTED)


class Ends:
    """Where gateway and replicas report requests that are over.

    network_s: one way, client to gateway; return_s: from an expert back to the client. The run stops
    with the `target`-th end, None for never. `source` is set when it exists.
    """

    __slots__ = ("_agenda", "_network_s", "_return_s", "_target", "log", "source")

    def __init__(self, agenda: Agenda, network_s: float, return_s: float, target: int | None) -> None:
        self._agenda = agenda
        self._network_s = network_s
        self._return_s = return_s
        self._target = -1 if target is None else target
        self.log = RequestLog()
        self.source: Source | None = None

    @property
    def completed(self) -> int:
        """Requests that were answered."""
        return self.log.by_status[_COMPLETED]

    @property
    def failed(self) -> int:
        """Requests that were lost on a replica."""
        return self.log.by_status[_FAILED]

    @property
    def rejected(self) -> int:
        """Requests that were turned away."""
        return self.log.by_status[_REJECTED]

    def finished(self, flight: InFlight, time_s: float) -> None:
        """The engine has ended the request at `time_s`."""
        return_s = self._return_s
        client_s = time_s + return_s
        gateway_s = flight.submit_s - flight.send_s + return_s
        self._end(flight, _COMPLETED, gateway_s, flight.first_s + return_s, client_s, None)

    def fail(self, flight: InFlight, time_s: float, why: str) -> None:
        """The request was lost on its replica."""
        self._end_badly(flight, _FAILED, time_s + self._return_s, why)

    def refuse(self, flight: InFlight, time_s: float, why: str) -> None:
        """The replica's server does not take the request."""
        self._end_badly(flight, _REJECTED, time_s + self._return_s, why)

    def turn_away(self, flight: InFlight, why: str) -> None:
        """The gateway does not take the request, or has nowhere to send it."""
        self._end_badly(flight, _REJECTED, self._agenda.now_s + self._network_s, why)

    def _end_badly(self, flight: InFlight, status: int, client_s: float, why: str) -> None:
        self._end(flight, status, client_s - flight.send_s, math.nan, client_s, why)

    def _end(
        self,
        flight: InFlight,
        status: int,
        gateway_s: float,
        first_s: float,
        client_s: float,
        why: str | None,
    ) -> None:
        log = self.log
        log.add(flight, status, gateway_s, first_s, client_s, why)
        if log.ended == self._target:
            self._agenda.stopped = True
        assert self.source is not None
        self.source.ended(flight, client_s)
