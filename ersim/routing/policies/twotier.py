"""What two-tier policies share: tiers, a threshold on the predicted need, targets that set it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.errors import ConfigError, DataError, ErsimError, bad_value
from ersim.routing.evaluation import gap_curve
from ersim.routing.policy import HOPELESS, ExpertProfile, Policy, Scores, expert_is_healthy, expert_load
from ersim.routing.tiers import find_tiers, mean_price
from ersim.types import Decision, FleetState, Prompt, RoutingQuery

Floats = npt.NDArray[np.float64]


class TwoTier(Policy):
    """Strong where `need` is at least `threshold`, weak elsewhere.

    A subclass gives `need` and, in `fit`, calls `_calibrate` with the needs of the training prompts
    as predicted by models that did not see their labels. The threshold can be set directly, or by
    the share of strong calls, by the share of the quality gap to recover, or by a budget in USD per
    million tokens; `adjust` changes it at run time without training. Of a tier with several
    experts, the least loaded answers.
    """

    name = "two_tier"

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
        super().__init__(experts)
        self._strong_name, self._weak_name = strong, weak
        self._target = _one_target(threshold=threshold, share=share, quality=quality, budget=budget)
        self.threshold = 0.0
        self.strong: tuple[int, ...] = ()
        self.weak: tuple[int, ...] = ()
        self._needs = np.empty(0)
        self._labels: tuple[Floats, Floats] | None = None

    @abstractmethod
    def need(self, queries: Sequence[RoutingQuery]) -> Floats:
        """How much each query needs the strong tier, shape (len(queries),)."""

    def score(self, queries: Sequence[RoutingQuery]) -> Scores:
        """need - threshold for the strong tier, 0 for the weak one, hopeless for the others."""
        scores = np.full((len(queries), len(self.experts)), HOPELESS)
        scores[:, list(self.weak)] = 0.0
        scores[:, list(self.strong)] = (self.need(queries) - self.threshold)[:, None]
        return scores

    def choose(self, scores_row: Scores, fleet: FleetState) -> Decision:
        """The better tier (strong on a tie); in a tier of several, its least loaded healthy expert."""
        lead = float(scores_row[self.strong[0]])
        tiers = (self.strong, self.weak) if lead >= 0.0 else (self.weak, self.strong)
        for tier in tiers:
            healthy = [index for index in tier if expert_is_healthy(fleet.experts[index])]
            if len(healthy) > 1:
                healthy.sort(key=lambda index: expert_load(fleet.experts[index]))
            if healthy:
                kind = "strong" if tier is self.strong else "weak"
                return Decision(healthy[0], f"{self.name}: {kind}, lead {lead:+.3f}")
        return super().choose(scores_row, fleet)

    def decide(self, scores: Scores) -> npt.NDArray[np.intp]:
        """First expert of the better tier."""
        return np.where(scores[:, self.strong[0]] >= 0.0, self.strong[0], self.weak[0]).astype(np.intp)

    def adjust(self, **settings: Any) -> None:
        """Set one of threshold, share, quality, budget; ConfigError names what is out of range.

        Without settings everything stays as it was fitted; a refused setting changes nothing.
        """
        known = ("threshold", "share", "quality", "budget")
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"router.params.{key} cannot change without training policy {self.name} again; "
                    f"at run time only one of {', '.join(known)} can"
                )
        if not settings:
            return
        before = self._target
        self._target = _one_target(**settings)
        try:
            self._apply()
        except ErsimError:
            self._target = before
            raise

    def _find_tiers(self, prompts: Sequence[Prompt]) -> None:
        self.strong, self.weak = find_tiers(self.profiles, self._strong_name, self._weak_name, prompts)
        self.static = len(self.strong) == len(self.weak) == 1

    def _calibrate(self, needs: Floats, labels: tuple[Floats, Floats] | None) -> None:
        """Keep the training needs and (strong, weak) qualities that targets are translated with."""
        self._needs, self._labels = np.asarray(needs, dtype=float), labels
        self._apply()

    def _apply(self) -> None:
        kind, value = self._target
        if kind == "threshold":
            self.threshold = self._checked_threshold(value)
        elif kind == "share":
            self.threshold = self._at_share(value)
        elif kind == "quality":
            self.threshold = self._at_share(self._share_for_quality(value))
        else:
            self.threshold = self._at_share(self._share_for_budget(value))

    def _checked_threshold(self, value: float) -> float:
        if not -1.0 <= value <= 1.0:
            raise bad_value("router.params.threshold", "in [-1, 1], a difference of qualities", value)
        return float(value)

    def _at_share(self, share: float) -> float:
        """Threshold that sends this share of the training prompts to the strong tier."""
        if share <= 0.0:
            return float("inf")
        if share >= 1.0:
            return float("-inf")
        return float(np.quantile(self._needs, 1.0 - share))

    def _share_for_quality(self, level: float) -> float:
        if self._labels is None:
            raise DataError(
                f"router.params.quality needs labelled training prompts, and policy {self.name} had none"
            )
        curve = gap_curve(self._needs, *self._labels)
        return curve.cpt(level) if level > 0 else 0.0

    def _share_for_budget(self, usd_per_mtok: float) -> float:
        prices = [mean_price(self.profiles[tier[0]]) for tier in (self.weak, self.strong)]
        if prices[0] is None or prices[1] is None:
            raise ConfigError(
                "router.params.budget needs prices: set usd_per_mtok_in and _out of the experts"
            )
        low, high = prices[0], prices[1]
        if not low <= usd_per_mtok:
            raise bad_value(
                "router.params.budget", f">= {low:g}, the weak tier's price per million tokens", usd_per_mtok
            )
        return 1.0 if high <= low else min((usd_per_mtok - low) / (high - low), 1.0)


def _one_target(**targets: float | None) -> tuple[str, float]:
    """The one target that is set; threshold 0 (strong wherever it is expected to be better) if none."""
    given = [(key, value) for key, value in targets.items() if value is not None]
    if len(given) > 1:
        raise bad_value("router.params", "at most one of " + ", ".join(targets), dict(given))
    if not given:
        return "threshold", 0.0
    key, value = given[0]
    if not isinstance(value, (int, float)) or value != value:
        raise bad_value(f"router.params.{key}", "a number", value)
    if key in ("share", "quality") and not 0.0 <= value <= 1.0:
        raise bad_value(f"router.params.{key}", "in [0, 1]", value)
    return key, float(value)
