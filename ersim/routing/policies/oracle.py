"""The oracle: knows each answer's quality beforehand. An upper bound, never a router.

Honest by construction: its labels come through `reveal`, which only evaluation and simulation call
with the prompts they are about to ask; saved and loaded live it knows nothing and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ersim.errors import bad_value
from ersim.routing.labels import filled_quality, quality_matrix
from ersim.routing.policy import ExpertProfile, Policy, Scores, least_loaded_of_best
from ersim.routing.tiers import mean_price
from ersim.types import Decision, FleetState, Prompt, RoutingQuery


class Oracle(Policy):
    """The best answer for each prompt, the cheapest expert among equals, the least loaded among those.

    cost_weight: as for the predictive policy; the default only breaks ties by price.
    """

    name = "oracle"
    needs_labels = True
    sees_asked = True

    def __init__(self, experts: Sequence[ExpertProfile], cost_weight: float = 1e-4) -> None:
        super().__init__(experts)
        if not cost_weight >= 0:
            raise bad_value("router.params.cost_weight", ">= 0", cost_weight)
        prices = np.array([mean_price(profile) or 0.0 for profile in self.profiles])
        self._penalty = cost_weight * (prices / prices.max() if prices.max() > 0 else prices)
        kinds = {(profile.model, mean_price(profile)) for profile in self.profiles}
        self.static = len(kinds) == len(self.profiles)
        self._known: dict[bytes, Scores] = {}
        self._mean = np.zeros(len(self.experts))

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Learn the mean qualities, for prompts that nobody revealed."""
        self._mean = np.nanmean(quality_matrix(prompts, self.profiles, required=True), axis=0)

    def reveal(self, prompts: Sequence[Prompt]) -> None:
        """Learn the answers' quality for exactly these prompts."""
        quality = filled_quality(quality_matrix(prompts, self.profiles, required=True))
        self._known = {_key(prompt.text): row for prompt, row in zip(prompts, quality, strict=True)}

    def score(self, queries: Sequence[RoutingQuery]) -> Scores:
        """The revealed quality, or the training means for an unknown prompt."""
        rows = [self._known.get(_key(query.text), self._mean) for query in queries]
        return np.array(rows, dtype=float).reshape(len(queries), -1) - self._penalty

    def choose(self, scores_row: Scores, fleet: FleetState) -> Decision:
        """The best score; of several experts with one model the least loaded."""
        best = None if self.static else least_loaded_of_best(scores_row, fleet)
        if best is None:
            return super().choose(scores_row, fleet)
        return Decision(best, self.explain(scores_row, best))

    def __getstate__(self) -> dict[str, Any]:
        """Saved without the answers: they belong to one evaluation."""
        return {**self.__dict__, "_known": {}}


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16]
