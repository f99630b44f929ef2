"""The kinds of term a step's time is made of, and what each is worth on one batch.

Every term has ``kind``, ``label`` and ``side`` (gpu, host or exposed, see `ersim.steptime.calibration`).
Grids are strictly increasing; times are microseconds (`time_us`) for the whole step on one GPU,
interpolated linearly, and continued along the last segment beyond the grid.

tokens: tokens, time_us, padded
    curve over the step's tokens, padded to CUDA-graph sizes if `padded`.
sampled: sequences, time_us
    curve over rows that emit a token.
decode_attention: sequences, context_tokens, time_us[][], skew; optional fp8_time_us[][], fp8_scale, mixed
    table over decode rows and their mean context, plus skew times the excess of the longest context; a
    skew is a number, or {sequences, share} by decode rows.
    fp8_time_us times fp8_scale replaces time_us when the KV cache is fp8. mixed = {seq_us, tile_us,
    token_us, skew}: in a step that also prefills the rows cost seq_us + tile_us for each 128 tokens of
    the longest chunk, token_us per token of context and skew of it per token that the longest has more.
prefill_attention: chunk_tokens, context_tokens, time_us[][], shared_us
    table over chunk and prefix, summed over chunks, less shared_us (one launch) for each further chunk.
linear: feature (one of FEATURES), low, high
    seconds per unit of the feature between low and high.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ersim.errors import DataError

SIDES = ("gpu", "host", "exposed")
FEATURES = (
    "step",  # 1 for every step
    "mixed_step",  # 1 for a step that holds prefill chunks
    "tokens",  # tokens in the step
    "padded_tokens",  # the same, padded to CUDA-graph sizes
    "sampled_seqs",  # rows that emit a token
    "decode_seqs",  # decode rows
    "decode_context_tokens",  # sum of decode contexts
    "decode_skew_tokens",  # decode rows times longest context, less the sum
    "prefill_rows",  # prefill chunks
    "prefill_pairs",  # sum over chunks of chunk * (context + chunk / 2): attention's work
    "prefill_context_tokens",  # sum over chunks of the context before them
)
HOST_FEATURES = (
    "step",
    "mixed_step",
    "tokens",
    "padded_tokens",
    "sampled_seqs",
    "decode_seqs",
    "prefill_rows",
)
CURVE_FEATURES = ("tokens", "padded_tokens", "sampled_seqs", "decode_seqs")  # may have low and high

MIXED_FIELDS = ("seq_us", "tile_us", "token_us")


def check_term(term: Any, where: str) -> None:
    """Raise DataError if `term` is not a well-formed term; `where` names file and field."""
    if not isinstance(term, Mapping):
        raise DataError(f"{where} must be an object, got {term!r}")
    kind = term.get("kind")
    if kind not in CHECKS:
        raise DataError(f"{where}.kind must be one of {', '.join(CHECKS)}, got {kind!r}")
    if term.get("side") not in SIDES:
        raise DataError(f"{where}.side must be one of {', '.join(SIDES)}, got {term.get('side')!r}")
    if not isinstance(term.get("label"), str):
        raise DataError(f"{where}.label must be a string, got {term.get('label')!r}")
    light = kind in ("tokens", "sampled") or term.get("feature") in HOST_FEATURES
    if term["side"] != "gpu" and not light:
        raise DataError(
            f"{where}.side must be gpu for {kind} {term.get('feature', '')}, got {term['side']!r}"
        )
    CHECKS[kind](term, where)


def _numbers(values: Any, where: str, increasing: bool = False) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        array = np.empty((0,))
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all() or (array < 0).any():
        raise DataError(f"{where} must be a list of at least 2 finite numbers >= 0")
    if increasing and not (np.diff(array) > 0).all():
        raise DataError(f"{where} must be strictly increasing")
    return array


def _check_curve(term: Mapping[str, Any], where: str, axis: str) -> None:
    grid = _numbers(term.get(axis), f"{where}.{axis}", increasing=True)
    times = _numbers(term.get("time_us"), f"{where}.time_us")
    if len(grid) != len(times):
        raise DataError(
            f"{where}.time_us must have as many entries as {axis} ({len(grid)}), got {len(times)}"
        )


def _check_table(term: Mapping[str, Any], where: str, rows: str, extra: str) -> None:
    row_grid = _numbers(term.get(rows), f"{where}.{rows}", increasing=True)
    columns = _numbers(term.get("context_tokens"), f"{where}.context_tokens", increasing=True)
    times = term.get("time_us")
    if not isinstance(times, list) or len(times) != len(row_grid):
        raise DataError(f"{where}.time_us must hold one row for each of the {len(row_grid)} {rows}")
    for index, row in enumerate(times):
        if len(_numbers(row, f"{where}.time_us[{index}]")) != len(columns):
            raise DataError(f"{where}.time_us[{index}] must have {len(columns)} entries, one per context")
    _check_share(term.get(extra), f"{where}.{extra}")


def _check_share(value: Any, where: str) -> None:
    """A number >= 0, or one for each of some numbers of decode rows: {sequences, share}."""
    if isinstance(value, Mapping):
        grid = _numbers(value.get("sequences"), f"{where}.sequences", increasing=True)
        if len(_numbers(value.get("share"), f"{where}.share")) != len(grid):
            raise DataError(f"{where}.share must have as many entries as sequences ({len(grid)})")
    elif not _is_share(value):
        raise DataError(f"{where} must be a number >= 0, got {value!r}")


def _is_share(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _check_decode(term: Mapping[str, Any], where: str) -> None:
    _check_table(term, where, "sequences", "skew")
    if term.get("fp8_time_us") is not None:
        _check_table({**term, "time_us": term["fp8_time_us"]}, f"{where} (fp8_time_us)", "sequences", "skew")
        if not _is_share(term.get("fp8_scale", 1.0)):
            raise DataError(f"{where}.fp8_scale must be a number >= 0, got {term['fp8_scale']!r}")
    mixed = term.get("mixed")
    if mixed is not None:
        for name in MIXED_FIELDS:
            if not isinstance(mixed, Mapping) or not _is_share(mixed.get(name)):
                raise DataError(f"{where}.mixed.{name} must be a number >= 0, got {mixed!r}")
        _check_share(mixed.get("skew"), f"{where}.mixed.skew")


def _check_linear(term: Mapping[str, Any], where: str) -> None:
    feature = term.get("feature")
    if feature not in FEATURES:
        raise DataError(f"{where}.feature must be one of {', '.join(FEATURES)}, got {feature!r}")
    low, high = term.get("low"), term.get("high")
    if (low is not None or high is not None) and feature not in CURVE_FEATURES:
        raise DataError(f"{where}: low and high are only for {', '.join(CURVE_FEATURES)}, not {feature}")
    if low is not None and high is not None and not 0 <= low < high:
        raise DataError(f"{where}: low must be >= 0 and below high, got {low!r} and {high!r}")


CHECKS = {
    "tokens": lambda term, where: _check_curve(term, where, "tokens"),
    "sampled": lambda term, where: _check_curve(term, where, "sequences"),
    "decode_attention": _check_decode,
    "prefill_attention": lambda term, where: _check_table(term, where, "chunk_tokens", "shared_us"),
    "linear": _check_linear,
}


def by_rows(skew: Any, max_seqs: int) -> np.ndarray:
    """A skew for each number of decode rows from 0 to `max_seqs`; held at both ends of its grid."""
    rows = np.arange(max_seqs + 1, dtype=float)
    if not isinstance(skew, Mapping):
        return np.full(len(rows), float(skew))
    result: np.ndarray = np.interp(rows, skew["sequences"], skew["share"])
    return result


def curve(x: np.ndarray, grid: Any, values: Any) -> np.ndarray:
    """Linear interpolation of `values` over `grid`, continued beyond both ends, never below zero."""
    grid, values = np.asarray(grid, float), np.asarray(values, float)
    index = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, len(grid) - 2)
    slope = (values[index + 1] - values[index]) / (grid[index + 1] - grid[index])
    result: np.ndarray = np.maximum(values[index] + slope * (x - grid[index]), 0.0)
    return result


def curve_rows(x: np.ndarray, grid: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`curve` for each column of `values`, shape (len(grid), n): returns shape (len(x), n)."""
    index = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, len(grid) - 2)
    share = ((x - grid[index]) / (grid[index + 1] - grid[index]))[:, None]
    result: np.ndarray = np.maximum(values[index] + share * (values[index + 1] - values[index]), 0.0)
    return result


def segment(x: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """How much of [low, high] lies below x: the basis of a monotone piecewise linear curve."""
    clipped: np.ndarray = np.clip(x, low or 0.0, math.inf if high is None else high)
    return clipped - (low or 0.0)
