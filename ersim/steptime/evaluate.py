"""Turns a calibration into seconds, fast: arrays are prepared once, a step costs a few look-ups.

`PreparedStepTime` fulfils `ersim.types.StepTime`. Everything that depends on one small integer
(tokens, sampled rows, decode rows) is a row of numbers indexed by it; attention is a short search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.steptime.calibration import Calibration
from ersim.steptime.terms import by_rows, curve, curve_rows, segment
from ersim.types import Batch
from ersim.util.vectors import i64, vec

FloatArray = npt.NDArray[np.float64]
FP8_KV_SCALE = (
    0.65  # fp8 against 16-bit KV reading time where only 16 bits were measured (H100 and H200 tables)
)
# Without asynchronous scheduling the GPU idles while the host schedules and handles outputs; what it
# spends on preparing inputs and launching still overlaps. About 1.2 ms a step were visible on H100s.
SYNCHRONOUS_HOST_SHARE = 0.5
EXTRAPOLATION_STD = 0.20  # spread (log) of what lies beyond a calibration's range, drawn once per sample
SCALAR_FEATURES = ("step", "mixed_step", "prefill_rows")
CONTEXT_FEATURES = ("decode_context_tokens", "decode_skew_tokens", "prefill_pairs", "prefill_context_tokens")


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes vLLM 0.32 captures CUDA graphs for: 1, 2, 4, 8 to 248 by 8, then by 16.

    The largest is min(2 max_num_seqs, 512).
    """
    largest = min(2 * max_num_seqs, 512)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    return [size for size in sizes if size <= largest]


def padded_tokens(limit: int, sizes: Sequence[int]) -> FloatArray:
    """For each token count 0 to `limit` the next CUDA-graph size, or itself above the largest."""
    tokens = np.arange(limit + 1)
    if not sizes:
        return tokens.astype(float)
    grid = np.asarray(sizes)
    index = np.minimum(np.searchsorted(grid, tokens), len(grid) - 1)
    return np.where((tokens > 0) & (tokens <= grid[-1]), grid[index], tokens).astype(float)


_STATE = (
    "_beyond_factor",
    "_chunk_grid",
    "_chunk_key",
    "_chunk_rows",
    "_context_grid",
    "_decode",
    "_decode_context_s",
    "_flat_slopes",
    "_flat_values",
    "_grid",
    "_width",
    "_has_host",
    "_has_mixed",
    "_host_decode",
    "_host_mixed",
    "_host_prefill",
    "_host_sampled",
    "_host_tokens",
    "_max_chunk",
    "_max_context",
    "_max_prefix",
    "_max_rows",
    "_max_tokens",
    "_mixed",
    "_mixed_seq",
    "_mixed_skew",
    "_mixed_tile",
    "_mixed_token",
    "_pairs_s",
    "_prefill_context_s",
    "_prefill_row",
    "_prefix_grid",
    "_prefix_key",
    "_sampled",
    "_shared",
    "_skew",
    "_skew_tokens_s",
    "_slopes",
    "_tokens",
    "_values",
    "beyond",
)


