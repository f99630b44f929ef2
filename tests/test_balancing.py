"""Balancers in whole runs: where they differ, and that they differ for the reason they should.

Four equal replicas behind one expert, lengths as in chat traffic (uneven: most answers are short, some
very long), Poisson arrivals, the same requests for every balancer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
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
from ersim.routing import balancers
from ersim.routing.balancers import Balancer
from ersim.types import ReplicaState

SEEDS = (0, 1, 2)


def run(balancer: str, seed: int, rate_rps: float, seqs: int | None, memory: float) -> ersim.Result:
    """2,000 requests on four 8B replicas with that many seats and that share of an H100's memory."""
    expert = ExpertConfig(replicas=4)
    expert.engine.max_num_seqs = seqs
    expert.engine.gpu_memory_utilization = memory
    config = SimulationConfig(
        users=1,
        seed=seed,
        fleet=FleetConfig("four", experts={"all": expert}),
        router=RouterConfig(policy="fixed", balancer=balancer),
        workload=WorkloadConfig(arrivals="poisson", rate_rps=rate_rps, requests=2000),
        uncertainty=UncertaintyConfig(replications="1"),
    )
    return ersim.simulate(config)


def means(names: Sequence[str], key: str, *setting: float | int | None) -> dict[str, float]:
    """The figure's mean over the seeds, per balancer."""
    return {
        name: float(np.mean([run(name, seed, *setting).summary[key] for seed in SEEDS]))  # type: ignore[arg-type]
        for name in names
    }


def test_where_seats_are_scarce_counting_requests_waits_least() -> None:
    """Eight seats a replica, memory for many more: a long answer holds one of eight, whatever its size."""
    p99 = means(("round_robin", "random", "least_outstanding", "least_kv"), "p99_ttft_ms", 14.0, 8, 0.92)
    assert p99["least_outstanding"] < 0.7 * p99["round_robin"]
    assert p99["least_outstanding"] < p99["least_kv"] < p99["round_robin"] < 0.7 * p99["random"]


def test_where_memory_is_scarce_counting_blocks_waits_least() -> None:
    """Seats for 1,024, memory for few long answers: the number of requests says too little about it."""
    setting = (26.0, None, 0.26)
    p99 = means(("round_robin", "least_outstanding", "least_kv"), "p99_ttft_ms", *setting)
    assert p99["least_kv"] < 0.95 * p99["least_outstanding"] < 0.95 * p99["round_robin"]
    preempted = means(("round_robin", "least_kv"), "preemptions", *setting)
    assert preempted["least_kv"] == 0 < preempted["round_robin"]


class WaitingOnly(Balancer):
    """The trap: with seats free nobody waits anywhere, and the first replica gets the request."""

    def pick(self, replicas: Sequence[ReplicaState]) -> int:
        return min(range(len(replicas)), key=lambda index: replicas[index].waiting)


def test_counting_only_those_who_wait_loads_the_first_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        balancers, "BALANCERS", MappingProxyType({**balancers.BALANCERS, "waiting_only": WaitingOnly})
    )
    shares = {}
    for name in ("waiting_only", "least_outstanding"):
        replica = run(name, 0, 26.0, None, 0.92).table["replica"]
        shares[name] = np.bincount(replica[replica >= 0], minlength=4) / len(replica)
    assert shares["waiting_only"][0] > 0.5
    assert shares["least_outstanding"].min() > 0.22
