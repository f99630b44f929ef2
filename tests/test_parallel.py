"""Work shared among processes gives what one process gives, whatever happens to the helpers."""

from __future__ import annotations

import os

import pytest

import ersim
from ersim.config import (
    ExpertConfig,
    FleetConfig,
    RouterConfig,
    SimulationConfig,
    UncertaintyConfig,
    WorkloadConfig,
)
from ersim.parallel import spread


def test_results_come_in_order_from_several_processes() -> None:
    rows = list(spread(lambda number: (number, os.getpid()), range(7), 3))
    assert [number for number, _ in rows] == list(range(7))
    assert len({process for _, process in rows}) == 3
    assert rows[0][1] == os.getpid()


def test_what_a_dead_helper_leaves_is_done_here() -> None:
    here = os.getpid()

    def dies_elsewhere(number: int) -> int:
        if os.getpid() != here and number > 1:
            os._exit(9)
        return number

    assert list(spread(dies_elsewhere, range(6), 2)) == list(range(6))


def test_an_error_is_raised_as_without_helpers() -> None:
    def fails(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    done = []
    with pytest.raises(ValueError, match="three"):
        for number in spread(fails, range(6), 2):
            done.append(number)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("replications", ["3", "auto"])
def test_the_number_of_workers_changes_no_figure(replications: str) -> None:
    config = SimulationConfig(
        users=8,
        fleet=FleetConfig("one", experts={"all": ExpertConfig()}),
        router=RouterConfig(policy="round_robin"),
        workload=WorkloadConfig(requests=120),
        uncertainty=UncertaintyConfig(replications=replications, precision=0.05, max_replications=7),
    )
    alone, shared = ersim.simulate(config), ersim.simulate(config, workers=3)
    assert alone.summary == shared.summary
    assert alone.replications == shared.replications
    assert alone.requests.equals(shared.requests)
