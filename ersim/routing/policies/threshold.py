"""Threshold router: the strong model where the predicted gap to the weak one is worth it.

After RouteLLM (Ong et al. 2024, arXiv:2406.18665) and Hybrid LLM (Ding et al. 2024,
arXiv:2404.14618); like the latter it predicts the quality gap, not the weak model's failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ersim.errors import DataError
from ersim.routing.features import build_features
from ersim.routing.labels import filled_quality, quality_matrix
from ersim.routing.policies.twotier import Floats, TwoTier
from ersim.routing.policy import ExpertProfile
from ersim.routing.predictors import build_predictor
from ersim.routing.split import text_groups
from ersim.types import Prompt, RoutingQuery

FOLDS = 5


class Threshold(TwoTier):
    """predictor: knn, ridge, logistic, matrix_factorisation or mlp over features (see there)."""

    name = "threshold"
    needs_labels = True

    def __init__(
        self,
        experts: Sequence[ExpertProfile],
        predictor: str = "ridge",
        predictor_params: dict[str, Any] | None = None,
        features: str = "tfidf+surface",
        feature_params: dict[str, Any] | None = None,
        strong: str | None = None,
        weak: str | None = None,
        threshold: float | None = None,
        share: float | None = None,
        quality: float | None = None,
        budget: float | None = None,
    ) -> None:
        super().__init__(experts, strong, weak, threshold, share, quality, budget)
        self.features = build_features(features, feature_params)
        self._predictor_name, self._predictor_params = predictor, predictor_params
        self.predictor = build_predictor(predictor, predictor_params)
        self.routing_base_s = self.features.base_s + 30e-6
        self.routing_per_char_s = self.features.per_char_s
        self.max_chars = self.features.max_chars

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Learn the gap; the calibration of targets uses predictions for folds left out."""
        self._find_tiers(prompts)
        pair = [self.profiles[self.strong[0]], self.profiles[self.weak[0]]]
        quality = quality_matrix(prompts, pair, required=True)
        known = np.logical_not(np.isnan(quality).any(axis=1)).reshape(-1)
        if known.sum() < 2:
            raise DataError(
                f"{pair[0].model} and {pair[1].model} have both labels on "
                f"{known.sum()} training prompts; a threshold router needs at least 2"
            )
        used = [prompt for prompt, keep in zip(prompts, known, strict=True) if keep]
        strong, weak = filled_quality(quality[known]).T
        texts = [prompt.text for prompt in used]
        rows = self.features.fit_transform(texts, seed)
        self.predictor.fit_gap(rows, strong, weak, seed)
        self._calibrate(self._left_out(rows, strong, weak, text_groups(used), seed), (strong, weak))

    def need(self, queries: Sequence[RoutingQuery]) -> Floats:
        """Predicted quality of the strong tier minus that of the weak one."""
        return self.predictor.predict_gap(self.features.transform([query.text for query in queries]))

    def _left_out(
        self, rows: Floats, strong: Floats, weak: Floats, groups: np.ndarray[Any, Any], seed: int
    ) -> Floats:
        """Gap of each training prompt as predicted without its fold's labels."""
        count = int(groups.max()) + 1
        folds = min(FOLDS, count)
        if folds < 2:
            return self.predictor.predict_gap(rows)
        fold = np.random.default_rng([seed, 0xF01D]).permutation(count)[groups] % folds
        out = np.empty(len(rows))
        for index in range(folds):
            held = fold == index
            other = build_predictor(self._predictor_name, self._predictor_params)
            other.fit_gap(rows[~held], strong[~held], weak[~held], seed)
            out[held] = other.predict_gap(rows[held])
        return out
