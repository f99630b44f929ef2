"""Fits a calibration to recorded steps: physical terms, non-negative coefficients, honest spread.

Columns are divided by the time that the fit tells, so that relative errors are minimised, and scaled to
unit norm before `scipy.optimize.nnls`. Token and sequence costs are monotone piecewise linear curves
(one coefficient per segment), above which steps of two tokens may lie; attention is work-shaped. The
covariance is that of a bootstrap over blocks of consecutive steps, the error that of steps held out in the
same blocks.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError
from ersim.steptime.calibration import Calibration
from ersim.steptime.evaluate import graph_sizes
from ersim.steptime.specs import ModelSpec, canonical_precision
from ersim.steptime.terms import curve, segment
from ersim.types import Batch

FloatArray = npt.NDArray[np.float64]
MIN_STEPS = 30
HELD_OUT_FRACTION = 0.25
BLOCK_STEPS = 20  # consecutive steps resemble each other: hold out and resample them together
BOOTSTRAPS = 200
TURNS = 4  # of a fit with what the one before told
FAR = 3.0  # a step so many usual errors off counts for 0.7, which hardly moves a mean of normal errors
USUAL_OVER_MEDIAN = 1.4826  # standard deviation of normal errors over their median size
TINY = 1e-6
OUTLIER_RATIO = 5.0  # a step this many times its prediction was interrupted (garbage collection, a stall)
TOKEN_KNOTS = (
    0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072,
    4096, 6144, 8192,
)  # fmt: skip
SEQUENCE_KNOTS = (0, 16, 64, 256)
OWN_KERNEL_TOKENS = 2
"""Kernels for so few tokens may be others than for more: without a term of their own steps of two rows were
told 11 % too short in one of five profiles of a bf16 expert on a CPU, 6 % in another, within 2 % in three."""
BLOCK_S = 4.0  # what disturbs a shared host lasts for seconds


def batch_features(batches: Sequence[Batch], graphs: Sequence[int] = ()) -> dict[str, FloatArray]:
    """Every feature of `ersim.steptime.terms.FEATURES` for each batch, shape (n,)."""

    def column(values: Any) -> FloatArray:
        return np.fromiter(values, dtype=float, count=len(batches))

    tokens, rows = column(b.tokens for b in batches), column(b.decode_seqs for b in batches)
    total, longest = (
        column(b.decode_context_tokens for b in batches),
        column(b.decode_context_max for b in batches),
    )
    sizes = np.asarray(graphs or [0])
    index = np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)
    return {
        "step": np.ones(len(batches)),
        "mixed_step": column(bool(b.prefills) for b in batches),
        "tokens": tokens,
        "padded_tokens": np.where(tokens <= sizes[-1], sizes[index], tokens),
        "sampled_seqs": column(b.sampled_seqs for b in batches),
        "decode_seqs": rows,
        "decode_context_tokens": total,
        "decode_skew_tokens": np.maximum(0.0, rows * longest - total),
        "prefill_rows": column(len(b.prefills) for b in batches),
        "prefill_pairs": column(sum(c * (x + 0.5 * c) for c, x in b.prefills) for b in batches),
        "prefill_context_tokens": column(sum(x for _, x in b.prefills) for b in batches),
    }


def _segments(values: FloatArray, knots: Sequence[int]) -> list[tuple[float, float | None]]:
    """Segments between knots that hold enough of the data to be told apart (at least 3 % of it each)."""
    need, edges = _need(values), [0.0]
    for knot in knots[1:]:
        inside = np.sum((values > edges[-1]) & (values <= knot))
        if inside >= need and np.sum(values > knot) >= need:
            edges.append(float(knot))
    return [*itertools.pairwise(edges), (edges[-1], None)]


def _need(values: FloatArray) -> int:
    """How many steps it takes to tell a term apart.

    A grid's batches of one size are 4 to 6 % of a small expert's profile.
    """
    return max(5, int(0.03 * len(values)))


def live_terms(features: Mapping[str, FloatArray], padded: bool) -> list[dict[str, Any]]:
    """The terms that the recorded steps can tell apart, all of side gpu (what is measured is the period)."""
    token_feature = "padded_tokens" if padded else "tokens"
    terms: list[dict[str, Any]] = [_linear("step", "fixed time per step")]
    segments = _segments(features[token_feature], TOKEN_KNOTS)
    few, more = (np.sum(test(features["tokens"], OWN_KERNEL_TOKENS)) for test in (np.equal, np.greater))
    if not padded and min(few, more) >= _need(features["tokens"]):
        terms.append(_peak(OWN_KERNEL_TOKENS))
        at, following = (OWN_KERNEL_TOKENS - 1, OWN_KERNEL_TOKENS), (OWN_KERNEL_TOKENS, OWN_KERNEL_TOKENS + 1)
        if following in segments:  # which with the peak says all that this one could
            segments = [one for one in segments if one != at]
    for low, high in segments:
        terms.append(_linear(token_feature, f"tokens {low:g} to {high or 'end'}", low, high))
    for low, high in _segments(features["sampled_seqs"], SEQUENCE_KNOTS):
        terms.append(_linear("sampled_seqs", f"sampled rows {low:g} to {high or 'end'}", low, high))
    for name, label in (
        ("decode_context_tokens", "decode attention"),
        ("decode_skew_tokens", "uneven decode contexts"),
        ("mixed_step", "steps with prefill"),
        ("prefill_rows", "prefill chunks"),
        ("prefill_pairs", "prefill attention"),
        ("prefill_context_tokens", "reading the prefix"),
    ):
        if np.ptp(features[name]) > 0:
            terms.append(_linear(name, label))
    return terms


def _linear(feature: str, label: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    term: dict[str, Any] = {"kind": "linear", "side": "gpu", "feature": feature, "label": label}
    if low:
        term["low"] = low
    if high:
        term["high"] = high
    return term


def _peak(at: int) -> dict[str, Any]:
    """A term for steps of exactly so many tokens, >= 2; its coefficient is seconds."""
    peak = {"tokens": [at - 2, at - 1, at, at + 1, at + 2], "time_us": [0.0, 0.0, 1e6, 0.0, 0.0]}
    return {"kind": "tokens", "side": "gpu", "label": f"more for {at} tokens", **peak}


def design_matrix(terms: Sequence[Mapping[str, Any]], features: Mapping[str, FloatArray]) -> FloatArray:
    """What each term of `live_terms` is worth per unit coefficient, shape (n, terms)."""
    columns = []
    for term in terms:
        if term["kind"] == "tokens":
            columns.append(1e-6 * curve(features["tokens"], term["tokens"], term["time_us"]))
            continue
        values = features[term["feature"]]
        bounded = term.get("low") is not None or term.get("high") is not None
        columns.append(segment(values, term.get("low"), term.get("high")) if bounded else values)
    return np.stack(columns, axis=1)


def fit_nonnegative(matrix: FloatArray, durations_s: FloatArray) -> FloatArray:
    """Coefficients >= 0 of least squared error relative to the time that they tell, shape (terms,).

    Not relative to the measured time: of steps that scatter by s around their mean that would tell 2 s^2
    less than the mean (E[1/t] / E[1/t^2]), which is 2 to 3 % on two shared cores, and more of steps that
    scatter more. What is told is not known before the fit, so the fit is repeated with what the one before
    told; steps far off, to either side, count less in it (the loss sqrt(1 + z^2)). Of kinds of steps that
    scatter much more than most, and more to one side, some per cent of the mean are missing still.
    """
    theta = _weighted_fit(matrix, durations_s, durations_s)
    for _ in range(TURNS):
        told_s = np.maximum(matrix @ theta, 1e-9)
        off = durations_s / told_s - 1.0
        usual = max(USUAL_OVER_MEDIAN * float(np.median(np.abs(off))), TINY)
        theta = _weighted_fit(matrix, durations_s, told_s * (1.0 + (off / (FAR * usual)) ** 2) ** 0.25)
    return theta


def _weighted_fit(matrix: FloatArray, durations_s: FloatArray, expected_s: FloatArray) -> FloatArray:
    """Coefficients >= 0 of least squared error relative to `expected_s`, shape (terms,)."""
    weighted = matrix / expected_s[:, None]
    scale = np.linalg.norm(weighted, axis=0)
    scale[scale == 0.0] = 1.0
    from scipy.optimize import nnls  # late: half a second that simulations do not need

    solution, _ = nnls(weighted / scale, durations_s / expected_s)
    return np.asarray(solution / scale, dtype=float)


def _blocks(count: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Block number of each step, and which steps are held out (whole blocks)."""
    block = np.arange(count) // max(1, min(BLOCK_STEPS, count // 8))
    number = int(block[-1]) + 1
    held = rng.permutation(number)[: max(1, round(HELD_OUT_FRACTION * number))]
    return block, np.isin(block, held)


