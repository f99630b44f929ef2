"""Step time of a GPU, model, precision or TP that was not measured, carried over from one that was.

Every operator keeps the share of its bound that the measured kernels reach: what loads weights or KV
cache scales with bytes / bandwidth, what computes with FLOPs / peak, what talks over the link with
bytes / link bandwidth, launches with the number of layers; host time stays. The result is labelled
uncalibrated and its interval widened by what leaving out whole GPUs showed (docs/accuracy.md).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.steptime import calibration as calibrations
from ersim.steptime.calibration import Calibration
from ersim.steptime.specs import LINEAR_BYTES, GpuSpec, ModelSpec, load_gpu, load_model

FloatArray = npt.NDArray[np.float64]
# Leaving out a whole GPU, what is carried over to it errs by 7 % of a step on average and 29 % at most.
OTHER_GPU_STD = 0.08  # relative spread common to all terms
OTHER_GPU_TERM_STD = 0.10  # and of each term by itself
OTHER_TP_STD = 0.06  # the same, common, for another TP on the GPU that was measured
LINK_EFFICIENCY = 0.7  # of the link, where the base has no all-reduce to carry over
FEW_TOKENS = 16  # up to here a linear map costs the loading of its weights
FILE_NAME = re.compile(r"(.+)_([a-z0-9]+)_tp(\d)_(?:tables|profile)\.json")
# What weighs in choosing the nearest base, in the logs of rates: another GPU, precision, TP, derivation.
GPU_DISTANCE, PRECISION_DISTANCE, TP_DISTANCE, DERIVED_DISTANCE = 0.5, 2.5, 0.1, 0.3
# Not the same kernels: Hopper runs FlashAttention 3, the others 2; and memory of another kind (GDDR, HBM).
ATTENTION_DISTANCE, MEMORY_DISTANCE = 0.6, 0.6
HOPPER, GDDR = re.compile(r"g?h[12]00"), re.compile(r"rtx|l4|a10(?!0)|a40")


@dataclass(frozen=True)
class Setting:
    """What a calibration is for."""

    model: ModelSpec
    gpu: GpuSpec
    precision: str
    tp: int

    @property
    def bandwidth(self) -> float:
        """Bytes per second that kernels reach on this GPU."""
        return self.gpu.bandwidth_bytes_s * self.gpu.bandwidth_efficiency

    @property
    def weights_s(self) -> float:
        """Seconds that loading the layers' weights takes at full bandwidth."""
        stored = self.model.linear_params * LINEAR_BYTES[self.precision]
        return stored / self.tp / self.bandwidth

    @property
    def flops_s(self) -> float:
        """Seconds a token's linear maps take at peak; what the GPU lacks cores for computes in bf16."""
        return self.model.linear_flops_per_token(self.tp) / (
            self.gpu.peak_flops(self.precision) * self.gpu.flops_efficiency
        )

    @property
    def small_s(self) -> float:
        """Seconds a token's small operators move their bytes at full bandwidth."""
        model = self.model
        size = 10 * model.hidden_size + 4 * model.intermediate_size / self.tp
        return 2.0 * model.num_layers * size / self.bandwidth

    @property
    def kv_s(self) -> float:
        """Seconds that reading one token of KV cache takes at full bandwidth."""
        return self.model.kv_bytes_per_token(self.tp) / self.gpu.bandwidth_bytes_s

    @property
    def pair_s(self) -> float:
        """Seconds of one query-key pair of prefill attention at peak."""
        return self.model.attention_flops(1, 0.5, self.tp) / (
            self.gpu.flops["bf16"] * self.gpu.flops_efficiency
        )

    @property
    def head_s(self) -> float:
        """Seconds that loading the LM head takes at full bandwidth."""
        return self.model.vocab_size * self.model.hidden_size * 2.0 / self.tp / self.bandwidth

    @property
    def reduce_s(self) -> float:
        """Seconds of a token's all-reduces on the wire."""
        moved = 4.0 * self.model.hidden_size * (self.tp - 1) / self.tp
        return 2 * self.model.num_layers * moved / self.gpu.link_bytes_s


