"""Long prompts to the strong model: the baseline that every learnt router must beat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ersim.errors import DataError, bad_value
from ersim.routing.labels import filled_quality, quality_matrix
from ersim.routing.policies.twotier import Floats, TwoTier
from ersim.routing.policy import ExpertProfile
from ersim.types import Prompt, RoutingQuery


class PromptLength(TwoTier):
    """Strong from a number of characters on; default: the longer half of the training prompts.

    The threshold is in characters; share, quality and budget set it as for the learnt routers.
    """

    name = "prompt_length"

    def __init__(
        self,
        experts: Sequence[ExpertProfile],
        strong: str | None = None,
        weak: str | None = None,
        threshold: float | None = None,
        share: float | None = None,
        quality: float | None = None,
        budget: float | None = None,
    ) -> None:
        if threshold is share is quality is budget is None:
            share = 0.5
        super().__init__(experts, strong, weak, threshold, share, quality, budget)

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Only the lengths are learnt (and labels kept, where there are any, for a quality target)."""
        self._find_tiers(prompts)
        if not prompts and self._target[0] != "threshold":
            raise DataError(
                "router.policy prompt_length needs training prompts to turn a share into a length"
            )
        needs = self.need([RoutingQuery(prompt.text) for prompt in prompts])
        pair = [self.profiles[self.strong[0]], self.profiles[self.weak[0]]]
        quality = quality_matrix(prompts, pair)
        labelled = len(prompts) > 0 and not np.isnan(quality).all(axis=0).any()
        strong, weak = filled_quality(quality).T
        self._calibrate(needs, (strong, weak) if labelled else None)

    def need(self, queries: Sequence[RoutingQuery]) -> Floats:
        """Logarithm of the length in characters."""
        return np.array([math.log1p(len(query.text)) for query in queries], dtype=float)

    def _checked_threshold(self, value: float) -> float:
        if not value >= 0:
            raise bad_value("router.params.threshold", ">= 0 characters", value)
        return math.log1p(value)