def _bootstrap(
    matrix: FloatArray, durations_s: FloatArray, block: Any, rng: np.random.Generator
) -> FloatArray:
    """Covariance of the coefficients over resampled blocks, shape (terms, terms)."""
    members = [np.flatnonzero(block == b) for b in range(int(block[-1]) + 1)]
    if len(durations_s) > 4000:  # enough to tell the coefficients; the rest only costs time
        keep = rng.permutation(len(members))[: max(8, round(len(members) * 4000 / len(durations_s)))]
        members = [members[i] for i in keep]
    draws = []
    for _ in range(BOOTSTRAPS):
        index = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        draws.append(fit_nonnegative(matrix[index], durations_s[index]))
    return np.cov(np.asarray(draws), rowvar=False)


def _checked(batches: Sequence[Batch], durations_s: Any, name: str) -> FloatArray:
    times = np.asarray(durations_s, dtype=float)
    if times.shape != (len(batches),):
        raise DataError(
            f"{name}: {len(batches)} batches but {times.shape} durations; give one duration per batch"
        )
    if len(times) < MIN_STEPS:
        raise DataError(f"{name}: {len(times)} recorded steps are too few; record at least {MIN_STEPS}")
    bad = ~(np.isfinite(times) & (times > 0))
    if bad.any():
        raise DataError(f"{name}: durations_s[{int(np.argmax(bad))}] must be > 0, got {times[bad][0]!r}")
    return times


