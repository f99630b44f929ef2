"""Reads published per-operator tables and adds them up to calibrations (source ``tables``).

The tables hold one latency per operator and shape (AIConfigurator-core's layout, milliseconds). A
dense Llama step is layers x (norms, qkv, rotary, attention, output projection, gate and up, activation,
down, two all-reduces) plus LM head, sampler and host time. What no table holds (small operators,
host time, attention over a prefix) is physics with constants named here and in `experiments.overheads`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ersim.errors import DataError
from ersim.steptime.specs import GpuSpec, ModelSpec, load_gpu
from ersim.steptime.terms import MIXED_FIELDS

FloatArray = npt.NDArray[np.float64]
TABLES = {  # file stem and vLLM version of each GPU's tables
    "a100-80gb": ("a100_sxm", "0.14.0"),
    "h100-80gb": ("h100_sxm", "0.24.0"),
    "h200-141gb": ("h200_sxm", "0.24.0"),
}
# The A100's weight-only kernels reach the bandwidth that vLLM's Marlin does. TensorRT-LLM's on H200 are
# up to 1.9 times slower than bf16 on small shapes, which vLLM's Machete and Marlin are not: not used.
A100_WEIGHT_ONLY = "gemm_a100_sxm_TRTLLM1.0.0_weightonly_proxy.csv"
SEQUENCE_GRID = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
DECODE_SEQS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DECODE_CONTEXTS = (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
CHUNK_GRID = (1, 16, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
PREFIX_GRID = (0, 1024, 4096, 16384, 65536, 131072)


def layer_shapes(model: ModelSpec, tp: int) -> list[tuple[str, int, int]]:
    """(name, output features, input features) of one layer's linear maps on each GPU."""
    heads_out = model.num_heads * model.head_dim // tp
    kv_out = 2 * model.kv_heads_per_gpu(tp) * model.head_dim
    inner = model.intermediate_size // tp
    return [
        ("qkv", heads_out + kv_out, model.hidden_size),
        ("o_proj", model.hidden_size, heads_out),
        ("gate_up", 2 * inner, model.hidden_size),
        ("down", model.hidden_size, inner),
    ]


class GemmTable:
    """Seconds of one linear map by tokens, output and input features; linear interpolation on all axes."""

    def __init__(self, frame: pd.DataFrame, dtype: str) -> None:
        rows = frame[frame.dtype == dtype]
        self.available = len(rows) > 0
        curves = rows.groupby(["n", "k", "m"]).latency_ms.mean()
        self._curves: dict[tuple[int, int], tuple[FloatArray, FloatArray]] = {}
        for (n, k), part in curves.groupby(level=[0, 1]):
            self._curves[int(n), int(k)] = (
                part.index.get_level_values(2).to_numpy(float),
                part.to_numpy() * 1e-3,
            )
        self._n = sorted({n for n, _ in self._curves})
        self._k = sorted({k for _, k in self._curves})

    def seconds(self, tokens: FloatArray, n: int, k: int) -> FloatArray:
        """Seconds for each token count, shape (len(tokens),)."""
        total = np.zeros(len(tokens))
        for n_at, n_weight in _neighbours(self._n, n):
            for k_at, k_weight in _neighbours(self._k, k):
                if (n_at, k_at) not in self._curves:
                    raise DataError(f"gemm table has no shape n={n_at}, k={k_at}, needed for n={n}, k={k}")
                total += n_weight * k_weight * _curve(tokens, *self._curves[n_at, k_at])
        return total


def _neighbours(grid: list[int], value: int) -> list[tuple[int, float]]:
    """Grid points around `value` with linear weights; beyond the grid its last two points."""
    if value in grid:
        return [(value, 1.0)]
    high = min(max(int(np.searchsorted(grid, value)), 1), len(grid) - 1)
    low_at, high_at = grid[high - 1], grid[high]
    share = (value - low_at) / (high_at - low_at)
    return [(low_at, 1 - share), (high_at, share)]


def _curve(x: FloatArray, grid: FloatArray, values: FloatArray) -> FloatArray:
    """Linear interpolation, continued along the last segment above the grid."""
    result = np.interp(x, grid, values)
    slope = (values[-1] - values[-2]) / (grid[-1] - grid[-2])
    return np.where(x > grid[-1], values[-1] + slope * (x - grid[-1]), result)


