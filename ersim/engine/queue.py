"""The waiting queue under vLLM's two policies: first come first served, and by priority."""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ersim.engine.request import EngineRequest


class FcfsQueue:
    """First come, first served; a preempted request goes to the front."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: deque[EngineRequest] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def append(self, request: EngineRequest) -> None:
        """Take in a new request."""
        self._requests.append(request)

    def push_front(self, request: EngineRequest) -> None:
        """Take back a preempted request."""
        self._requests.appendleft(request)

    def head(self) -> EngineRequest:
        """Whose turn it is."""
        return self._requests[0]

    def pop(self) -> None:
        """The head leaves."""
        self._requests.popleft()

    def remove(self, request: EngineRequest) -> None:
        """Any request leaves. O(queue)."""
        self._requests.remove(request)

    def in_order(self) -> list[EngineRequest]:
        """All requests, next one first."""
        return list(self._requests)


class PriorityQueue:
    """Smallest priority value first, then earliest arrival; preempted requests have no privilege."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, EngineRequest]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def append(self, request: EngineRequest) -> None:
        """Take in a request, new or preempted."""
        heapq.heappush(self._heap, (request.priority, request.arrival, request))

    push_front = append

    def head(self) -> EngineRequest:
        """Whose turn it is."""
        return self._heap[0][2]

    def pop(self) -> None:
        """The head leaves."""
        heapq.heappop(self._heap)

    def remove(self, request: EngineRequest) -> None:
        """Any request leaves. O(queue)."""
        self._heap.remove((request.priority, request.arrival, request))
        heapq.heapify(self._heap)

    def in_order(self) -> list[EngineRequest]:
        """All requests, next one first."""
        return [entry[2] for entry in sorted(self._heap)]
