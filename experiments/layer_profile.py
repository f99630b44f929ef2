"""Reads layer-wise profiles of a vLLM model and adds them up to a calibration (source ``profile``).

A profile folder (LLMServingSim's layout, microseconds of one layer) holds ``dense.csv``,
``per_sequence.csv``, ``attention.csv`` and ``skew_fit.csv`` per TP degree. Attention of steps that mix
prefill and decode was profiled as such: what decode rows add is fitted to rows, tiles and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml
from scipy.optimize import nnls

from ersim.errors import DataError
from ersim.steptime.specs import GpuSpec, ModelSpec
from ersim.steptime.terms import curve
from experiments.op_tables import curve_term, us

FloatArray = npt.NDArray[np.float64]
ONCE_PER_STEP = ("embedding", "final_layernorm")
TWICE_PER_LAYER = ("layernorm",)
EXTENSION = 8  # profiles end at 2,048 tokens; servers with more memory run up to 16,384 a step


class LayerProfile:
    """One profile folder at one TP degree."""

    def __init__(self, folder: Path, tp: int) -> None:
        self.folder, self.tp = folder / f"tp{tp}", tp
        if not self.folder.is_dir():
            raise DataError(f"{self.folder} is missing; give a profile folder with tp{tp}/ in data=<folder>")
        self.meta: dict[str, Any] = yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))

    def _read(self, name: str, columns: tuple[str, ...]) -> pd.DataFrame:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing from the profile")
        frame = pd.read_csv(path)
        for column in columns:
            if column not in frame:
                raise DataError(f"{path}: column {column} is missing, found {', '.join(frame.columns)}")
        return frame

    def dense_s(self, layers: int) -> tuple[FloatArray, FloatArray]:
        """Token counts and seconds of everything that runs on the step's tokens, all layers."""
        frame = self._read("dense.csv", ("layer", "tokens", "time_us"))
        table = frame.pivot_table(index="tokens", columns="layer", values="time_us")
        total = np.zeros(len(table))
        for layer in table.columns:
            times = 2 if layer in TWICE_PER_LAYER else 1
            kernels = times * (1 if layer in ONCE_PER_STEP else layers)
            total += table[layer].to_numpy() * kernels
        return table.index.to_numpy(float), total * 1e-6

    def per_sequence_s(self) -> tuple[FloatArray, FloatArray]:
        """Sampled rows and seconds of LM head and sampler."""
        frame = self._read("per_sequence.csv", ("layer", "sequences", "time_us"))
        total = frame.groupby("sequences").time_us.sum()
        return total.index.to_numpy(float), total.to_numpy() * 1e-6

    def attention(self) -> pd.DataFrame:
        """One layer's attention by prefill_chunk, kv_prefill, n_decode, kv_decode (time_us)."""
        columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
        return self._read("attention.csv", columns)

    def skew(self, kv_heads: int, multiprocessors: int, mixed: bool) -> dict[str, list[float]]:
        """Alpha of uneven decode contexts by decode rows: {sequences, share}.

        Of batches in which few rows are long (at most 15 %), as servers have them; weighted by samples.
        mixed: of steps that also prefill, without a prefix. See `unsplit_rows` for the jump.
        """
        frame = self._read(
            "skew_fit.csv", ("pc", "n_label", "skew_rate_label", "kp_label", "alpha", "n_samples")
        )
        frame = frame[frame.skew_rate_label.isin(["sr<=5%", "sr<=15%"]) & (frame.kp_label == "kp=0")]
        frame = frame[(frame.pc > 0) if mixed else (frame.pc == 0)]
        rows = frame.n_label.str.removeprefix("n<=").astype(int)
        weighted = (frame.alpha * frame.n_samples).groupby(rows).sum() / frame.n_samples.groupby(rows).sum()
        share = {int(n): max(0.0, float(value)) for n, value in weighted.items()}
        return curve_of(share, None if mixed else unsplit_rows(kv_heads, multiprocessors))


def unsplit_rows(kv_heads: int, multiprocessors: int) -> int:
    """Decode rows from which FlashAttention 2 no longer splits contexts among blocks.

    Its heuristic splits while rows x KV heads stay below 0.8 of two blocks per multiprocessor
    (num_splits_heuristic in csrc/flash_attn/flash_api.cpp of flash-attention 2). A block then walks
    a whole context, and the longest one finishes last. Rows are padded to CUDA-graph sizes, by 8.
    """
    captured = 8 * math.ceil(0.8 * 2 * multiprocessors / kv_heads / 8)
    return captured - 7