def build_transfer(base: Calibration, target: Setting) -> Calibration:
    """The uncalibrated step time of `target` from the measured `base` (of source tables or profile)."""
    origin = Setting(load_model(base.model), load_gpu(base.gpu), base.precision, base.tp)
    terms: list[dict[str, Any]] = []
    theta, index = [], []
    for number, term in enumerate(base.terms):
        moved = _moved(term, origin, target)
        if moved is not None:
            terms.append(moved)
            theta.append(base.theta[number])
            index.append(number)
    _keep_bounds(terms, theta, target)
    covariance = np.asarray(base.covariance)[np.ix_(index, index)]
    if target.tp > 1 and base.tp == 1:
        terms.append(_all_reduce(target))
        theta.append(1.0)
        covariance = np.pad(covariance, (0, 1))
        covariance[-1, -1] = 0.3**2
    mean = np.asarray(theta)
    same = base.gpu == target.gpu.name
    common, single = (OTHER_TP_STD, 0.0) if same else (OTHER_GPU_STD, OTHER_GPU_TERM_STD)
    covariance = covariance + common**2 * np.outer(mean, mean) + np.diag((single * mean) ** 2)
    name = f"{target.gpu.name} {target.model.name} {target.precision} tp{target.tp}"
    return dataclasses.replace(
        base,
        name=f"{name} carried over from {base.name}",
        source="transfer",
        model=target.model.name,
        gpu=target.gpu.name,
        precision=target.precision,
        tp=target.tp,
        terms=tuple(terms),
        theta=tuple(theta),
        covariance=tuple(map(tuple, covariance.tolist())),
        derived=f"carried over from {base.name} by bytes / bandwidth, FLOPs / peak and link bandwidth",
        kv_blocks=None,
        engine={},
        fit={},
        provenance={"base": base.name, "base_source": base.source},
        power={},
        warnings=(
            f"uncalibrated: {name} was not measured; step times are carried over from {base.name} "
            "by datasheet ratios, with a wider interval",
        ),
    )


def _keep_bounds(terms: list[dict[str, Any]], theta: Sequence[float], target: Setting) -> None:
    """Lift what the ratios brought below the target's datasheet, each term as its coefficient counts it."""
    gpu = target.gpu
    loading = 1e6 * target.weights_s * gpu.bandwidth_efficiency
    a_token = 1e6 * target.flops_s * gpu.flops_efficiency
    kv_token, pair = 1e6 * target.kv_s, 1e6 * target.pair_s * gpu.flops_efficiency
    least: dict[str, Callable[[Mapping[str, Any]], FloatArray]] = {
        "weights": lambda term: np.full(len(term["tokens"]), loading),
        "arithmetic": lambda term: np.maximum(np.asarray(term["tokens"]) * a_token - loading, 0.0),
        "linear maps": lambda term: np.maximum(np.asarray(term["tokens"]) * a_token, loading),
        "LM head and sampler": lambda term: np.full(
            len(term["sequences"]), 1e6 * target.head_s * gpu.bandwidth_efficiency
        ),
        "decode attention": lambda term: kv_token * np.outer(term["sequences"], term["context_tokens"]),
        "prefill attention": lambda term: pair * _pairs(term),
    }
    for term, coefficient in zip(terms, theta, strict=True):
        if term["label"] in least and coefficient > 0:
            bound = least[term["label"]](term) / coefficient
            lifted = np.maximum(np.asarray(term["time_us"], float), 1.001 * bound)
            term["time_us"] = lifted.tolist()
            if term.get("fp8_time_us") is not None:
                narrow = np.maximum(np.asarray(term["fp8_time_us"], float), 0.5005 * bound)
                term["fp8_time_us"] = narrow.tolist()


def _pairs(term: Mapping[str, Any]) -> FloatArray:
    """Query-key pairs of each chunk over each prefix, shape (chunks, prefixes)."""
    chunks = np.asarray(term["chunk_tokens"], float)[:, None]
    return np.asarray(chunks * (np.asarray(term["context_tokens"], float)[None, :] + chunks / 2), dtype=float)


