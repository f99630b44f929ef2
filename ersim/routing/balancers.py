"""Which replica of the chosen expert takes the request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ersim.errors import SimulationError, unknown_choice
from ersim.types import ReplicaState


class NoHealthyReplica(SimulationError):
    """Every replica of the chosen expert is down; the caller fails or re-routes the request."""


class Balancer(ABC):
    """Picks a replica index; skips unhealthy replicas, raises NoHealthyReplica if none is left."""

    def __init__(self, seed: int) -> None:
        self._turn = 0
        self._generator = np.random.default_rng([seed, 0xBA1])

    @abstractmethod
    def pick(self, replicas: Sequence[ReplicaState]) -> int:
        """Index of the replica that takes the next request."""


def _healthy(replicas: Sequence[ReplicaState]) -> list[int]:
    healthy = [index for index, replica in enumerate(replicas) if replica.healthy]
    if not healthy:
        raise NoHealthyReplica(f"none of the expert's {len(replicas)} replicas is healthy")
    return healthy


class RoundRobinBalancer(Balancer):
    """One replica after the other."""

    def pick(self, replicas: Sequence[ReplicaState]) -> int:
        """The next healthy replica in turn."""
        count = len(replicas)
        for step in range(count):
            index = (self._turn + step) % count
            if replicas[index].healthy:
                self._turn = index + 1
                return index
        raise NoHealthyReplica(f"none of the expert's {count} replicas is healthy")


class RandomBalancer(Balancer):
    """A healthy replica at random."""

    def pick(self, replicas: Sequence[ReplicaState]) -> int:
        """A uniform draw."""
        healthy = _healthy(replicas)
        return healthy[int(self._generator.integers(len(healthy)))]


class LeastOutstanding(Balancer):
    """The replica with the fewest requests running and waiting; ties go round.

    Waiting alone is no measure of load: with free slots it is zero everywhere, and everything
    would go to the first replica.
    """

    def pick(self, replicas: Sequence[ReplicaState]) -> int:
        """The least loaded healthy replica, searched from the one after the last pick."""
        if len(replicas) == 1 and replicas[0].healthy:
            return 0
        return self._least(replicas, [replica.running + replica.waiting for replica in replicas])

    def _least(self, replicas: Sequence[ReplicaState], loads: Sequence[float]) -> int:
        count = len(replicas)
        best, lowest = -1, float("inf")
        for step in range(count):
            index = (self._turn + step) % count
            if loads[index] < lowest and replicas[index].healthy:
                best, lowest = index, loads[index]
        if best < 0:
            raise NoHealthyReplica(f"none of the expert's {count} replicas is healthy")
        self._turn = best + 1
        return best


class LeastKv(LeastOutstanding):
    """The replica with the lowest share of KV blocks in use; ties by requests waiting, then in turn."""

    def pick(self, replicas: Sequence[ReplicaState]) -> int:
        """The healthy replica with the most free KV cache.

        A waiting request holds no block yet, so each counts as if it were there already: the
        waiting ones are added as whole numbers, above any share.
        """
        return self._least(replicas, [replica.kv_used_fraction + replica.waiting for replica in replicas])


BALANCERS: Mapping[str, type[Balancer]] = MappingProxyType(
    {
        "round_robin": RoundRobinBalancer,
        "random": RandomBalancer,
        "least_outstanding": LeastOutstanding,
        "least_kv": LeastKv,
    }
)


def build_balancer(name: str, seed: int) -> Balancer:
    """Make the balancer registered under `name`; ConfigError lists the choices."""
    if name not in BALANCERS:
        raise unknown_choice("router.balancer", name, BALANCERS)
    return BALANCERS[name](seed)
