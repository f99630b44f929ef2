"""Predictive router over many experts: best expected quality minus what it costs.

After PolyRouter (Stripelis et al. 2024, arXiv:2408.12320): a quality predictor per expert, kNN or a
network on soft labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ersim.errors import ConfigError, bad_value
from ersim.routing.features import build_features
from ersim.routing.labels import equal_columns, filled_quality, quality_matrix
from ersim.routing.policy import (
    ExpertProfile,
    Policy,
    Scores,
    expert_index,
    expert_load,
    least_loaded_of_best,
)
from ersim.routing.predictors import build_predictor
from ersim.routing.tiers import mean_price
from ersim.types import Decision, FleetState, Prompt, RoutingQuery


class Predictive(Policy):
    """argmax of predicted quality - cost_weight * price / dearest price - load_weight * load.

    cost_weight: quality (0 to 1) given up to go from the dearest expert to a free one; changeable
        at run time by `adjust`. prices: USD per million tokens by expert, when the fleet has none.
    load_weight: quality given up per outstanding request per slot; above 0 the policy looks at the
        fleet and is no longer static.
    Experts with the same labels (one model) are predicted alike; the least loaded of them answers.
    """

    name = "predictive"
    needs_labels = True

    def __init__(
        self,
        experts: Sequence[ExpertProfile],
        predictor: str = "knn",
        predictor_params: dict[str, Any] | None = None,
        features: str = "tfidf+surface",
        feature_params: dict[str, Any] | None = None,
        cost_weight: float = 0.0,
        load_weight: float = 0.0,
        prices: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(experts)
        self._prices = {} if prices is None else dict(prices)
        for expert, price in self._prices.items():
            expert_index(self.experts, expert, "router.params.prices")
            if not price >= 0:
                raise bad_value(f"router.params.prices.{expert}", ">= 0", price)
        self.features = build_features(features, feature_params)
        self.predictor = build_predictor(predictor, predictor_params)
        self.cost_weight, self.load_weight = 0.0, 0.0
        self._column = list(range(len(self.experts)))
        self.adjust(cost_weight=cost_weight, load_weight=load_weight)
        self.routing_base_s = self.features.base_s + 60e-6
        self.routing_per_char_s = self.features.per_char_s
        self.max_chars = self.features.max_chars

    def adjust(self, **settings: Any) -> None:
        """Change cost_weight or load_weight without training; a refused setting changes nothing."""
        asked = {"cost_weight": self.cost_weight, "load_weight": self.load_weight}
        for key, value in settings.items():
            if key not in asked:
                raise ConfigError(
                    f"router.params.{key} cannot change without training policy {self.name} again; "
                    "at run time only cost_weight and load_weight can"
                )
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise bad_value(f"router.params.{key}", "a finite number >= 0", value)
            asked[key] = float(value)
        self.cost = self._relative_prices(asked["cost_weight"])
        self.cost_weight, self.load_weight = asked["cost_weight"], asked["load_weight"]
        self._look_at_load()

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Learn each expert's quality; a prompt without an expert's label counts with its mean."""
        quality = filled_quality(quality_matrix(prompts, self.profiles, required=True))
        texts = [prompt.text for prompt in prompts]
        self._column = equal_columns(quality)
        distinct = [self._column.index(number) for number in range(max(self._column) + 1)]
        self.predictor.fit(self.features.fit_transform(texts, seed), quality[:, distinct], seed)
        self._look_at_load()

    def _look_at_load(self) -> None:
        """Whether load matters: it does to a load weight, and between experts that are worth the same."""
        self.trades_quality = self.load_weight > 0.0
        self.static = not self.trades_quality and len(set(self._column)) == len(self._column)

    def quality(self, queries: Sequence[RoutingQuery]) -> Scores:
        """Predicted quality alone, shape (len(queries), experts)."""
        rows = self.features.transform([query.text for query in queries])
        return self.predictor.predict(rows)[:, self._column]

    def score(self, queries: Sequence[RoutingQuery]) -> Scores:
        """Predicted quality minus the weighted price."""
        scores: Scores = self.quality(queries) - self.cost_weight * self.cost
        return scores

    def choose(self, scores_row: Scores, fleet: FleetState) -> Decision:
        """With a load weight, each expert's load lowers its score; equals go to the least loaded."""
        if self.static:
            return super().choose(scores_row, fleet)
        worth = scores_row
        if self.load_weight > 0.0:
            load = np.array([expert_load(expert) for expert in fleet.experts])
            worth = scores_row - self.load_weight * load
        best = least_loaded_of_best(worth, fleet)
        if best is None:
            return super().choose(scores_row, fleet)
        return Decision(best, f"{self.name}: value {float(worth[best]):.3f}")

    def _relative_prices(self, cost_weight: float) -> Scores:
        """Price of each expert over the dearest one's; zeros (no cost) while the weight is 0."""
        if cost_weight == 0.0:
            return np.zeros(len(self.experts))
        prices = [self._prices.get(p.name, mean_price(p)) for p in self.profiles]
        if any(price is None for price in prices):
            missing = [name for name, price in zip(self.experts, prices, strict=True) if price is None]
            raise ConfigError(
                f"router.params.cost_weight needs a price for expert {', '.join(missing)}: set "
                "router.params.prices.<expert> in USD per million tokens"
            )
        known = np.array(prices, dtype=float)
        relative: Scores = known / known.max() if known.max() > 0 else known
        return relative