class OpTables:
    """All tables of one GPU, read when asked for. Seconds out."""

    def __init__(self, folder: Path, gpu: GpuSpec) -> None:
        if gpu.name not in TABLES:
            raise DataError(
                f"no operator tables are known for {gpu.name}; there are tables for {', '.join(TABLES)}"
            )
        self.folder, self.gpu = folder, gpu
        self.stem, self.vllm_version = TABLES[gpu.name]

    def _read(self, name: str) -> pd.DataFrame:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; give the folder of operator tables with data=<folder>")
        return pd.read_csv(path)

    @cached_property
    def _gemm_frame(self) -> pd.DataFrame:
        return self._read(f"gemm_{self.stem}_vllm{self.vllm_version}.csv")

    @cached_property
    def token_grid(self) -> FloatArray:
        """Token counts that the linear maps were measured at, up to 16,384."""
        grid = np.sort(self._gemm_frame.m.unique())
        return np.asarray(grid[grid <= 16384], dtype=float)

    @cached_property
    def bf16(self) -> GemmTable:
        """bf16 linear maps, vLLM."""
        return GemmTable(self._gemm_frame, "bfloat16")

    @cached_property
    def fp8(self) -> GemmTable:
        """fp8 W8A8 linear maps, vLLM, activation quantisation not included."""
        return GemmTable(self._gemm_frame, "fp8")

    @cached_property
    def int4(self) -> GemmTable:
        """Weight-only int4 linear maps of the A100 (TensorRT-LLM as proxy)."""
        return GemmTable(self._read(A100_WEIGHT_ONLY), "int4_wo")

    @cached_property
    def int8_weight_only(self) -> GemmTable:
        """Weight-only int8 linear maps of the A100 (TensorRT-LLM as proxy)."""
        return GemmTable(self._read(A100_WEIGHT_ONLY), "int8_wo")

    @cached_property
    def ampere(self) -> OpTables:
        """The A100's tables beside these, for precisions that are carried over from there."""
        return OpTables(self.folder, load_gpu("a100-80gb"))

    def all_reduce_s(self, tp: int, elements: FloatArray) -> FloatArray:
        """Seconds of one all-reduce of `elements` 16-bit numbers among `tp` GPUs: the faster kernel."""
        frame = self._read(f"allreduce_{self.stem}.csv")
        best = np.full(len(elements), np.inf)
        for kernel in ("vLLM_custom_graph", "NCCL"):
            rows = frame[(frame.kernel_source == kernel) & (frame.num_gpus == tp)].sort_values("message_size")
            size, time = rows.message_size.to_numpy(float), rows.latency_ms.to_numpy() * 1e-3
            best = np.minimum(best, _curve(elements, size, time))
        return best

    def decode_attention_s(self, heads: int, kv_heads: int, kv_dtype: str = "bfloat16") -> FloatArray | None:
        """Seconds of one layer's decode attention, shape (DECODE_SEQS, DECODE_CONTEXTS), or None.

        None when `kv_dtype` was not measured. Cells beyond the measured ones continue
        the slope of the last two.
        """
        frame = self._read(f"generation_attention_{self.stem}_vllm{self.vllm_version}.csv")
        chosen = (frame.kv_cache_dtype == kv_dtype) & (frame.num_heads == heads)
        frame = frame[chosen & (frame.num_key_value_heads == kv_heads)]
        if frame.empty and kv_dtype != "bfloat16":
            return None
        if frame.empty:
            raise DataError(f"decode attention has no rows for {heads} heads and {kv_heads} KV heads")
        table = frame.pivot_table(index="batch_size", columns="kv_len", values="latency_ms") * 1e-3
        contexts = np.asarray(DECODE_CONTEXTS, dtype=float)
        rows = []
        for seqs in DECODE_SEQS:
            row = table.loc[seqs].dropna()
            rows.append(_curve(contexts, row.index.to_numpy(float), row.to_numpy()))
        return np.maximum.accumulate(np.asarray(rows), axis=1)

    def prefill_attention_s(self, heads: int, kv_heads: int) -> tuple[FloatArray, float]:
        """Seconds of one layer's prefill attention, shape (CHUNK_GRID, PREFIX_GRID), and its launch floor.

        Only prefix 0 is measured. A prefix of p tokens adds p x chunk x (seconds per query-key pair of
        the longest prompts), divided by the share of multiprocessors that the chunk's 128-row tiles
        keep busy (not below 0.6, as vLLM splits keys then), and at least one tile's walk over it.
        """
        frame = self._read(f"context_attention_{self.stem}_vllm{self.vllm_version}.csv")
        chosen = (frame.kv_cache_dtype == "bfloat16") & (frame.num_heads == heads) & (frame.step == 0)
        frame = frame[chosen & (frame.num_key_value_heads == kv_heads) & (frame.batch_size == 1)]
        if frame.empty:
            raise DataError(f"prefill attention has no rows for {heads} heads and {kv_heads} KV heads")
        row = (frame.groupby("isl").latency_ms.mean() * 1e-3).sort_index()
        lengths, times = row.index.to_numpy(float), row.to_numpy()
        chunks, prefixes = np.asarray(CHUNK_GRID, float), np.asarray(PREFIX_GRID, float)
        pair_s = (times[-1] - times[-4]) / (0.5 * (lengths[-1] ** 2 - lengths[-4] ** 2))
        tiles = np.ceil(chunks / 128) * heads
        units = self.gpu.multiprocessors
        busy = np.maximum(0.6, tiles / (np.ceil(tiles / units) * units))
        walk_s = 1.2e-8  # one tile's walk per key: 10 ns (A100, Vidur's table) to 15 ns measured
        per_key = np.maximum(chunks * pair_s / busy, walk_s)
        base = np.interp(chunks, lengths, times)
        return base[:, None] + per_key[:, None] * prefixes[None, :], float(times[0])