def fit_live_calibration(
    batches: Sequence[Batch],
    durations_s: Sequence[float] | FloatArray,
    *,
    name: str,
    model: str | ModelSpec,
    precision: str,
    gpu: str,
    tp: int,
    vllm_version: str | None,
    kv_blocks: int | None,
    engine: Mapping[str, Any],
    provenance: Mapping[str, Any],
    seed: int,
    frontend: Mapping[str, float] | None = None,
    power: Mapping[str, float] | None = None,
) -> Calibration:
    """Fit a calibration of source ``steps`` to consecutive recorded steps of one server.

    durations_s: period of each step in seconds (`u0[n] - max(u0[n-1], s1[n])`), in recorded order.
    model: its name (a name in conf/model, or any name when provenance["model_config"] holds the parsed
    config.json). gpu: a name in conf/gpu or ``cpu``. engine: settings under `EngineSettings`' names,
    plus cudagraph_sizes (list; [] for eager). frontend, power: see `Calibration`.
    Raises DataError for too few steps or impossible durations.
    """
    durations = _checked(batches, durations_s, name)
    rng = np.random.default_rng(seed)
    settings = dict(engine)
    if "cudagraph_sizes" not in settings:
        settings["cudagraph_sizes"] = [] if gpu == "cpu" else graph_sizes(settings.get("max_num_seqs", 256))
    features = batch_features(batches, settings["cudagraph_sizes"])
    terms = live_terms(features, padded=bool(settings["cudagraph_sizes"]))
    matrix = design_matrix(terms, features)
    keep = durations < OUTLIER_RATIO * np.maximum(matrix @ fit_nonnegative(matrix, durations), 1e-9)
    matrix, times = matrix[keep], durations[keep]
    block, held = _blocks(len(times), rng)
    trained = fit_nonnegative(matrix[~held], times[~held])
    told = matrix[held] @ trained
    held_batches = [batches[i] for i in np.flatnonzero(keep)[held]]
    theta = fit_nonnegative(matrix, times)
    relative = times / np.maximum(matrix @ theta, 1e-12) - 1
    covariance = _bootstrap(matrix, times, block, rng)
    covariance += np.outer(theta, theta) * _common_doubt(relative, times) ** 2
    return Calibration(
        name=name,
        source="steps",
        model=model.name if isinstance(model, ModelSpec) else model,
        precision=canonical_precision(precision),
        gpu=gpu,
        tp=tp,
        terms=tuple(terms),
        theta=tuple(theta.tolist()),
        covariance=tuple(map(tuple, np.atleast_2d(covariance).tolist())),
        residual_rel_std=_robust_std(relative),
        valid=_observed_range(batches),
        vllm_version=vllm_version,
        date=str(provenance.get("date") or datetime.date.today().isoformat()),
        engine=settings,
        kv_blocks=kv_blocks,
        fit={
            "steps": len(times),
            "dropped_outliers": int((~keep).sum()),
            "held_out_steps": int(held.sum()),
            "held_out_mape": round(float(np.abs(told / times[held] - 1).mean()), 5),
            "held_out_median_mape": round(_median_error(held_batches, times[held], told), 5),
            "mape": round(float(np.abs(relative).mean()), 5),
            "bias": round(float(relative.mean()), 5),
            "held_out": f"blocks of {BLOCK_STEPS} consecutive steps",
        },
        provenance=dict(provenance),
        frontend=dict(frontend or {}),
        power=dict(power or {}),
    )