class PreparedStepTime:
    """Seconds per step from one set of coefficients.

    beyond: how many evaluations lay outside the calibration's range, by key of RANGE_KEYS. What such a
    step takes more than one at the edge of the range is multiplied by `beyond_factor`, which draws spread.
    """

    __slots__ = _STATE

    def __init__(
        self,
        calibration: Calibration,
        theta: FloatArray,
        *,
        max_tokens: int,
        max_seqs: int,
        max_context: int,
        graphs: Sequence[int],
        asynchronous: bool,
        fp8_kv: bool = False,
        beyond_factor: float = 1.0,
    ) -> None:
        self.beyond: dict[str, int] = {}
        valid = calibration.valid
        self._beyond_factor = beyond_factor
        self._max_tokens: i64 = int(valid.get("tokens", (0, max_tokens))[1])
        self._max_rows: i64 = min(int(valid.get("decode_seqs", (0, max_seqs))[1]), self._max_tokens)
        self._max_context: i64 = int(valid.get("context_tokens", (0, max_context))[1])
        # Tables and profiles name no range of their own for prefill: steps' and contexts' hold for it.
        self._chunk_key = "prefill_chunk_tokens" if "prefill_chunk_tokens" in valid else "tokens"
        self._prefix_key = "prefill_context_tokens" if "prefill_context_tokens" in valid else "context_tokens"
        self._max_chunk: i64 = int(valid.get("prefill_chunk_tokens", (0, self._max_tokens))[1])
        self._max_prefix: i64 = int(valid.get("prefill_context_tokens", (0, self._max_context))[1])
        terms = list(zip(calibration.terms, theta.tolist(), strict=True))
        gpu = [(t, c) for t, c in terms if t["side"] == "gpu"]
        host = [(t, c) for t, c in terms if t["side"] == "host"]
        if not asynchronous:
            gpu, host = gpu + [(t, SYNCHRONOUS_HOST_SHARE * c) for t, c in host], []
        exposed = [(t, c) for t, c in terms if t["side"] == "exposed"]
        self._has_host = bool(host)
        sizes = (max_tokens, max_seqs, graphs)
        self._tokens, self._sampled, self._decode, self._mixed, self._prefill_row = _curves(
            gpu + exposed, *sizes
        )
        host_curves = _curves(host + exposed, *sizes)
        self._host_tokens, self._host_sampled, self._host_decode, self._host_mixed, self._host_prefill = (
            host_curves
        )
        weights = {name: 0.0 for name in CONTEXT_FEATURES}
        for term, coefficient in gpu + exposed:
            if term["kind"] == "linear" and term["feature"] in weights:
                weights[term["feature"]] += coefficient
        kv_scale = FP8_KV_SCALE if fp8_kv else 1.0
        self._decode_context_s = weights["decode_context_tokens"] * kv_scale
        self._skew_tokens_s = weights["decode_skew_tokens"] * kv_scale
        self._pairs_s = weights["prefill_pairs"]
        self._prefill_context_s = weights["prefill_context_tokens"]
        self._prepare_decode(gpu, max_seqs, fp8_kv)
        self._prepare_mixed(gpu, max_seqs, kv_scale)
        self._prepare_prefill(gpu)

    def _prepare_decode(
        self, terms: list[tuple[Mapping[str, Any], float]], max_seqs: int, fp8_kv: bool
    ) -> None:
        """Values and slopes of decode attention by rows (first axis) from each context of the grid on."""
        tables = [(t, c) for t, c in terms if t["kind"] == "decode_attention"]
        self._context_grid: vec[float] = vec[float]()
        self._flat_values: vec[float] = vec[float]()
        self._flat_slopes: vec[float] = vec[float]()
        self._width: i64 = 0
        self._skew: vec[float] = vec[float]([0.0] * (max_seqs + 1))
        if not tables:
            return
        seqs = np.arange(max_seqs + 1, dtype=float)
        grid = np.unique(
            np.concatenate([[0.0], *(np.asarray(t["context_tokens"], float) for t, _ in tables)])
        )
        total, beyond = np.zeros((len(seqs), len(grid))), np.zeros(len(seqs))
        for term, coefficient in tables:
            values = np.asarray(_decode_table(term, fp8_kv), float) * 1e-6 * coefficient
            contexts = np.asarray(term["context_tokens"], float)
            wide = curve_rows(grid, contexts, values.T).T
            total += curve_rows(seqs, np.asarray(term["sequences"], float), wide)
            last = (values[:, -1] - values[:, -2]) / (contexts[-1] - contexts[-2])
            beyond += curve_rows(seqs, np.asarray(term["sequences"], float), last[:, None])[:, 0]
        slopes = np.empty_like(total)
        slopes[:, :-1] = np.diff(total, axis=1) / np.diff(grid)
        slopes[:, -1] = beyond
        self._skew = vec[float](np.mean([by_rows(t["skew"], max_seqs) for t, _ in tables], axis=0).tolist())
        self._grid, self._values, self._slopes = grid, total, slopes
        self._width = len(grid)
        self._context_grid = vec[float](grid.tolist())
        self._flat_values = vec[float](total.ravel().tolist())
        self._flat_slopes = vec[float](slopes.ravel().tolist())

    def _prepare_mixed(
        self, terms: list[tuple[Mapping[str, Any], float]], max_seqs: int, kv_scale: float
    ) -> None:
        self._mixed_seq = self._mixed_tile = self._mixed_token = 0.0
        self._mixed_skew: vec[float] = vec[float]()
        self._has_mixed = False
        for term, coefficient in terms:
            mixed = term.get("mixed")
            if mixed is not None:
                self._has_mixed = True
                self._mixed_seq += coefficient * mixed["seq_us"] * 1e-6
                self._mixed_tile += coefficient * mixed["tile_us"] * 1e-6
                self._mixed_token += coefficient * mixed["token_us"] * 1e-6 * kv_scale
                self._mixed_skew = vec[float](by_rows(mixed["skew"], max_seqs).tolist())

    def _prepare_prefill(self, terms: list[tuple[Mapping[str, Any], float]]) -> None:
        """Prefill attention by chunk (first axis) and prefix; bilinear, continued beyond both grids."""
        tables = [(t, c) for t, c in terms if t["kind"] == "prefill_attention"]
        self._chunk_grid: vec[float] = vec[float]()
        self._prefix_grid: vec[float] = vec[float]()
        self._chunk_rows: vec[float] = vec[float]()
        self._shared = sum(c * t["shared_us"] * 1e-6 for t, c in tables)
        if not tables:
            return
        chunks = np.unique(np.concatenate([np.asarray(t["chunk_tokens"], float) for t, _ in tables]))
        prefixes = np.unique(np.concatenate([np.asarray(t["context_tokens"], float) for t, _ in tables]))
        total = np.zeros((len(chunks), len(prefixes)))
        for term, coefficient in tables:
            values = np.asarray(term["time_us"], float) * 1e-6 * coefficient
            wide = curve_rows(prefixes, np.asarray(term["context_tokens"], float), values.T).T
            total += curve_rows(chunks, np.asarray(term["chunk_tokens"], float), wide)
        self._chunk_grid = vec[float](chunks.tolist())
        self._prefix_grid = vec[float](prefixes.tolist())
        self._chunk_rows = vec[float](total.ravel().tolist())

    def step_s(self, batch: Batch) -> float:
        """Seconds that this step takes (mean, no noise)."""
        seconds = self._seconds(batch)
        if self._leaves_range(batch) and self._beyond_factor != 1.0:
            edge = self._seconds(self._at_edge(batch))
            return edge + (seconds - edge) * self._beyond_factor
        return seconds

    def _seconds(self, batch: Batch) -> float:
        """What the terms say, inside the calibration's range or beyond it."""
        tokens: i64 = batch.tokens
        rows: i64 = batch.decode_seqs
        sampled: i64 = batch.sampled_seqs
        prefills = len(batch.prefills)
        seconds = self._tokens[tokens] + self._sampled[sampled]
        if rows:
            total, longest = float(batch.decode_context_tokens), float(batch.decode_context_max)
            seconds += self._decode[rows] + self._decode_context_s * total
            if self._has_mixed and prefills:
                seconds += self._mixed_decode_s(batch)
            elif self._width:
                mean = total / float(rows)
                level = self._attention_s(rows, mean)
                seconds += level
                if longest > mean:
                    seconds += self._skew[rows] * (self._attention_s(rows, longest) - level)
            if self._skew_tokens_s:
                seconds += self._skew_tokens_s * max(0.0, float(rows) * longest - total)
        if prefills:
            seconds += self._prefill_s(batch.prefills, rows > 0)
        if self._has_host:
            host = self._host_tokens[tokens] + self._host_sampled[sampled] + self._host_decode[rows]
            if prefills:
                host += self._host_mixed + self._host_prefill * prefills
            if host > seconds:
                return host
        return seconds

    def _leaves_range(self, batch: Batch) -> bool:
        """Whether the batch lies outside the calibration's range; counts the keys it leaves."""
        chunk: i64 = 0
        prefix: i64 = 0
        for chunk_tokens, context_tokens in batch.prefills:
            chunk, prefix = max(chunk, chunk_tokens), max(prefix, context_tokens)
        outside = batch.tokens > self._max_tokens or batch.decode_seqs > self._max_rows
        outside = outside or batch.decode_context_max > self._max_context
        if not outside and chunk <= self._max_chunk and prefix <= self._max_prefix:
            return False
        left = set()
        if batch.tokens > self._max_tokens:
            left.add("tokens")
        if batch.decode_seqs > self._max_rows:
            left.add("decode_seqs")
        if batch.decode_context_max > self._max_context:
            left.add("context_tokens")
        if chunk > self._max_chunk:
            left.add(self._chunk_key)
        if prefix > self._max_prefix:
            left.add(self._prefix_key)
        for key in left:
            self._count(key)
        return True

    def _at_edge(self, batch: Batch) -> Batch:
        """The nearest batch inside the calibration's range."""
        rows = min(batch.decode_seqs, self._max_rows)
        gone = batch.decode_seqs - rows
        longest = min(batch.decode_context_max, self._max_context)
        total = min(batch.decode_context_tokens * rows // max(1, batch.decode_seqs), rows * longest)
        prefills = [(min(c, self._max_chunk), min(p, self._max_prefix)) for c, p in batch.prefills]
        dropped = gone + sum(c for c, _ in batch.prefills) - sum(c for c, _ in prefills)
        tokens = min(batch.tokens - dropped, self._max_tokens)
        return Batch(tokens, rows, total, longest, prefills, batch.sampled_seqs - gone)

    def _attention_s(self, rows: i64, context: float) -> float:
        """Seconds of decode attention of `rows` sequences of `context` tokens (piecewise linear)."""
        grid = self._context_grid
        index = _right_of(grid, context, 0, self._width) - 1
        place = rows * self._width + index
        return self._flat_values[place] + self._flat_slopes[place] * (context - grid[index])

    def _mixed_decode_s(self, batch: Batch) -> float:
        """Seconds of decode rows' attention inside a step that also prefills."""
        rows: i64 = batch.decode_seqs
        total = float(batch.decode_context_tokens)
        largest = 0
        for chunk, _ in batch.prefills:
            if chunk > largest:
                largest = chunk
        tiles = -(-largest // 128)
        uneven = max(0.0, float(rows) * float(batch.decode_context_max) - total)
        return float(rows) * (self._mixed_seq + tiles * self._mixed_tile) + self._mixed_token * (
            total + self._mixed_skew[rows] * uneven
        )

    def _prefill_s(self, prefills: Sequence[tuple[int, int]], decoding: bool) -> float:
        """Seconds that a step's prefill chunks add: attention and launches."""
        count = len(prefills)
        seconds = self._mixed + self._prefill_row * count
        for chunk_tokens, context_tokens in prefills:
            chunk, context = float(chunk_tokens), float(context_tokens)
            seconds += self._pairs_s * chunk * (context + 0.5 * chunk) + self._prefill_context_s * context
        if len(self._chunk_grid):
            launches_saved = count - 1 + (decoding and not self._has_mixed)
            seconds -= self._shared * launches_saved
            for chunk_tokens, context_tokens in prefills:
                seconds += self._chunk_s(float(chunk_tokens), float(context_tokens))
        return seconds

    def _chunk_s(self, chunk: float, context: float) -> float:
        """Seconds of attention of one prefill chunk over its prefix (bilinear)."""
        chunks, prefixes, table = self._chunk_grid, self._prefix_grid, self._chunk_rows
        width = len(prefixes)
        i = _right_of(chunks, chunk, 1, len(chunks) - 1) - 1
        j = _right_of(prefixes, context, 1, width - 1) - 1
        v = (context - prefixes[j]) / (prefixes[j + 1] - prefixes[j])
        low = i * width + j
        high = low + width
        left = table[low] + (table[low + 1] - table[low]) * v
        right = table[high] + (table[high + 1] - table[high]) * v
        seconds = left + (right - left) * (chunk - chunks[i]) / (chunks[i + 1] - chunks[i])
        return seconds if seconds > 0.0 else 0.0

    def decode_run_s(
        self, decode_seqs: int, context_tokens: int, context_max: int, steps: int
    ) -> npt.NDArray[np.float64]:
        """Seconds of each of `steps` pure decode steps, shape (steps,); equals `step_s` on each."""
        step = np.arange(steps, dtype=float)
        total, longest = context_tokens + step * decode_seqs, context_max + step
        seconds = self._run_seconds(decode_seqs, total, longest)
        edge_context = float(self._max_context)
        over = int((longest > edge_context).sum())
        for key, times in (
            ("tokens", steps * (decode_seqs > self._max_tokens)),
            ("decode_seqs", steps * (decode_seqs > self._max_rows)),
            ("context_tokens", over),
        ):
            if times:
                self._count(key, times)
        if self._beyond_factor == 1.0 or not (over or decode_seqs > self._max_rows):
            return seconds
        rows = min(decode_seqs, self._max_rows)
        nearer = np.minimum(longest, edge_context)
        edge = self._run_seconds(rows, np.minimum(total * rows // decode_seqs, rows * nearer), nearer)
        widened: FloatArray = edge + (seconds - edge) * self._beyond_factor
        return widened

    def _run_seconds(self, rows: int, total: FloatArray, longest: FloatArray) -> FloatArray:
        """Seconds of decode steps of `rows` sequences with these sums and maxima of contexts."""
        fixed = self._tokens[rows] + self._sampled[rows] + self._decode[rows]
        seconds: FloatArray = fixed + self._decode_context_s * total
        if self._width:
            mean = total / rows
            level = self._attention(rows, mean)
            excess = np.where(longest > mean, self._attention(rows, longest) - level, 0.0)
            seconds = seconds + level + self._skew[rows] * excess
        if self._skew_tokens_s:
            seconds = seconds + self._skew_tokens_s * np.maximum(0.0, rows * longest - total)
        if self._has_host:
            by_rows = self._host_sampled[rows] + self._host_decode[rows]
            seconds = np.maximum(seconds, self._host_tokens[rows] + by_rows)
        return seconds

    def _attention(self, rows: int, contexts: FloatArray) -> FloatArray:
        """Seconds of decode attention of `rows` sequences at each of `contexts`."""
        index = np.searchsorted(self._grid, contexts, side="right") - 1
        result: FloatArray = self._values[rows][index] + self._slopes[rows][index] * (
            contexts - self._grid[index]
        )
        return result

    def _count(self, key: str, times: int = 1) -> None:
        self.beyond[key] = self.beyond.get(key, 0) + times


class SharedStepTime(PreparedStepTime):
    """The step time of another expert that is equal to one at hand, which draws the same coefficients.

    It shares the tables, a megabyte that then stays in the processor's caches, and has a `beyond` of its own.
    """

    __slots__ = ()

    def __init__(self, other: PreparedStepTime) -> None:
        for name in _STATE:
            if hasattr(other, name):
                setattr(self, name, getattr(other, name))
        self.beyond = {}


def _right_of(grid: vec[float], x: float, low: i64, high: i64) -> i64:
    """`bisect.bisect_right(grid, x, low, high)`."""
    while low < high:
        middle = (low + high) >> 1
        if x < grid[middle]:
            high = middle
        else:
            low = middle + 1
    return low


def _decode_table(term: Mapping[str, Any], fp8_kv: bool) -> Any:
    """The table for the KV cache's width; where fp8 was not measured, contexts cost FP8_KV_SCALE as much."""
    if not fp8_kv:
        return term["time_us"]
    if term.get("fp8_time_us") is not None:
        return np.asarray(term["fp8_time_us"], float) * term.get("fp8_scale", 1.0)
    table = np.asarray(term["time_us"], float)
    return table[:, :1] + (table - table[:, :1]) * FP8_KV_SCALE


def _curves(
    terms: list[tuple[Mapping[str, Any], float]],
    max_tokens: int,
    max_seqs: int,
    graphs: Sequence[int],
) -> tuple[vec[float], vec[float], vec[float], float, float]:
    """Fold all terms that depend on one integer into rows of numbers.

    Returns seconds by tokens (with everything constant), by sampled rows, by decode rows, per mixed
    step and per prefill row.
    """
    tokens, seqs = np.arange(max_tokens + 1, dtype=float), np.arange(max_seqs + 1, dtype=float)
    padded = padded_tokens(max_tokens, graphs)
    by_tokens, by_sampled, by_decode = np.zeros(len(tokens)), np.zeros(len(seqs)), np.zeros(len(seqs))
    scalar = dict.fromkeys(SCALAR_FEATURES, 0.0)
    for term, coefficient in terms:
        kind, feature = term["kind"], term.get("feature")
        if kind == "tokens":
            x = padded if term.get("padded") else tokens
            by_tokens += coefficient * 1e-6 * curve(x, term["tokens"], term["time_us"])
        elif kind == "sampled":
            worth = coefficient * 1e-6 * curve(seqs, term["sequences"], term["time_us"])
            worth[0] = 0.0
            by_sampled += worth
        elif feature in scalar:
            scalar[feature] += coefficient
        elif feature in ("tokens", "padded_tokens"):
            x = padded if feature == "padded_tokens" else tokens
            by_tokens += coefficient * segment(x, term.get("low"), term.get("high"))
        elif feature in ("sampled_seqs", "decode_seqs"):
            target = by_sampled if feature == "sampled_seqs" else by_decode
            target += coefficient * segment(seqs, term.get("low"), term.get("high"))
    by_tokens += scalar["step"]
    return (
        vec[float](by_tokens.tolist()),
        vec[float](by_sampled.tolist()),
        vec[float](by_decode.tolist()),
        scalar["mixed_step"],
        scalar["prefill_rows"],
    )