def curve_of(share: Mapping[int, float], jump: int | None) -> dict[str, list[float]]:
    """Points of a curve through `share`, with a jump at `jump` rows.

    On the near side of the jump the last value goes on. From it to the next profiled number the longest
    row costs the same time, so a share of a difference that grows with the rows falls with them.
    """
    points = {float(rows): value for rows, value in share.items()}
    before, after = [n for n in share if jump and n < jump], [n for n in share if jump and n >= jump]
    if jump and before and after:
        first = min(after)
        points[jump - 1.0] = share[max(before)]
        points |= {float(rows): share[first] * first / rows for rows in {jump, (jump + first) // 2}}
    grid = sorted(points)
    return {"sequences": grid, "share": [round(points[rows], 4) for rows in grid]}


def fit_mixed(attention: pd.DataFrame) -> tuple[dict[str, float], float]:
    """What decode rows add to a prefill step: seq_us, tile_us, token_us of one layer; and its error.

    Non-negative least squares on relative error over the profiled mixed batches that servers run (8 to
    128 rows of 128 to 4,096 tokens) whose prefill alone was profiled too. The error is the mean
    absolute one as a share of the batch's attention.
    """
    alone = attention[attention.n_decode == 0].set_index(["prefill_chunk", "kv_prefill"]).time_us
    mixed = attention[(attention.prefill_chunk > 0) & (attention.n_decode > 0)]
    mixed = mixed[mixed.kv_decode.between(128, 4096) & (mixed.kv_prefill <= 4096)]
    mixed = mixed[mixed.n_decode.between(8, 128)]
    keys = list(zip(mixed.prefill_chunk, mixed.kv_prefill, strict=True))
    base = np.asarray([alone.get(key, np.nan) for key in keys])
    mixed, base = mixed[~np.isnan(base)], base[~np.isnan(base)]
    rows, total = mixed.n_decode.to_numpy(float), mixed.time_us.to_numpy(float)
    tiles = np.ceil(mixed.prefill_chunk.to_numpy(float) / 128)
    matrix = np.stack([rows, rows * tiles, rows * mixed.kv_decode.to_numpy(float)], axis=1)
    theta, _ = nnls(matrix / total[:, None], (total - base) / total)
    error = float(np.mean(np.abs(matrix @ theta - (total - base)) / total))
    return dict(zip(("seq_us", "tile_us", "token_us"), theta.tolist(), strict=True)), error


def _grid(frame: pd.DataFrame, rows: str, columns: str) -> tuple[list[int], list[int], FloatArray]:
    """A complete table of time_us: missing cells are interpolated along the context."""
    table = frame.pivot_table(index=rows, columns=columns, values="time_us").sort_index().sort_index(axis=1)
    contexts = table.columns.to_numpy(float)
    filled = []
    for _, row in table.iterrows():
        known = row.notna().to_numpy()
        filled.append(np.interp(contexts, contexts[known], row.to_numpy(float)[known]))
    return [int(x) for x in table.index], [int(x) for x in contexts], np.asarray(filled)


def _thin(tokens: FloatArray, seconds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Drop points that linear interpolation between their neighbours reproduces within 0.3 %."""
    keep = [0]
    for index in range(1, len(tokens) - 1):
        start, stop = keep[-1], index + 1
        inner = slice(start + 1, stop)
        guess = np.interp(tokens[inner], tokens[[start, stop]], seconds[[start, stop]])
        if np.max(np.abs(guess / seconds[inner] - 1)) > 0.003:
            keep.append(index)
    keep.append(len(tokens) - 1)
    return tokens[keep], seconds[keep]


def _extended(tokens: FloatArray, seconds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The curve with one point more, at EXTENSION times the last count: the slope of its second half goes on.

    The last segment alone is a tile's flat top, whose slope would let longer steps beat the peak.
    """
    half = int(np.searchsorted(tokens, tokens[-1] / 2))
    slope = (seconds[-1] - seconds[half]) / (tokens[-1] - tokens[half])
    far = EXTENSION * tokens[-1]
    return np.append(tokens, far), np.append(seconds, seconds[-1] + slope * (far - tokens[-1]))


def _longer_contexts(
    rows: list[int], contexts: list[int], times: FloatArray, kv_us: float
) -> tuple[list[int], FloatArray]:
    """The decode table (rows x contexts, us) with one context more, at EXTENSION times the longest.

    The last slope goes on, but no faster than the KV cache can be read: kv_us a token, and 5 % above that,
    since coefficients below one are put on it.
    """
    slope = (times[:, -1] - times[:, -2]) / (contexts[-1] - contexts[-2])
    least = 1.05 * kv_us * np.asarray(rows, dtype=float)
    far = EXTENSION * contexts[-1]
    added = times[:, -1] + np.maximum(slope, least) * (far - contexts[-1])
    return [*contexts, far], np.column_stack([times, added])


def _longer_chunks(rows: list[int], contexts: list[int], times: FloatArray) -> tuple[list[int], FloatArray]:
    """The prefill table (rows x contexts, us) with chunks beyond the profiled ones.

    A longer chunk does the work of the longest profiled one several times, each behind the last; the
    launches in between are saved.
    """
    longest, launch = rows[-1], float(times[0, 0])
    at = np.asarray(contexts, dtype=float)
    added = []
    for parts in (2, 4, EXTENSION):
        each = [curve(at + part * longest, at, times[-1]) for part in range(parts)]
        added.append(np.sum(each, axis=0) - (parts - 1) * launch)
    return [*rows, *(parts * longest for parts in (2, 4, EXTENSION))], np.vstack([times, *added])


def gpu_terms(profile: LayerProfile, model: ModelSpec, gpu: GpuSpec) -> list[dict[str, Any]]:
    """All GPU terms of a calibration from a profile, each still to be multiplied by its coefficient."""
    layers, kv_heads = model.num_layers, model.kv_heads_per_gpu(profile.tp)
    attention = profile.attention()
    terms = [curve_term("linear maps", *_extended(*_thin(*profile.dense_s(layers))))]
    if profile.tp > 1:
        terms.append(_all_reduce(model, gpu, profile.tp))
    sequences, head = profile.per_sequence_s()
    sampled = {"sequences": sequences.astype(int).tolist(), "time_us": us(head)}
    terms.append({"kind": "sampled", "side": "gpu", "label": "LM head and sampler", **sampled})
    decode = attention[(attention.prefill_chunk == 0) & (attention.n_decode > 0)]
    rows, contexts, times = _grid(decode, "n_decode", "kv_decode")
    kv_us = 1e6 * model.kv_bytes_per_token(profile.tp) / layers / gpu.bandwidth_bytes_s
    contexts, times = _longer_contexts(rows, contexts, times, kv_us)
    mixed, _ = fit_mixed(attention)
    scaled = {name: float(f"{value * layers:.4g}") for name, value in mixed.items()}
    terms.append(
        {
            "kind": "decode_attention",
            "side": "gpu",
            "label": "decode attention",
            "sequences": rows,
            "context_tokens": contexts,
            "time_us": [us(row) for row in layers * times * 1e-6],
            "skew": profile.skew(kv_heads, gpu.multiprocessors, mixed=False),
            "mixed": {**scaled, "skew": profile.skew(kv_heads, gpu.multiprocessors, mixed=True)},
        }
    )
    prefill = attention[(attention.n_decode == 0) & (attention.prefill_chunk > 0)]
    rows, contexts, times = _grid(prefill, "prefill_chunk", "kv_prefill")
    rows, times = _longer_chunks(rows, contexts, times)
    terms.append(
        {
            "kind": "prefill_attention",
            "side": "gpu",
            "label": "prefill attention",
            "chunk_tokens": rows,
            "context_tokens": contexts,
            "time_us": [us(row) for row in layers * times * 1e-6],
            "shared_us": us(np.asarray([layers * times[0, 0] * 1e-6]))[0],
        }
    )
    return terms


def _all_reduce(model: ModelSpec, gpu: GpuSpec, tp: int) -> dict[str, Any]:
    """Two all-reduces a layer over the GPU's link by datasheet: profiles hold none."""
    tokens = np.asarray((1, 16, 64, 256, 512, 1024, 2048, 4096, 8192), dtype=float)
    moved = tokens * model.hidden_size * 2 * 2 * (tp - 1) / tp
    seconds = 2 * model.num_layers * (gpu.all_reduce_latency_s(tp) + moved / (0.7 * gpu.link_bytes_s))
    return curve_term("all-reduce", tokens, seconds)
