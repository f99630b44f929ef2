"""Two things laid side by side: a prediction and its measurement, or two fleets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ersim.results.intervals import prediction_interval

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
        error = told / real - 1 if real else math.inf if told else 0.0
        rows.append(Comparison(metric, float(real), float(told), low, high, error, inside))
    return rows


@dataclass(frozen=True, slots=True)
class Difference:
    """By which share figure `metric` of fleet a exceeds fleet b's, with an interval, from so many pairs."""

    metric: str
    relative: float
    low: float
    high: float
    pairs: int

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves zero out. Two fleets that never differ are not."""
        return self.low > 0.0 or self.high < 0.0


def difference(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], metric: str, level: float = 0.90
) -> Difference | None:
    """Paired difference of two fleets' replications, which share users, prompts and coefficient draws.

    Student's t prediction interval, mean +- t s sqrt(1 + 1/n) over the n replications that both have, of
    the log ratio in one more pair (of the plain difference, as a share of b's mean, where a value is not
    positive). The narrower interval of the mean would shrink to nothing with many replications, but the
    coefficients' doubt does not: a real GPU has one set of them, and the question is whether the sign
    holds for whichever it is. None below two pairs, or when a figure is missing somewhere.
    """
    pairs = [(x.get(metric), y.get(metric)) for x, y in zip(a, b, strict=False)]
    known = [(float(x), float(y)) for x, y in pairs if x is not None and y is not None]
    if len(known) < 2 or len(known) < len(pairs):
        return None
    if min(min(pair) for pair in known) > 0.0:
        logs = [math.log(x / y) for x, y in known]
        mean, (low, high) = float(np.mean(logs)), _interval(logs, level)
        ratios = [math.expm1(min(log, 700.0)) for log in (mean, low, high)]
        return Difference(metric, ratios[0], ratios[1], ratios[2], len(known))
    base = abs(float(np.mean([y for _, y in known]))) or 1.0  # nothing to be a share of: in the figure's unit
    shares = [(x - y) / base for x, y in known]
    return Difference(metric, float(np.mean(shares)), *_interval(shares, level), len(known))


def _interval(values: Sequence[float], level: float) -> tuple[float, float]:
    interval = prediction_interval(values, level, at_least=None)
    assert interval is not None  # two values have one
    return interval
