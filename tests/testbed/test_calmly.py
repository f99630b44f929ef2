"""What others disturbed is measured again, the worst first, as long as there is time for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from ersim.errors import ConfigError
from testbed import calmly as module
from testbed.calmly import Calmly
from testbed.expert_server import ExpertFailed
from testbed.foreign_work import MOST_CORES, Disturbance

LONG_S = 10.0
CALM = MOST_CORES / 2


class Machine:
    """Measurements that take `LONG_S` each on a clock of their own, and what others use meanwhile."""

    def __init__(self, cores: dict[tuple[str, int], float]) -> None:
        self.cores = cores
        self.made: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.kept: dict[str, tuple[int, float]] = {}
        self.now_s = 0.0

    def measure(self, name: str, attempt: int) -> int:
        self.made.append((name, attempt))
        self.now_s += LONG_S
        return attempt

    def watched(self, measure: Callable[[], int]) -> tuple[int, float]:
        result = measure()
        return result, self.cores.get(self.made[-1], CALM)

    def keep(self, name: str, attempt: int, taken: Disturbance) -> None:
        self.kept[name] = attempt, taken.cores

    def all_of(self, names: str, again_s: float | None, tries: int = 3) -> Calmly:
        calmly = Calmly(again_s, self.said.append, tries)
        for name in names:
            calmly.first(name, partial(self.measure, name), partial(self.keep, name))
        calmly.rest()
        return calmly


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[tuple[str, int], float]], Machine]:
    def made(cores: dict[tuple[str, int], float]) -> Machine:
        one = Machine(cores)
        monkeypatch.setattr(module, "watched", one.watched)
        monkeypatch.setattr(module.time, "monotonic", lambda: one.now_s)
        return one

    return made


Make = Callable[[dict[tuple[str, int], float]], Machine]


def test_what_was_calm_is_made_once(machine: Make) -> None:
    one = machine({})
    left_s = one.all_of("ab", 100.0).left_s
    assert (one.made, one.said, left_s) == ([("a", 0), ("b", 0)], [], 100.0)
    assert one.kept == {"a": (0, CALM), "b": (0, CALM)}


def test_the_worst_is_made_again_first_and_each_once_before_any_twice(machine: Make) -> None:
    one = machine({("a", 0): 0.2, ("c", 0): 0.5, ("c", 1): 0.4, ("c", 2): 0.45, ("d", 0): 0.3})
    left_s = one.all_of("abcd", 1000.0).left_s
    assert one.made[4:] == [("c", 1), ("d", 1), ("a", 1), ("c", 2)]
    assert one.kept == {"a": (1, CALM), "b": (0, CALM), "c": (1, 0.4), "d": (1, CALM)}
    assert left_s == 1000.0 - 4 * LONG_S
    assert one.said[0] == "a: other work on our cores used 0.20 of them"
    assert one.said[3] == "c again: 1000 s are left to make disturbed measurements again"
    assert one.said[-1] == "c: the best of 3 attempts had 0.40 cores used; better measured on a quiet machine"


def test_no_more_is_made_again_than_there_is_time_for(machine: Make) -> None:
    one = machine({(name, 0): cores for name, cores in {"a": 0.2, "b": 0.5, "c": 0.3}.items()})
    assert one.all_of("abc", 2.5 * LONG_S).left_s == 0.5 * LONG_S
    assert one.made[3:] == [("b", 1), ("c", 1)]
    assert one.kept["a"] == (0, 0.2)
    assert one.said[-1] == (
        "a: the only attempt had 0.20 cores used; better measured on a quiet machine"
        " or with more time for it (remeasure_s: 5 s are left)"
    )


def test_without_time_or_where_nothing_is_judged_each_is_made_once(machine: Make) -> None:
    one = machine({("a", 0): 0.2})
    one.all_of("a", 0.0)
    assert one.made == [("a", 0)] and len(one.said) == 2
    gpu = machine({("a", 0): 0.2})
    gpu.all_of("a", None)
    assert (gpu.made, gpu.said, gpu.kept) == ([("a", 0)], [], {"a": (0, 0.2)})


def test_what_the_next_ones_build_upon_is_made_again_at_once(machine: Make) -> None:
    one = machine({("check", 0): 0.3, ("check", 1): 0.2})
    calmly = Calmly(100.0, one.said.append)
    assert calmly.now("check", partial(one.measure, "check")) == 1, "the less disturbed one"
    assert calmly.left_s == 100.0 - LONG_S, "it is taken from the same time"
    calmly.rest()
    assert len(one.made) == 2, "once, and not again later"
    assert one.said[-1].startswith("check: the best of 2 attempts had 0.20 cores used")


def test_stolen_time_counts_as_others_work_does(machine: Make) -> None:
    one = machine({})
    stolen = {0: 0.12, 1: 0.07}
    calmly = Calmly(LONG_S, one.said.append)
    calmly.first("u1r0", partial(one.measure, "u1r0"), partial(one.keep, "u1r0"), stolen.__getitem__)
    calmly.rest()
    assert one.kept["u1r0"][0] == 1
    assert one.said[0] == "u1r0: the hypervisor took 12 % of the steps' time"
    assert one.said[-1].startswith("u1r0: the best of 2 attempts had 7 % stolen; better measured on a quiet")


@pytest.mark.parametrize(("error", "goes_on"), [(ExpertFailed("it died"), False), (ConfigError("bad"), True)])
def test_an_attempt_that_fails_leaves_what_stands(machine: Make, error: Exception, goes_on: bool) -> None:
    """Its time counts, it is not tried again, and after an expert has died nobody is."""
    one = machine({("a", 0): 0.5, ("b", 0): 0.2})

    def measure(attempt: int) -> int:
        result = one.measure("a", attempt)
        if attempt:
            raise error
        return result

    calmly = Calmly(100.0, one.said.append)
    calmly.first("a", measure, partial(one.keep, "a"))
    calmly.first("b", partial(one.measure, "b"), partial(one.keep, "b"))
    calmly.rest()
    assert one.kept == {"a": (0, 0.5), "b": (1, CALM) if goes_on else (0, 0.2)}
    assert calmly.left_s == 100.0 - (2 if goes_on else 1) * LONG_S
    assert calmly.failed == [f"a again: {error}"]
    assert f"a again failed, the attempt before stands: {error}" in one.said
    assert "a: the only attempt had 0.50 cores used; better measured on a quiet machine" in one.said
    with pytest.raises(type(error)):
        calmly.now("check", lambda attempt: measure(1))
