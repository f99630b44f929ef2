"""Statistics of latencies: plain samples, and samples that stand for many equal ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
PERCENTILES = (90, 95, 99)


def weighted_quantiles(values: FloatArray, weights: npt.NDArray[np.int64], levels: FloatArray) -> FloatArray:
    """Quantiles of `values` where values[i] stands for weights[i] equal samples.

    Same definition as `numpy.quantile` (linear between order statistics) on the repeated samples,
    without repeating them. Shapes: values (n,), weights (n,), levels (k,) -> (k,).
    """
    order = np.argsort(values, kind="stable")
    ordered, ends = values[order], np.cumsum(weights[order])
    if len(ends) == 0 or ends[-1] == 0:
        return np.full(len(levels), np.nan)
    positions = levels * (ends[-1] - 1)
    below = np.floor(positions)
    low = ordered[np.searchsorted(ends, below, side="right")]
    high = ordered[np.searchsorted(ends, np.ceil(positions), side="right")]
    quantiles: FloatArray = low + (high - low) * (positions - below)
    return quantiles


def latency_statistics(
    name: str, values_s: FloatArray, weights: npt.NDArray[np.int64] | None = None
) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles in milliseconds, named as `vllm bench serve` does.

    `name` is ttft, tpot, itl or e2el; keys are e.g. mean_ttft_ms, p99_ttft_ms. None without samples.
    """
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))]
    counts = np.ones(len(values_s), dtype=np.int64) if weights is None else weights
    total = int(counts.sum())
    if total == 0:
        return dict.fromkeys(keys)
    mean = float(np.average(values_s, weights=counts))
    deviation = float(np.sqrt(np.average((values_s - mean) ** 2, weights=counts)))
    levels = np.array([50, *PERCENTILES], dtype=np.float64) / 100
    if weights is None:
        median, *tail = np.quantile(values_s, levels)
    else:
        median, *tail = weighted_quantiles(values_s, counts, levels)
    return dict(zip(keys, (1e3 * float(x) for x in (mean, median, deviation, *tail)), strict=True))
