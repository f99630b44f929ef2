"""How good a router is, from arrays alone: curves, areas, thresholds, costs, confusion.

Definitions follow RouteLLM (Ong et al. 2024, arXiv:2406.18665): performance gap recovered
PGR = (router - weak) / (strong - weak) in mean quality; APGR is its mean over all shares of strong
calls (0.5 for random, above 1 possible only for an oracle); CPT(x) is the smallest share of strong
calls that recovers x of the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class GapCurve:
    """Quality against the share of strong calls, from 0 (all weak) to 1 (all strong).

    share, quality: shape (requests + 1,). weak, strong: mean quality of either model alone.
    """

    share: Floats
    quality: Floats

    @property
    def weak(self) -> float:
        """Mean quality when the weak model answers everything."""
        return float(self.quality[0])

    @property
    def strong(self) -> float:
        """Mean quality when the strong model answers everything."""
        return float(self.quality[-1])

    def recovered(self) -> Floats:
        """PGR at each share; DataError when strong and weak are equally good (no gap to recover)."""
        gap = self.strong - self.weak
        if abs(gap) < 1e-12:
            raise DataError("strong and weak model have the same mean quality: there is no gap to recover")
        recovered: Floats = (self.quality - self.weak) / gap
        return recovered

    def apgr(self) -> float:
        """Area under PGR over the share of strong calls, by the trapezoid rule."""
        return float(np.trapezoid(self.recovered(), self.share))

    def cpt(self, level: float) -> float:
        """Smallest share of strong calls whose PGR reaches `level` (0 to 1), interpolated."""
        recovered = self.recovered()
        first = int(np.argmax(recovered >= level - 1e-12))
        if first == 0 or recovered[first] == recovered[first - 1]:
            return float(self.share[first])
        part = (level - recovered[first - 1]) / (recovered[first] - recovered[first - 1])
        return float(self.share[first - 1] + part * (self.share[first] - self.share[first - 1]))


def gap_curve(score: Floats, strong: Floats, weak: Floats) -> GapCurve:
    """Send requests to the strong model in descending `score`; all inputs have shape (requests,).

    Requests with equal scores are taken in the average of all orders, so a constant score gives
    exactly the random router's straight line.
    """
    if not len(score) == len(strong) == len(weak) or not len(score):
        raise DataError(f"need equally many scores and labels, got {len(score)}, {len(strong)}, {len(weak)}")
    order = np.argsort(-score, kind="stable")
    gain = (strong - weak)[order]
    _, group = np.unique(-score[order], return_inverse=True)
    mean_gain = np.bincount(group, weights=gain) / np.bincount(group)
    total = np.concatenate([[0.0], np.cumsum(mean_gain[group])])
    count = len(score)
    return GapCurve(np.arange(count + 1) / count, weak.mean() + total / count)


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Quality against mean cost per request, one point per cost weight, cost ascending."""

    cost_weight: Floats
    cost: Floats
    quality: Floats
    share: Floats

    def cheapest_with(self, quality: float) -> float | None:
        """Lowest mean cost whose quality is at least `quality`; None if no point reaches it."""
        reached = self.quality >= quality - 1e-12
        return float(self.cost[reached].min()) if reached.any() else None

    def weight_within(self, cost: float) -> float | None:
        """Weight of the best quality at a mean cost of at most `cost`, the cheaper on a tie; None if none."""
        affordable = np.flatnonzero(self.cost <= cost + 1e-12)
        if not len(affordable):
            return None
        return float(self.cost_weight[affordable[np.argmax(self.quality[affordable])]])

    def weight_with(self, quality: float) -> float | None:
        """Weight of the cheapest point whose quality is at least `quality`; None if no point reaches it."""
        reached = np.flatnonzero(self.quality >= quality - 1e-12)
        return float(self.cost_weight[reached[np.argmin(self.cost[reached])]]) if len(reached) else None

    def best_within(self, cost: float) -> float | None:
        """Best quality at a mean cost of at most `cost`; None if every point costs more."""
        affordable = self.cost <= cost + 1e-12
        return float(self.quality[affordable].max()) if affordable.any() else None


def cost_curve(predicted: Floats, quality: Floats, cost: Floats, cost_weights: Sequence[float]) -> CostCurve:
    """Choose argmax(predicted - weight * cost) for each weight.

    predicted, quality: shape (requests, experts); cost: shape (experts,) or (requests, experts).
    """
    costs = np.broadcast_to(cost, quality.shape)
    rows = np.arange(len(quality))
    points = []
    for weight in cost_weights:
        chosen = np.argmax(predicted - weight * costs, axis=1)
        share = np.bincount(chosen, minlength=quality.shape[1]) / len(chosen)
        points.append((weight, costs[rows, chosen].mean(), quality[rows, chosen].mean(), share))
    points.sort(key=lambda point: point[1])
    weight_, cost_, quality_ = (np.array([p[i] for p in points], dtype=float) for i in range(3))
    return CostCurve(weight_, cost_, quality_, np.array([point[3] for point in points]))


def confusion(truth: Sequence[str], found: Sequence[str]) -> tuple[list[str], list[str], Ints]:
    """Counts of true domain (rows) against what was found (columns), both sorted by name."""
    rows, columns = sorted(set(truth)), sorted(set(found))
    table = np.zeros((len(rows), len(columns)), dtype=np.intp)
    row_of = {name: index for index, name in enumerate(rows)}
    column_of = {name: index for index, name in enumerate(columns)}
    for true, got in zip(truth, found, strict=True):
        table[row_of[true], column_of[got]] += 1
    return rows, columns, table


def majority_names(clusters: Ints, domains: Sequence[str], count: int) -> list[str]:
    """Name of each cluster: the commonest domain of its members ("empty" without any)."""
    names = []
    for cluster in range(count):
        members = [domain for domain, found in zip(domains, clusters, strict=True) if found == cluster]
        names.append(max(sorted(set(members)), key=members.count) if members else "empty")
    return names


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several seeds: mean, standard deviation, least and greatest."""

    mean: float
    std: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of at least one value; the standard deviation of one value is 0."""
        array = np.asarray(values, dtype=float)
        std = float(array.std(ddof=1)) if len(array) > 1 else 0.0
        return cls(float(array.mean()), std, float(array.min()), float(array.max()), len(array))