def _moved(term: Mapping[str, Any], origin: Setting, target: Setting) -> dict[str, Any] | None:
    """One term in the target's seconds; None where the target has no such work."""
    if term["side"] != "gpu" or term["kind"] == "linear":
        return dict(term)
    if term["label"] == "all-reduce" and target.tp == 1:
        return None
    layers = target.model.num_layers / origin.model.num_layers
    return MOVES[str(term["label"])](term, origin, target, layers)


def _ratio(name: str, origin: Setting, target: Setting) -> float:
    return float(getattr(target, name) / getattr(origin, name))


def _times(values: FloatArray) -> list[float]:
    return [float(f"{value:.4g}") for value in np.maximum(values, 0.0)]


def _curve_of(rate: str) -> Callable[..., dict[str, Any]]:
    """A curve whose floor goes with the layers' launches and whose growth with `rate`."""

    def move(term: Mapping[str, Any], origin: Setting, target: Setting, layers: float) -> dict[str, Any]:
        times = np.asarray(term["time_us"], float)
        floor = times[0]
        return {**term, "time_us": _times(floor * layers + (times - floor) * _ratio(rate, origin, target))}

    return move


def _weights(term: Mapping[str, Any], origin: Setting, target: Setting, layers: float) -> dict[str, Any]:
    times = np.asarray(term["time_us"], float) * _ratio("weights_s", origin, target)
    return {**term, "time_us": _times(times)}


def _arithmetic(term: Mapping[str, Any], origin: Setting, target: Setting, layers: float) -> dict[str, Any]:
    """Growth over the loading of weights, with the tiles' steps where they were measured."""
    times = np.asarray(term["time_us"], float) * _ratio("flops_s", origin, target)
    return {**term, "time_us": _times(times)}


def _linear_maps(term: Mapping[str, Any], origin: Setting, target: Setting, layers: float) -> dict[str, Any]:
    """A profile's single curve: loading of weights and small operators' launches, then arithmetic."""
    tokens, times = np.asarray(term["tokens"], float), np.asarray(term["time_us"], float)
    loading = float(np.median(times[tokens <= FEW_TOKENS]))
    grown = _arithmetic({**term, "time_us": np.maximum(times - loading, 0.0)}, origin, target, layers)
    bound = min(loading, 1e6 * origin.weights_s / 0.9)  # weights at 90 % of the bandwidth, the rest launches
    base = bound * _ratio("weights_s", origin, target) + (loading - bound) * layers
    return {**term, "time_us": _times(base + np.asarray(grown["time_us"]))}


def _head(term: Mapping[str, Any], origin: Setting, target: Setting, layers: float) -> dict[str, Any]:
    times = np.asarray(term["time_us"], float) * _ratio("head_s", origin, target)
    return {**term, "time_us": _times(times)}


def _decode(term: Mapping[str, Any], origin: Setting, target: Setting, layers: float) -> dict[str, Any]:
    """Rows cost launches and blocks by layer, contexts the reading of the KV cache."""
    ratio = _ratio("kv_s", origin, target)

    def table(values: Any) -> list[list[float]]:
        times = np.asarray(values, float)
        first = times[:, :1]
        return [_times(row) for row in first * layers + (times - first) * ratio]

    moved = {**term, "time_us": table(term["time_us"]), "skew": _skew(term["skew"], origin, target)}
    if term.get("fp8_time_us") is not None:
        moved["fp8_time_us"] = table(term["fp8_time_us"])
    mixed = term.get("mixed")
    if mixed is not None:
        factors = {"seq_us": layers, "tile_us": layers, "token_us": ratio}
        moved["mixed"] = {name: mixed[name] * factor for name, factor in factors.items()}
        moved["mixed"]["skew"] = _skew(mixed["skew"], origin, target)
    return moved


def _skew(skew: Any, origin: Setting, target: Setting) -> Any:
    """A skew by decode rows for another GPU or TP: as many rows as fill its multiprocessors alike."""
    if not isinstance(skew, Mapping):
        return skew
    fill = target.gpu.multiprocessors / origin.gpu.multiprocessors
    fill *= origin.model.kv_heads_per_gpu(origin.tp) / target.model.kv_heads_per_gpu(target.tp)
    return {**skew, "sequences": [round(rows * fill, 1) for rows in skew["sequences"]]}


