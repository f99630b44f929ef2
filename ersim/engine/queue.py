"""The waiting queue under vLLM's two policies: first come first served, and by priority."""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ersim.engine.request import EngineRequest


class WaitingQueue:
    """Requests that wait to be admitted. size: how many."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0

    def append(self, request: EngineRequest) -> None:
        """Take in a new request."""
        raise NotImplementedError

    def push_front(self, request: EngineRequest) -> None:
        """Take back a preempted request."""
        raise NotImplementedError

    def head(self) -> EngineRequest:
        """Whose turn it is."""
        raise NotImplementedError

    def pop_head(self) -> None:
        """The head leaves."""
        raise NotImplementedError

    def remove(self, request: EngineRequest) -> None:
        """Any request leaves. O(queue)."""
        raise NotImplementedError

    def in_order(self) -> list[EngineRequest]:
        """All requests, next one first."""
        raise NotImplementedError


class FcfsQueue(WaitingQueue):
    """First come, first served; a preempted request goes to the front."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        super().__init__()
        self._requests: deque[EngineRequest] = deque()

    def append(self, request: EngineRequest) -> None:
        """Take in a new request."""
        self.size += 1
        self._requests.append(request)

    def push_front(self, request: EngineRequest) -> None:
        """Take back a preempted request."""
        self.size += 1
        self._requests.appendleft(request)

    def head(self) -> EngineRequest:
        """Whose turn it is."""
        return self._requests[0]

    def pop_head(self) -> None:
        """The head leaves."""
        self.size -= 1
        self._requests.popleft()

    def remove(self, request: EngineRequest) -> None:
        """Any request leaves. O(queue)."""
        self.size -= 1
        self._requests.remove(request)

    def in_order(self) -> list[EngineRequest]:
        """All requests, next one first."""
        return list(self._requests)


class PriorityQueue(WaitingQueue):
    """Smallest priority value first, then earliest arrival; preempted requests have no privilege."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, int, EngineRequest]] = []

    def append(self, request: EngineRequest) -> None:
        """Take in a request, new or preempted."""
        self.size += 1
        heapq.heappush(self._heap, (request.priority, request.arrival, request))

    def push_front(self, request: EngineRequest) -> None:
        """Take back a preempted request."""
        self.append(request)

    def head(self) -> EngineRequest:
        """Whose turn it is."""
        return self._heap[0][2]

    def pop_head(self) -> None:
        """The head leaves."""
        self.size -= 1
        heapq.heappop(self._heap)

    def remove(self, request: EngineRequest) -> None:
        """Any request leaves. O(queue)."""
        self._heap.remove((request.priority, request.arrival, request))
        heapq.heapify(self._heap)
        self.size -= 1

    def in_order(self) -> list[EngineRequest]:
        """All requests, next one first."""
        return [entry[2] for entry in sorted(self._heap)]
