"""The two heaps are one order: that of sorted (key, number)."""

from __future__ import annotations

import random

import pytest

from ersim.util.heaps import Heap, Item, TupleHeap, VectorHeap, make_heap


class Named(Item):
    def __init__(self, name: tuple[float, int]) -> None:
        self.name = name


@pytest.mark.parametrize("kind", [TupleHeap, VectorHeap])
def test_pops_in_order_of_key_and_number(kind: type[Heap]) -> None:
    rng = random.Random(7)
    heap, inside = kind(), []
    for number in range(5000):
        if inside and rng.random() < 0.45:
            smallest = min(inside)
            assert (heap.key(), heap.number()) == smallest
            first = heap.first()
            assert heap.pop() is first
            assert first.name == smallest  # type: ignore[attr-defined]
            inside.remove(smallest)
        else:
            name = (float(rng.randrange(40)), number)  # keys repeat: numbers decide
            heap.push(name[0], number, Named(name))
            inside.append(name)
        assert heap.size == len(inside)


def test_there_is_a_heap_here() -> None:
    heap = make_heap()
    heap.push(2.0, 0, Named((2.0, 0)))
    heap.push(1.0, 1, Named((1.0, 1)))
    assert heap.key() == 1.0
