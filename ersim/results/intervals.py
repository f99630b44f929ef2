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

# Facts of the configuration, the same in every replication: an interval would be the value itself.
_FACTS = ("gpus", "usd_per_hour")
# Figures that cannot exceed one, by how their names end.
_SHARES = ("share", "rate", "fraction", "misroute_rate_by_domain", "misroute_rate_by_quality", "mean_score")
# Blocks of counts in which a name that a replication lacks stands for none.
_SPARSE_COUNTS = ("steps_beyond_calibration",)
FEW_REPLICATIONS = 4  # below, Student's quantile is so large that intervals say little


def prediction_interval(
    values: Sequence[float], level: float, at_least: float | None = 0.0, freedom: int | None = None
) -> tuple[float, float] | None:
    """Student's t prediction interval for one more value; None below two values.

    A lower end below `at_least` is cut to it when no value lies below. freedom: degrees of freedom, where
    values depend on each other; else one less than there are.
    """
    n = len(values)
    if n < 2:
        return None
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = t_quantile(freedom or n - 1, 0.5 + level / 2) * deviation * math.sqrt(1 + 1 / n)
    low = mean - half
    return (max(low, at_least) if at_least is not None and min(values) >= at_least else low), mean + half


def interval_method(replications: int, level: float) -> str:
    """How the intervals of a summary were made, in words; with few replications, what that costs."""
    if replications < 2:
        return "none: a single replication shows no spread; replications=auto gives intervals"
    quantile = t_quantile(replications - 1, 0.5 + level / 2)
    text = (
        f"{100 * level:g} % prediction interval for one more run, mean +- {quantile:.2f} s sqrt(1 + 1/n) "
        f"over {replications} replications"
    )
    if replications >= FEW_REPLICATIONS:
        return text
    enough = t_quantile(FEW_REPLICATIONS, 0.5 + level / 2)
    return (
        f"{text}: wide because {replications} replications hardly know their own spread (Student's "
        f"quantile is {quantile:.1f}, with {FEW_REPLICATIONS + 1} it is {enough:.1f}); take replications=auto"
    )


def mean_known_within(summaries: Sequence[Mapping[str, Any]], level: float) -> float | None:
    """How well the means of throughput and median E2E are known: the larger relative half width.

    None below two replications, or where a replication lacks one of the two.
    """
    n = len(summaries)
    widest = 0.0
    for key in PRECISION_KEYS:
        values = [summary[key] for summary in summaries if summary.get(key) is not None]
        if len(values) < n or n < 2:
            return None
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        half = t_quantile(n - 1, 0.5 + level / 2) * deviation / math.sqrt(n)
        widest = max(widest, half / abs(mean) if mean else (math.inf if half else 0.0))
    return widest


def mean_is_known(summaries: Sequence[Mapping[str, Any]], precision: float, level: float) -> bool:
    """Whether the means of throughput and median E2E are known within `precision` (relative half width)."""
    within = mean_known_within(summaries, level)
    return within is not None and within <= precision


def combine(
    summaries: Sequence[Mapping[str, Any]], level: float, freedom: int | None = None
) -> dict[str, Any]:
    """One summary from several replications: means, with `<figure>_low` and `<figure>_high`.

    Every number gets an interval, counts included (their mean stays whole where all agree), but for
    facts of the configuration (`gpus`, `usd_per_hour`). A figure that some replications lack has the
    mean and interval of those that know it. Flags are true only if all are; nested blocks are
    combined in the same way; text is the first replication's. freedom: see `prediction_interval`.
    """
    combined: dict[str, Any] = {}
    for key in dict.fromkeys(key for summary in summaries for key in summary):
        values = [summary[key] for summary in summaries if summary.get(key) is not None]
        sample = values[0] if values else None
        if isinstance(sample, Mapping):
            combined[key] = combine(_filled(values) if key in _SPARSE_COUNTS else values, level, freedom)
        elif isinstance(sample, bool):
            combined[key] = all(values)
        elif isinstance(sample, (int, float)) and key not in _FACTS:
            combined |= _with_interval(key, values, level, freedom)
        else:
            combined[key] = sample
    return combined


def _filled(blocks: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """The same counts with a zero for every name that only other replications have."""
    names = dict.fromkeys(name for block in blocks for name in block)
    return [{name: block.get(name, 0) for name in names} for block in blocks]


def _with_interval(key: str, values: Sequence[float], level: float, freedom: int | None) -> dict[str, Any]:
    """The mean of `values` under `key`, and its interval where there is more than one."""
    same = all(value == values[0] for value in values)
    found: dict[str, Any] = {key: values[0] if same else float(np.mean(values))}
    interval = prediction_interval(values, level, freedom=freedom)
    if interval is not None:
        low, high = (values[0], values[0]) if same else interval
        found[f"{key}_low"] = low
        found[f"{key}_high"] = min(high, 1.0) if key.endswith(_SHARES) else high
    return found
