"""Predictive router over many experts: best expected quality minus what it costs.

After PolyRouter (Stripelis et al. 2024, arXiv:2408.12320): a quality predictor per expert, kNN or a
network on soft labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ersim.errors import ConfigError, bad_value
from ersim.routing.features import build_features
from ersim.routing.labels import filled_quality, quality_matrix
from ersim.routing.policies.spill import expert_load
from ersim.routing.policy import ExpertProfile, Policy, Scores, expert_index, expert_is_healthy
from ersim.routing.predictors import build_predictor
from ersim.routing.tiers import mean_price
from ersim.types import Decision, FleetState, Prompt, RoutingQuery


class Predictive(Policy):
    """argmax of predicted quality - cost_weight * price / dearest price - load_weight * load.

    cost_weight: quality (0 to 1) given up to go from the dearest expert to a free one; changeable
        at run time by `adjust`. prices: USD per million tokens by expert, when the fleet has none.
    load_weight: quality given up per outstanding request per slot; above 0 the policy looks at the
        fleet and is no longer static.
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
        self.adjust(cost_weight=cost_weight, load_weight=load_weight)
        self.routing_base_s = self.features.base_s + 60e-6
        self.routing_per_char_s = self.features.per_char_s
        self.max_chars = self.features.max_chars

    def adjust(self, **settings: Any) -> None:
        """Change cost_weight or load_weight without training."""
        for key, value in settings.items():
            if key not in ("cost_weight", "load_weight"):
                raise ConfigError(
                    f"router.params.{key} cannot change without training policy {self.name} again; "
                    "at run time only cost_weight and load_weight can"
                )
            if not value >= 0:
                raise bad_value(f"router.params.{key}", ">= 0", value)
            setattr(self, key, float(value))
        self.static = self.load_weight == 0.0
        self.trades_quality = not self.static
        self.cost = self._relative_prices()

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Learn each expert's quality; a prompt without an expert's label counts with its mean."""
        quality = filled_quality(quality_matrix(prompts, self.profiles, required=True))
        texts = [prompt.text for prompt in prompts]
        self.predictor.fit(self.features.fit_transform(texts, seed), quality, seed)

    def quality(self, queries: Sequence[RoutingQuery]) -> Scores:
        """Predicted quality alone, shape (len(queries), experts)."""
        return self.predictor.predict(self.features.transform([query.text for query in queries]))

    def score(self, queries: Sequence[RoutingQuery]) -> Scores:
        """Predicted quality minus the weighted price."""
        scores: Scores = self.quality(queries) - self.cost_weight * self.cost
        return scores

    def choose(self, scores_row: Scores, fleet: FleetState) -> Decision:
        """With a load weight, each expert's load lowers its score."""
        if self.static:
            return super().choose(scores_row, fleet)
        best, highest = -1, -np.inf
        for index, expert in enumerate(fleet.experts):
            if not expert_is_healthy(expert):
                continue
            value = float(scores_row[index]) - self.load_weight * expert_load(expert)
            if value > highest:
                best, highest = index, value
        if best < 0:
            return super().choose(scores_row, fleet)
        return Decision(best, f"{self.name}: value {highest:.3f}")

    def _relative_prices(self) -> Scores:
        """Price of each expert over the dearest one's; zeros (no cost) while cost_weight is 0."""
        if self.cost_weight == 0.0:
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
