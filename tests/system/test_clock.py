"""Turns and SimPy's own events share one time and one order."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ersim.system.events import Clock
from ersim.system.turns import Turn


class Note(Turn):
    """Writes down when its turn comes."""

    def __init__(self, notes: list[tuple[str, float]], name: str) -> None:
        self.notes, self.name = notes, name

    def happen(self, now_s: float, number: int) -> None:
        self.notes.append((self.name, now_s))


def test_who_was_entered_first_goes_first_whoever_it_is() -> None:
    clock, notes = Clock(), []
    clock.agenda.enter(Note(notes, "turn 1"), 1.0)
    clock.call_later(1.0, lambda event: notes.append(("event 1", clock.now)))
    clock.agenda.enter(Note(notes, "turn 2"), 1.0)
    clock.call_later(0.5, lambda event: notes.append(("event 2", clock.now)))
    clock.agenda.enter(Note(notes, "turn 3"), 0.25)
    assert clock.peek() == 0.25
    clock.run()
    assert notes == [("turn 3", 0.25), ("event 2", 0.5), ("turn 1", 1.0), ("event 1", 1.0), ("turn 2", 1.0)]
    assert clock.peek() == math.inf


def test_a_process_runs_beside_turns_until_a_given_time() -> None:
    clock, notes = Clock(), []

    def process() -> Iterator[object]:
        while True:
            yield clock.timeout(2.0)
            notes.append(("process", clock.now))

    clock.process(process())  # type: ignore[arg-type]
    for delay_s in (1.0, 2.0, 3.0, 9.0):
        clock.agenda.enter(Note(notes, "turn"), delay_s)
    clock.run(until=5.0)
    assert clock.now == 5.0
    # the turn at 2 s was entered before the process first waited
    assert notes == [("turn", 1.0), ("turn", 2.0), ("process", 2.0), ("turn", 3.0), ("process", 4.0)]