# Shortest kernel in a CUDA graph: the smallest linear maps of these tables, 2.37 us (H200) to 2.45 (A100).
KERNEL_S = 2.4e-6
SAMPLER_S = 4.0e-5  # sampler kernels of one row: 25 to 40 us in the layer profiles
# Share of the way from mean to longest context that uneven decode contexts cost. Hopper's FlashAttention 3
# splits long rows; a guess. FlashAttention 2 is the RTX 4090's layer profile (few long rows among 8 to 256,
# `experiments.layer_profile`), by how many rows' KV heads there are for each slot of two blocks per
# multiprocessor: below 0.8 contexts are split, at 1 the longest row is all that remains.
FLASH_ATTENTION_3_SKEW = 0.03
FLASH_ATTENTION_2_SKEW = {
    0.25: 0.05,
    0.5: 0.04,
    0.78: 0.04,
    0.8: 0.186,
    1.0: 0.149,
    2.0: 0.078,
    4.0: 0.03,
    8.0: 0.005,
}
FLASH_ATTENTION_2_MIXED_SKEW = {0.25: 0.43, 0.5: 0.22, 1.0: 0.13, 2.0: 0.096, 4.0: 0.014}


def flash_attention_2_skew(
    gpu: GpuSpec, kv_heads: int, by_fill: Mapping[float, float]
) -> dict[str, list[float]]:
    """A skew by decode rows, {sequences, share}, from one by rows x KV heads / (2 x multiprocessors)."""
    rows = [fill * 2 * gpu.multiprocessors / kv_heads for fill in by_fill]
    return {"sequences": [round(value, 1) for value in rows], "share": list(by_fill.values())}


def small_operators_s(
    model: ModelSpec, gpu: GpuSpec, precision: str, tp: int, tokens: FloatArray
) -> FloatArray:
    """Seconds of all layers' norms, rotary embedding, cache write, activation and input quantisation.

    Each is a kernel of at least KERNEL_S that moves its bytes at 80 % of the bandwidth. vLLM compiles
    the quantisation of fp8 and int8 inputs into the norms and the activation (all but the output
    projection's), and with tp > 1 the norms into the all-reduce, which then cost their bytes alone.
    """
    hidden, inner = model.hidden_size, model.intermediate_size / tp
    heads = model.num_heads * model.head_dim / tp
    kv = 2 * model.kv_heads_per_gpu(tp) * model.head_dim
    kernels = [2 * (heads + kv) * 2, 2 * kv * 2, 3 * inner * 2]
    if precision in ("fp8", "int8"):
        kernels.append(3 * heads)
    norms = [4 * hidden * 2] * 2
    rate = 0.8 * gpu.bandwidth_bytes_s
    total = np.asarray(sum(np.maximum(KERNEL_S, size * tokens / rate + 0.5 * KERNEL_S) for size in kernels))
    shortest = KERNEL_S if tp == 1 else 0.0
    total = total + sum(np.maximum(shortest, size * tokens / rate + 0.5 * shortest) for size in norms)
    return np.asarray(model.num_layers * total, dtype=float)


