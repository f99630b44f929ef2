"""Two things laid side by side: a prediction and its measurement, or two fleets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ersim.results.student import t_quantile

VALIDATED = (
    "request_throughput",
    "output_throughput",
    *(
        f"{kind}_{name}_ms"
        for name in ("ttft", "tpot", "itl", "e2el")
        for kind in ("mean", "median", "p90", "p99")
    ),
    "median_gateway_ms",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure: measured, predicted with its interval, relative error, and whether it fell inside.

    `error` is predicted / measured - 1. `inside` is None when the prediction has no interval.
    """

    metric: str
    measured: float
    predicted: float
    low: float | None
    high: float | None
    error: float
    inside: bool | None


def compare(
    measured: Mapping[str, Any], predicted: Mapping[str, Any], metrics: Sequence[str] = VALIDATED
) -> list[Comparison]:
    """Lay every figure that both summaries have side by side, in the order of `metrics`."""
    rows = []
    for metric in metrics:
        real, told = measured.get(metric), predicted.get(metric)
        if real is None or told is None:
            continue
        low, high = predicted.get(f"{metric}_low"), predicted.get(f"{metric}_high")
        inside = None if low is None or high is None else low <= real <= high
        error = told / real - 1 if real else math.inf
        rows.append(Comparison(metric, float(real), float(told), low, high, error, inside))
    return rows


@dataclass(frozen=True, slots=True)
class Difference:
    """How much figure `metric` of fleet a exceeds that of fleet b, relative to b, with its interval."""

    metric: str
    relative: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0.0 or self.high < 0.0


def difference(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], metric: str, level: float = 0.90
) -> Difference | None:
    """Paired difference of two fleets' replications, which share users, prompts and coefficient draws.

    Student's t interval of the mean of (a_i - b_i) / mean(b) over the replications both have;
    None below two pairs or when a figure is missing.
    """
    pairs = [(x.get(metric), y.get(metric)) for x, y in zip(a, b, strict=False)]
    known = [(float(x), float(y)) for x, y in pairs if x is not None and y is not None]
    if len(known) < 2 or len(known) < len(pairs):
        return None
    scale = float(np.mean([y for _, y in known]))
    if scale == 0.0:
        return None
    ratios = np.array([(x - y) / scale for x, y in known])
    mean = float(ratios.mean())
    quantile = t_quantile(len(ratios) - 1, 0.5 + level / 2)
    half = quantile * float(ratios.std(ddof=1)) / math.sqrt(len(ratios))
    return Difference(metric, mean, mean - half, mean + half)