def _prefill(term: Mapping[str, Any], origin: Setting, target: Setting, layers: float) -> dict[str, Any]:
    times = np.asarray(term["time_us"], float)
    floor = min(float(term["shared_us"]), float(times[0, 0]))
    moved = floor * layers + (times - floor) * _ratio("pair_s", origin, target)
    return {**term, "time_us": [_times(row) for row in moved], "shared_us": term["shared_us"] * layers}


def _all_reduce(target: Setting) -> dict[str, Any]:
    """Two all-reduces a layer over the link by datasheet."""
    tokens = np.asarray((1, 16, 64, 256, 512, 1024, 2048, 4096, 8192), dtype=float)
    launches = 2 * target.model.num_layers * target.gpu.all_reduce_latency_s(target.tp)
    seconds = launches + tokens * target.reduce_s / LINK_EFFICIENCY
    term = {"kind": "tokens", "side": "gpu", "label": "all-reduce", "padded": True}
    return term | {"tokens": [int(t) for t in tokens], "time_us": _times(1e6 * seconds)}


MOVES: Mapping[str, Callable[..., dict[str, Any]]] = {
    "weights": _weights,
    "arithmetic": _arithmetic,
    "linear maps": _linear_maps,
    "small operators": _curve_of("small_s"),
    "all-reduce": _curve_of("reduce_s"),
    "LM head and sampler": _head,
    "decode attention": _decode,
    "prefill attention": _prefill,
}


def nearest(target: Setting, leave_out: Sequence[str] = ()) -> Calibration | None:
    """The committed calibration of the same model to carry over from; None when there is none.

    The nearest GPU in attention kernels, kind of memory, reached bandwidth and peak, then precision and TP.
    Another model is none: per layer
    a larger model's linear maps reach a larger share of the peak (18 to 35 % between 8B and 70B).
    leave_out: GPUs whose calibrations must not be used, to judge what is carried over.
    """
    found = [base for base in _measured() if base.gpu not in leave_out and base.model == target.model.name]
    if not found:
        return None
    return calibrations.load(min(found, key=lambda base: _distance(base, target)).path)


@dataclass(frozen=True)
class _Base:
    """Identity of a committed calibration."""

    path: Path
    gpu: str
    model: str
    precision: str
    tp: int
    derived: bool


@lru_cache(maxsize=1)
def _measured() -> tuple[_Base, ...]:
    """Every committed calibration from tables or profiles, by its file's name (no need to parse them all)."""
    found = []
    for path in calibrations.list_files():
        match = FILE_NAME.fullmatch(path.name)
        if match is not None:
            derived = '"derived":null' not in path.read_text(encoding="utf-8")
            model, precision, tp = match.groups()
            found.append(_Base(path, path.parent.name, model, precision, int(tp), derived))
    return tuple(found)


def _distance(base: _Base, target: Setting) -> float:
    origin = Setting(target.model, load_gpu(base.gpu), base.precision, base.tp)
    away = 0.0
    if base.gpu != target.gpu.name:
        peak = target.gpu.flops["bf16"] * target.gpu.flops_efficiency
        peak /= origin.gpu.flops["bf16"] * origin.gpu.flops_efficiency
        away += GPU_DISTANCE + abs(math.log(target.bandwidth / origin.bandwidth)) + 0.5 * abs(math.log(peak))
        for kind, distance in ((HOPPER, ATTENTION_DISTANCE), (GDDR, MEMORY_DISTANCE)):
            away += distance * (bool(kind.match(base.gpu)) != bool(kind.match(target.gpu.name)))
    # An A100 dequantises fp8 weights, an H100 multiplies in fp8: not the same kernels under one name.
    natively = (base.precision in origin.gpu.flops) == (target.precision in target.gpu.flops)
    away += PRECISION_DISTANCE * (base.precision != target.precision or not natively)
    away += TP_DISTANCE * abs(math.log2(target.tp / base.tp))
    return away + DERIVED_DISTANCE * base.derived
