"""The waiting queue under vLLM's two policies: first come first served, and by priority."""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ersim.engine.request import EngineRequest


class FcfsQueue(deque["EngineRequest"]):
    """First come, first served; a preempted request goes to the front.

    `append` and `remove` (any request, O(queue)) are those of deque.
    """

    def push_front(self, request: EngineRequest) -> None:
        """Take back a preempted request."""
        self.appendleft(request)

    def head(self) -> EngineRequest:
        """Whose turn it is."""
        return self[0]

    def pop_head(self) -> None:
        """The head leaves."""
        self.popleft()

    def in_order(self) -> list[EngineRequest]:
        """All requests, next one first."""
        return list(self)


class PriorityQueue(list[tuple[int, int, "EngineRequest"]]):
    """Smallest priority value first, then earliest arrival; preempted requests have no privilege."""

    def append(self, request: EngineRequest) -> None:  # type: ignore[override]
        """Take in a request, new or preempted."""
        heapq.heappush(self, (request.priority, request.arrival, request))

    push_front = append

    def head(self) -> EngineRequest:
        """Whose turn it is."""
        return self[0][2]

    def pop_head(self) -> None:
        """The head leaves."""
        heapq.heappop(self)

    def remove(self, request: EngineRequest) -> None:  # type: ignore[override]
        """Any request leaves. O(queue)."""
        super().remove((request.priority, request.arrival, request))
        heapq.heapify(self)

    def in_order(self) -> list[EngineRequest]:
        """All requests, next one first."""
        return [entry[2] for entry in sorted(self)]