def linear_maps_s(
    tables: OpTables, model: ModelSpec, precision: str, tp: int, tokens: FloatArray
) -> FloatArray:
    """Seconds of all layers' linear maps; what vLLM's tables lack is derived as the functions below say."""
    kernel = {"bf16": _bf16_s, "fp8": _fp8_s, "int8": _int8_s, "int4": _int4_s}[precision]
    total = sum(kernel(tables, tokens, n, k) for _, n, k in layer_shapes(model, tp))
    return np.asarray(model.num_layers * total, dtype=float)


def derivation(gpu: str, precision: str) -> str | None:
    """How a precision that vLLM's tables do not hold for this GPU is derived; None when it is measured."""
    if precision == "bf16" or (precision == "fp8" and gpu != "a100-80gb"):
        return None
    ampere = gpu == "a100-80gb"
    return {
        "fp8": "weight-only int8 of TensorRT-LLM as a proxy for fp8 Marlin (A100 has no fp8 cores)",
        "int8": "weight-only int8 of TensorRT-LLM while weights bind, bf16 / 1.75 while arithmetic binds"
        if ampere
        else "fp8 W8A8, which has the same bytes and peak rate",
        "int4": "weight-only int4 of TensorRT-LLM as a proxy for Marlin"
        if ampere
        else "bf16 times A100's ratio of int4 to bf16 at the same share of the GPU's balance point",
    }[precision]


def _bf16_s(tables: OpTables, tokens: FloatArray, n: int, k: int) -> FloatArray:
    return tables.bf16.seconds(tokens, n, k)


def _fp8_s(tables: OpTables, tokens: FloatArray, n: int, k: int) -> FloatArray:
    if tables.fp8.available:
        return tables.fp8.seconds(tokens, n, k)
    return _weight_only_s(tables, tables.int8_weight_only, tokens, n, k)


def _int8_s(tables: OpTables, tokens: FloatArray, n: int, k: int) -> FloatArray:
    if tables.fp8.available:
        return tables.fp8.seconds(tokens, n, k)
    few = np.asarray([1.0, 4.0, 16.0])
    loading = float(np.min(_weight_only_s(tables, tables.int8_weight_only, few, n, k)))
    return np.maximum(loading, tables.bf16.seconds(tokens, n, k) / 1.75)


def _int4_s(tables: OpTables, tokens: FloatArray, n: int, k: int) -> FloatArray:
    if tables.gpu.name == "a100-80gb":
        return _weight_only_s(tables, tables.int4, tokens, n, k)
    ampere = tables.ampere
    balance = tables.gpu.flops["bf16"] / tables.gpu.bandwidth_bytes_s
    scaled = np.maximum(tokens * (ampere.gpu.flops["bf16"] / ampere.gpu.bandwidth_bytes_s) / balance, 1.0)
    ratio = _int4_s(ampere, scaled, n, k) / ampere.bf16.seconds(scaled, n, k)
    return ratio * tables.bf16.seconds(tokens, n, k)


def _weight_only_s(tables: OpTables, proxy: GemmTable, tokens: FloatArray, n: int, k: int) -> FloatArray:
    """The proxy's seconds, at most 1.15 times bf16's: vLLM's Marlin kernels dequantise in registers."""
    return np.minimum(proxy.seconds(tokens, n, k), 1.15 * tables.bf16.seconds(tokens, n, k))