def _median_error(batches: Sequence[Batch], times: FloatArray, told: FloatArray) -> float:
    """Mean relative error on the medians of like steps, weighted by their number.

    Like steps decode as many rows, with contexts and prefilled tokens in the same octave: on a noisy
    host one step's time says little, the median of several says what such a step takes.
    """
    groups: dict[tuple[int, int, int], list[int]] = {}
    for index, batch in enumerate(batches):
        prefilled = sum(chunk for chunk, _ in batch.prefills)
        key = (batch.decode_seqs, batch.decode_context_tokens.bit_length(), prefilled.bit_length())
        groups.setdefault(key, []).append(index)
    error = sum(
        len(rows) * abs(float(np.median(told[rows]) / np.median(times[rows])) - 1) for rows in groups.values()
    )
    return error / len(batches)


def _common_doubt(relative: FloatArray, times: FloatArray) -> float:
    """Relative standard error of all steps together, from blocks of `BLOCK_S` seconds; 0 for less than three.

    The bootstrap's blocks are shorter than what disturbs a shared host.
    """
    _, block = np.unique((np.cumsum(times) / BLOCK_S).astype(int), return_inverse=True)
    seconds = np.bincount(block, times)
    if len(seconds) < 3:
        return 0.0
    means = np.bincount(block, relative * times) / seconds
    return float(np.std(means, ddof=1) / np.sqrt(len(means)))


def _robust_std(relative: FloatArray) -> float:
    """Spread of the residuals from their 5 % to 95 % range, which single stalls cannot move."""
    low, high = np.quantile(relative, [0.05, 0.95])
    return round(float(high - low) / 3.29, 5)


def _observed_range(batches: Sequence[Batch]) -> dict[str, list[float]]:
    """[low, high] of what the recorded steps covered, by key of RANGE_KEYS."""
    chunks = [(c, x) for b in batches for c, x in b.prefills]
    observed = {
        "tokens": [b.tokens for b in batches],
        "decode_seqs": [b.decode_seqs for b in batches],
        "context_tokens": [b.decode_context_max for b in batches],
        "prefill_chunk_tokens": [c for c, _ in chunks],
        "prefill_context_tokens": [x for _, x in chunks],
    }
    return {key: [float(min(v)), float(max(v))] for key, v in observed.items() if v}
