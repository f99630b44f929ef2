from __future__ import annotations

import numpy as np
import pytest

from ersim.errors import ConfigError
from ersim.routing import BALANCERS, NoHealthyReplica, build_balancer


@pytest.mark.parametrize("name", BALANCERS)
def test_skips_the_sick_and_raises_when_all_are(name: str, replica) -> None:  # type: ignore[no-untyped-def]
    balancer = build_balancer(name, 0)
    replicas = [replica(), replica(healthy=False), replica()]
    assert 1 not in {balancer.pick(replicas) for _ in range(50)}
    with pytest.raises(NoHealthyReplica, match="none of the expert's 2 replicas"):
        balancer.pick([replica(healthy=False)] * 2)


@pytest.mark.parametrize("name", BALANCERS)
def test_idle_replicas_share_evenly(name: str, replica) -> None:  # type: ignore[no-untyped-def]
    """Also when all are idle: counting only those who wait sends nearly everything to the first."""
    balancer = build_balancer(name, 0)
    counts = np.bincount([balancer.pick([replica()] * 4) for _ in range(1000)], minlength=4)
    assert counts.min() > 200


def test_least_outstanding_counts_running_and_waiting(replica) -> None:  # type: ignore[no-untyped-def]
    balancer = build_balancer("least_outstanding", 0)
    assert balancer.pick([replica(running=5), replica(running=1, waiting=2), replica(waiting=4)]) == 1


def test_least_outstanding_keeps_replicas_within_one(replica) -> None:  # type: ignore[no-untyped-def]
    balancer, replicas = build_balancer("least_outstanding", 0), [replica() for _ in range(4)]
    for _ in range(1001):
        replicas[balancer.pick(replicas)].running += 1
    loads = [r.running for r in replicas]
    assert max(loads) - min(loads) <= 1


def test_least_kv_prefers_free_memory_but_sees_the_queue(replica) -> None:  # type: ignore[no-untyped-def]
    balancer = build_balancer("least_kv", 0)
    assert balancer.pick([replica(kv_used_fraction=0.9), replica(kv_used_fraction=0.2)]) == 1
    assert balancer.pick([replica(kv_used_fraction=0.9), replica(kv_used_fraction=0.2, waiting=1)]) == 0


def test_unknown_balancer_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match="least_kv, least_outstanding, random, round_robin"):
        build_balancer("best", 0)