def lm_head_s(tables: OpTables, model: ModelSpec, tp: int, sequences: FloatArray) -> FloatArray:
    """Seconds of LM head (bf16 in all precisions), logit gathering and sampler by sampled rows.

    Sampler: SAMPLER_S plus bf16 logits read and fp32 ones written and read twice.
    """
    vocab = model.vocab_size
    head = tables.bf16.seconds(sequences, vocab // tp, model.hidden_size)
    sampler = SAMPLER_S + sequences * vocab * 18.0 / (0.8 * tables.gpu.bandwidth_bytes_s)
    if tp == 1:
        return head + sampler
    moved = sequences * vocab * 2.0 * (tp - 1) / tp
    return head + sampler + 2e-5 + moved / (0.6 * tables.gpu.link_bytes_s)


def gpu_terms(tables: OpTables, model: ModelSpec, precision: str, tp: int) -> list[dict[str, Any]]:
    """All GPU terms of a calibration, each still to be multiplied by its coefficient."""
    tokens, seqs = tables.token_grid, np.asarray(SEQUENCE_GRID, float)
    heads, kv_heads, layers = model.num_heads // tp, model.kv_heads_per_gpu(tp), model.num_layers
    small = small_operators_s(model, tables.gpu, precision, tp, tokens)
    weights, arithmetic = split_linear(tokens, linear_maps_s(tables, model, precision, tp, tokens))
    terms = [
        curve_term("weights", tokens[[0, -1]], weights[[0, -1]]),
        curve_term("arithmetic", tokens, arithmetic),
        curve_term("small operators", tokens, small),
    ]
    if tp > 1:
        reduce = 2 * layers * tables.all_reduce_s(tp, tokens * model.hidden_size)
        terms.append(curve_term("all-reduce", tokens, reduce))
    head = us(lm_head_s(tables, model, tp, seqs))
    label = "LM head and sampler"
    terms.append(
        {"kind": "sampled", "side": "gpu", "label": label, "sequences": list(SEQUENCE_GRID), "time_us": head}
    )
    terms.append(_decode_term(tables, heads, kv_heads, layers))
    prefill, floor = tables.prefill_attention_s(heads, kv_heads)
    terms.append(
        {
            "kind": "prefill_attention",
            "side": "gpu",
            "label": "prefill attention",
            "chunk_tokens": list(CHUNK_GRID),
            "context_tokens": list(PREFIX_GRID),
            "time_us": [us(row) for row in layers * prefill],
            "shared_us": us(np.asarray([layers * floor]))[0],
        }
    )
    return terms


def split_linear(tokens: FloatArray, seconds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Linear maps' seconds as the part that loading weights costs any batch and the part that grows.

    The first is the median up to 16 tokens. They are apart because real servers deviate from the tables
    differently: sustained load lowers clocks, which slows arithmetic and leaves bandwidth alone.
    """
    loading = np.full(len(tokens), float(np.median(seconds[tokens <= 16])))
    return loading, np.maximum(seconds - loading, 0.0)


def _decode_term(tables: OpTables, heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
    table = tables.decode_attention_s(heads, kv_heads)
    narrow = tables.decode_attention_s(heads, kv_heads, "fp8")
    assert table is not None  # only fp8 may be missing
    term: dict[str, Any] = {
        "kind": "decode_attention",
        "side": "gpu",
        "label": "decode attention",
        "sequences": list(DECODE_SEQS),
        "context_tokens": list(DECODE_CONTEXTS),
        "time_us": [us(row) for row in layers * table],
        "skew": FLASH_ATTENTION_3_SKEW,
    }
    if narrow is not None:
        term["fp8_time_us"] = [us(row) for row in layers * narrow]
    if tables.gpu.is_a100:
        term["skew"] = flash_attention_2_skew(tables.gpu, kv_heads, FLASH_ATTENTION_2_SKEW)
        term["mixed"] = _flash_attention_2_mixed(tables.gpu, heads, kv_heads, layers)
    return term


def _flash_attention_2_mixed(gpu: GpuSpec, heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
    """Decode rows inside a prefill step under FlashAttention 2, from the RTX 4090 layer profile.

    There (32 heads, 8 KV heads, 128 multiprocessors at 2.5 GHz) a row costs 1.04 us, 0.19 us for each
    128 tokens of the chunk and 8.8 ns per token of context, which is 46 % of its bandwidth.
    """
    slower = (128 * 2.52) / (108 * 1.41) * heads / 32
    token_s = 2 * kv_heads * 128 * 2 / (0.46 * gpu.bandwidth_bytes_s)
    values = [1.04 * slower * layers, 0.19 * slower * layers, token_s * 1e6 * layers]
    scaled = {name: float(f"{value:.4g}") for name, value in zip(MIXED_FIELDS, values, strict=True)}
    return scaled | {"skew": flash_attention_2_skew(gpu, kv_heads, FLASH_ATTENTION_2_MIXED_SKEW)}


def us(seconds: FloatArray) -> list[float]:
    """Microseconds with four significant digits, as the files hold them."""
    return [float(f"{value * 1e6:.4g}") for value in seconds]


def curve_term(label: str, tokens: FloatArray, seconds: FloatArray) -> dict[str, Any]:
    """A padded curve over the step's tokens."""
    curve = {"tokens": tokens.astype(int).tolist(), "time_us": us(seconds)}
    return {"kind": "tokens", "side": "gpu", "label": label, "padded": True, **curve}
