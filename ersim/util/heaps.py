"""A priority queue for the hot path: smallest key first, among equal keys the smallest number.

Two ways to the same order, for numbers are never equal: compiled, keys and numbers lie in arrays of
plain C numbers (a seventh of the time of tuples that Python compares); interpreted, `heapq`, which is C
already, is the faster one.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from ersim.util.vectors import append, i64, is_compiled, mypyc_attr, vec


@mypyc_attr(allow_interpreted_subclasses=True)
class Item:
    """What can stand in a heap."""

    __slots__ = ()


class Heap:
    """Items by (key, number). size: how many."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size: i64 = 0

    def push(self, key: float, number: i64, item: Item) -> None:
        """Put an item in; no other item has this number."""
        raise NotImplementedError

    def key(self) -> float:
        """The smallest key; ask only while `size` is positive, as for what follows."""
        raise NotImplementedError

    def number(self) -> i64:
        """The number that goes with it."""
        raise NotImplementedError

    def first(self) -> Item:
        """The item itself."""
        raise NotImplementedError

    def pop(self) -> Item:
        """Take the first item out."""
        raise NotImplementedError


class TupleHeap(Heap):
    """What Python has at hand."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[tuple[float, int, Item]] = []

    def push(self, key: float, number: i64, item: Item) -> None:
        """Put an item in."""
        self.size += 1
        heappush(self._entries, (key, number, item))

    def key(self) -> float:
        """The smallest key."""
        return self._entries[0][0]

    def number(self) -> i64:
        """The number that goes with it."""
        return self._entries[0][1]

    def first(self) -> Item:
        """The item itself."""
        return self._entries[0][2]

    def pop(self) -> Item:
        """Take the first item out."""
        self.size -= 1
        return heappop(self._entries)[2]


class VectorHeap(Heap):
    """A binary heap in three parallel arrays; the places from `size` on are spare."""

    __slots__ = ("_items", "_keys", "_numbers")

    def __init__(self) -> None:
        super().__init__()
        self._keys: vec[float] = vec[float]()
        self._numbers: vec[i64] = vec[i64]()
        self._items: vec[Item] = vec[Item]()

    def push(self, key: float, number: i64, item: Item) -> None:
        """Put an item in: from the end up, past all that come later."""
        place = self.size
        if place == len(self._keys):
            self._keys = append(self._keys, key)
            self._numbers = append(self._numbers, number)
            self._items = append(self._items, item)
        self.size = place + 1
        keys, numbers, items = self._keys, self._numbers, self._items
        while place > 0:
            parent = (place - 1) >> 1
            above = keys[parent]
            if above < key or (above == key and numbers[parent] < number):
                break
            keys[place] = above
            numbers[place] = numbers[parent]
            items[place] = items[parent]
            place = parent
        keys[place] = key
        numbers[place] = number
        items[place] = item

    def key(self) -> float:
        """The smallest key."""
        return self._keys[0]

    def number(self) -> i64:
        """The number that goes with it."""
        return self._numbers[0]

    def first(self) -> Item:
        """The item itself."""
        return self._items[0]

    def pop(self) -> Item:
        """Take the first item out: the last one goes from the top down to its place."""
        keys, numbers, items = self._keys, self._numbers, self._items
        first = items[0]
        size = self.size - 1
        self.size = size
        key, number, item = keys[size], numbers[size], items[size]
        place: i64 = 0
        while True:
            child = 2 * place + 1
            if child >= size:
                break
            below = keys[child]
            other = child + 1
            if other < size:
                beside = keys[other]
                if beside < below or (beside == below and numbers[other] < numbers[child]):
                    child, below = other, beside
            if key < below or (key == below and number < numbers[child]):
                break
            keys[place] = below
            numbers[place] = numbers[child]
            items[place] = items[child]
            place = child
        keys[place] = key
        numbers[place] = number
        items[place] = item
        return first


def make_heap() -> Heap:
    """The heap that is the faster one here."""
    return VectorHeap() if _COMPILED else TupleHeap()


_COMPILED: Final = is_compiled(make_heap)
