"""Policies that read no text: round robin, random, fixed, least loaded, best single expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, cycle, repeat

import numpy as np

from ersim.errors import bad_value
from ersim.routing.labels import quality_matrix
from ersim.routing.policy import HOPELESS, ExpertProfile, Policy, Scores, expert_index, expert_is_healthy
from ersim.types import Decision, FleetState, Prompt, RoutingQuery


def _next_healthy(first: int, fleet: FleetState) -> int:
    """`first`, or the next expert after it (cyclically) that has a healthy replica."""
    count = len(fleet.experts)
    for step in range(count):
        index = (first + step) % count
        if expert_is_healthy(fleet.experts[index]):
            return index
    return first


class RoundRobin(Policy):
    """One expert after the other, whatever is asked."""

    name = "round_robin"
    static = False

    def __init__(self, experts: Sequence[ExpertProfile]) -> None:
        super().__init__(experts)
        self._turn = 0

    def choose(self, scores_row: Scores, fleet: FleetState) -> Decision:
        """The next expert in turn that is healthy."""
        chosen = _next_healthy(self._turn % len(self.experts), fleet)
        self._turn = chosen + 1
        return Decision(chosen, "round_robin")

    def turns(self) -> Iterator[int]:
        """One after the other, from whose turn it is."""
        experts = len(self.experts)
        return cycle([(self._turn + step) % experts for step in range(experts)])


class Random(Policy):
    """An expert at random: uniformly, or with the given weights (the baseline of every curve)."""

    name = "random"
    static = False

    def __init__(
        self,
        experts: Sequence[ExpertProfile],
        weights: dict[str, float] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(experts)
        shares = np.ones(len(self.experts))
        if weights is not None:
            shares = np.zeros(len(self.experts))
            for expert, weight in weights.items():
                if not weight >= 0:
                    raise bad_value(f"router.params.weights.{expert}", ">= 0", weight)
                shares[expert_index(self.experts, expert, "router.params.weights")] = weight
            if shares.sum() <= 0:
                raise bad_value("router.params.weights", "positive in sum", weights)
        self._edges = np.cumsum(shares / shares.sum())
        self._edges[-1] = 1.0
        self._own_seed = seed
        self._reseed(seed or 0)

    def _reseed(self, seed: int) -> None:
        self._generator = np.random.default_rng([seed, 0x5EED])
        self._draws: list[int] = []

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Nothing to learn; takes the run's seed unless the config gives one."""
        self._reseed(seed if self._own_seed is None else self._own_seed)

    def choose(self, scores_row: Scores, fleet: FleetState) -> Decision:
        """The next draw; draws come in blocks, for one generator call costs as much as a thousand."""
        if not self._draws:
            self._draws = self._block()[::-1]
        return Decision(_next_healthy(self._draws.pop(), fleet), "random")

    def turns(self) -> Iterator[int]:
        """The draws that are left, then block by block."""
        left = self._draws[::-1]
        self._draws = []
        return chain(left, chain.from_iterable(self._block() for _ in repeat(None)))

    def _block(self) -> list[int]:
        drawn = np.searchsorted(self._edges, self._generator.random(1024), side="right")
        block: list[int] = drawn.tolist()
        return block


class Fixed(Policy):
    """Always the named expert (default: the first)."""

    name = "fixed"

    def __init__(self, experts: Sequence[ExpertProfile], expert: str | None = None) -> None:
        super().__init__(experts)
        self._index = 0 if expert is None else expert_index(self.experts, expert, "router.params.expert")

    def score(self, queries: Sequence[RoutingQuery]) -> Scores:
        """1 for the fixed expert, 0 for the others."""
        scores = np.zeros((len(queries), len(self.experts)))
        scores[:, self._index] = 1.0
        return scores

    def explain(self, scores_row: Scores, chosen: int) -> str:
        """Names the expert."""
        return f"fixed: {self.experts[chosen]}"


class LeastLoaded(Policy):
    """The expert with the fewest outstanding requests per slot: load balancing between experts."""

    name = "least_loaded"
    static = False

    def choose(self, scores_row: Scores, fleet: FleetState) -> Decision:
        """The healthy expert with the lowest outstanding / slots; the lowest index wins a tie."""
        best, lowest = 0, float("inf")
        for index, expert in enumerate(fleet.experts):
            outstanding = sum(replica.running + replica.waiting for replica in expert.replicas)
            load = outstanding / max(expert.slots, 1)
            if load < lowest and expert_is_healthy(expert):
                best, lowest = index, load
        return Decision(best, "least_loaded")


class BestSingle(Policy):
    """Always the expert with the best mean quality on the training prompts: the bar to beat on cost."""

    name = "best_single"
    needs_labels = True

    def __init__(self, experts: Sequence[ExpertProfile]) -> None:
        super().__init__(experts)
        self._mean = np.full(len(self.experts), HOPELESS)

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Average each expert's quality; DataError if the prompts carry no labels."""
        quality = quality_matrix(prompts, self.profiles, required=True)
        self._mean = np.nanmean(quality, axis=0)

    def score(self, queries: Sequence[RoutingQuery]) -> Scores:
        """The mean training quality of each expert, the same for all queries."""
        return np.tile(self._mean, (len(queries), 1))
