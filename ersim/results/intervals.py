"""Intervals: what one more run of the same configuration would show.

Replications differ in their workload, step noise and calibration coefficients (each drawn from
its own distribution), so their spread is the spread of what a measured run may show. With few
replications the interval is Student's t prediction interval, mean +- t * s * sqrt(1 + 1/n).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ersim.results.student import t_quantile

# Figures that stop the automatic choice of replications once their mean is known well enough.
PRECISION_KEYS = ("output_throughput", "median_e2el_ms")

# Figures that get no interval of their own: facts of the configuration or of the window, and spreads.
_WITHOUT_INTERVAL = ("duration", "warmup_s", "usd_per_hour", "std_")
# Figures that cannot exceed one.
_SHARES = ("share", "rate", "fraction")


def prediction_interval(values: Sequence[float], level: float) -> tuple[float, float] | None:
    """Student's t prediction interval for one more value; None below two values.

    A lower end below zero is cut to zero when no value is negative.
    """
    n = len(values)
    if n < 2:
        return None
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = t_quantile(n - 1, 0.5 + level / 2) * deviation * math.sqrt(1 + 1 / n)
    low = mean - half
    return (max(low, 0.0) if min(values) >= 0 else low), mean + half


def mean_is_known(summaries: Sequence[Mapping[str, Any]], precision: float, level: float) -> bool:
    """Whether the means of throughput and median E2E are known within `precision` (relative half width)."""
    n = len(summaries)
    for key in PRECISION_KEYS:
        values = [summary[key] for summary in summaries if summary.get(key) is not None]
        if len(values) < n or n < 2:
            return False
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        half = t_quantile(n - 1, 0.5 + level / 2) * deviation / math.sqrt(n)
        if half > precision * abs(mean):
            return False
    return True


def combine(summaries: Sequence[Mapping[str, Any]], level: float) -> dict[str, Any]:
    """One summary from several replications: means, with `<figure>_low` and `<figure>_high`.

    Counts stay counts of the first replication; flags are true only if all are; nested blocks are
    combined in the same way.
    """
    combined: dict[str, Any] = {}
    for key in dict.fromkeys(key for summary in summaries for key in summary):
        values = [summary[key] for summary in summaries if summary.get(key) is not None]
        sample = values[0] if values else None
        if isinstance(sample, Mapping):
            combined[key] = combine(values, level)
        elif isinstance(sample, bool):
            combined[key] = all(values)
        elif isinstance(sample, float):
            combined[key] = float(np.mean(values))
            interval = None if key.startswith(_WITHOUT_INTERVAL) else prediction_interval(values, level)
            if interval is not None:
                low, high = interval
                combined[f"{key}_low"] = low
                combined[f"{key}_high"] = min(high, 1.0) if key.endswith(_SHARES) else high
        else:
            combined[key] = sample
    return combined
