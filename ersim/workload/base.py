"""What the simulator and the live load generator ask of a workload."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from ersim.errors import SimulationError
from ersim.types import Request
from ersim.util.vectors import mypyc_attr


@mypyc_attr(allow_interpreted_subclasses=True)
class Workload:
    """Requests, either of closed-loop users or arriving on their own.

    closed: whether users wait for their answer (then ask by user) or not (then iterate `arrivals`).
    The methods of the other kind raise SimulationError.
    """

    closed: ClassVar[bool]

    def next_request(self, user: int) -> Request:
        """Closed: the user's next request. The k-th call for a user gives the same request always."""
        raise SimulationError(f"{type(self).__name__} is open: it has arrivals, no users to ask")

    def think_s(self, user: int) -> float:
        """Closed: seconds that this user thinks before the next request."""
        raise SimulationError(f"{type(self).__name__} is open: it has arrivals, no users to ask")

    def start_s(self, user: int) -> float:
        """Closed: when this user sends the first request."""
        raise SimulationError(f"{type(self).__name__} is open: it has arrivals, no users to ask")

    def arrivals(self) -> Iterator[Request]:
        """Open: the requests in order of `arrival_s`, from the beginning at every call."""
        raise SimulationError(f"{type(self).__name__} is closed: ask its users, it has no arrivals")
