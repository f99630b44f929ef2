"""Measurements made again where others disturbed them, as far as there is time for it.

Which attempt stands is chosen by how much it was disturbed (`foreign_work`), never by what it measured. The
time for it is limited: on a machine that is never quiet, measuring would not end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ersim.errors import ErsimError
from testbed.expert_server import ExpertFailed
from testbed.foreign_work import Disturbance, watched

Result = TypeVar("Result")
TRIES = 3  # of one measurement, the first included
TRIES_AT_ONCE = 2  # what disturbs a machine may last: the time is for others, too


@dataclass(frozen=True)
class _Kept:
    """The least disturbed attempt so far. took_s: what the last one took; keep: where results go."""

    what: str
    measure: Callable[[int], Any]
    keep: Callable[[Any, Disturbance], None]
    stolen: Callable[[Any], float] | None
    taken: Disturbance
    took_s: float
    attempts: int = 1
    failed: bool = False


class Calmly:
    """The measurements of one command, and the time that is left to make disturbed ones again."""

    def __init__(
        self, again_s: float | None, say: Callable[[str], None] | None = None, tries: int = TRIES
    ) -> None:
        """again_s: seconds for measuring again. None: each is made once, whatever others do (GPUs)."""
        self._left_s = again_s
        self._say = say or (lambda text: None)
        self._tries = tries
        self._kept: list[_Kept] = []
        self.failed: list[str] = []

    @property
    def left_s(self) -> float:
        """Seconds that may still go into measuring again."""
        return self._left_s or 0.0

    def now(self, what: str, measure: Callable[[int], Result]) -> Result:
        """A measurement that the next ones build upon: made again at once, and once at most.

        measure: of the attempt's number; what it raises goes on.
        """
        results: list[Result] = []
        kept = self._first(what, measure, lambda result, _: results.append(result), None)
        while self._wanted(kept) and kept.attempts < TRIES_AT_ONCE:
            kept = self._again(kept)
        self._say_of_the_rest(kept)
        return results[-1]

    def first(
        self,
        what: str,
        measure: Callable[[int], Result],
        keep: Callable[[Result, Disturbance], None],
        stolen: Callable[[Result], float] | None = None,
    ) -> None:
        """A measurement that `rest` may make again. keep: called with each result that stands so far.

        stolen: share of time that a result's steps lost to other machines; None: not looked at.
        """
        self._kept.append(self._first(what, measure, keep, stolen))

    def rest(self) -> None:
        """Make again what was disturbed while there is time: each once before any twice, the worst first.

        What disturbs a machine goes by: later is better than at once. An attempt that fails costs no result:
        the one before stands, and `failed` tells. After an expert has failed nothing is made again.
        """
        while wanted := [kept for kept in self._kept if self._wanted(kept)]:
            kept = min(wanted, key=lambda one: (one.attempts, -one.taken.amount))
            index = self._kept.index(kept)
            try:
                self._kept[index] = self._again(kept)
            except ErsimError as error:
                self._kept[index] = replace(kept, failed=True)
                self.failed.append(f"{kept.what} again: {error}")
                self._say(f"{kept.what} again failed, the attempt before stands: {error}")
                if isinstance(error, ExpertFailed):
                    break
        for kept in self._kept:
            self._say_of_the_rest(kept)

    def _first(
        self,
        what: str,
        measure: Callable[[int], Result],
        keep: Callable[[Result, Disturbance], None],
        stolen: Callable[[Result], float] | None,
    ) -> _Kept:
        result, taken, took_s = _made(measure, 0, stolen)
        keep(result, taken)
        if self._left_s is not None and taken.amount > 1.0:
            self._say(f"{what}: {taken.words}")
        return _Kept(what, measure, keep, stolen, taken, took_s)

    def _wanted(self, kept: _Kept) -> bool:
        """Whether to make it again, and there is time: an attempt is taken to last as the one before."""
        more = kept.attempts < self._tries and not kept.failed
        return kept.taken.amount > 1.0 and more and kept.took_s <= self.left_s

    def _again(self, kept: _Kept) -> _Kept:
        """One more attempt, in the place of the one that stands if it was disturbed less."""
        self._say(f"{kept.what} again: {self.left_s:.0f} s are left to make disturbed measurements again")
        began_s = time.monotonic()
        try:
            result, taken, took_s = _made(kept.measure, kept.attempts, kept.stolen)
        finally:
            self._left_s = max(0.0, self.left_s - (time.monotonic() - began_s))
        if taken.amount < kept.taken.amount:
            kept.keep(result, taken)
            kept = replace(kept, taken=taken)
        return replace(kept, took_s=took_s, attempts=kept.attempts + 1)

    def _say_of_the_rest(self, kept: _Kept) -> None:
        """What stands though it was disturbed."""
        if self._left_s is None or kept.taken.amount <= 1.0:
            return
        of = "the only attempt" if kept.attempts == 1 else f"the best of {kept.attempts} attempts"
        more = f" or with more time for it (remeasure_s: {self.left_s:.0f} s are left)"
        self._say(
            f"{kept.what}: {of} had {kept.taken.figure}; better measured on a quiet machine"
            f"{more if kept.attempts < self._tries and not kept.failed else ''}"
        )


def _made(
    measure: Callable[[int], Result], attempt: int, stolen: Callable[[Result], float] | None
) -> tuple[Result, Disturbance, float]:
    """A result, what disturbed it, and the seconds that it took."""
    began_s = time.monotonic()
    result, cores = watched(lambda: measure(attempt))
    taken = Disturbance(cores, stolen(result) if stolen is not None else 0.0)
    return result, taken, time.monotonic() - began_s
