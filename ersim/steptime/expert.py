"""One expert, resolved: model, GPU, engine settings without gaps, KV blocks, calibration, price."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import yaml

from ersim.config import ExpertConfig
from ersim.errors import DataError, bad_value
from ersim.steptime import calibration as calibrations
from ersim.steptime.calibration import Calibration
from ersim.steptime.capacity import kv_blocks
from ersim.steptime.evaluate import EXTRAPOLATION_STD, PreparedStepTime, graph_sizes
from ersim.steptime.roofline import build_roofline
from ersim.steptime.specs import (
    CONF_DIR,
    GpuSpec,
    ModelSpec,
    canonical_precision,
    check_tensor_parallel,
    load_gpu,
    load_model,
)
from ersim.steptime.transfer import Setting, build_transfer, nearest

FRONTEND_REL_STD = 0.4  # doubt (log) of an assumed API server time; docs/accuracy.md
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 128, 16  # vLLM 0.32's defaults
CPU_SEQS, CPU_TOKENS = 128, 2048  # of a server, for each tensor-parallel rank; likewise


@dataclass(frozen=True, slots=True)
class ResolvedEngine:
    """`EngineSettings` with every default filled in as vLLM 0.32 does for this GPU."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    kv_blocks: int
    gpu_memory_utilization: float
    enable_chunked_prefill: bool
    enable_prefix_caching: bool
    long_prefill_token_threshold: int
    policy: str
    watermark: float
    scheduler_reserve_full_isl: bool
    async_scheduling: bool
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class Frontend:
    """Seconds that an API server adds to a request, charged before the engine sees it."""

    request_s: float = 0.0
    per_prompt_token_s: float = 0.0


@dataclass(frozen=True)
class ExpertModel:
    """All that the system needs to time one replica of an expert."""

    model: ModelSpec
    gpu: GpuSpec | None
    engine: ResolvedEngine
    calibration: Calibration
    usd_per_hour: float | None
    gpus_per_replica: int

    @property
    def step_noise(self) -> float:
        """Relative standard deviation of one step's residual (lognormal), 0 when unknown."""
        return self.calibration.residual_rel_std

    def step_time(self, rng: np.random.Generator | None = None, mirrored: bool = False) -> PreparedStepTime:
        """The mean step time, or one draw of the coefficients from their covariance (or its reflection)."""
        factor = 1.0 if rng is None else float(np.exp(rng.normal(0.0, EXTRAPOLATION_STD)))
        graphs = self.calibration.engine.get("cudagraph_sizes")
        if graphs is None:
            graphs = [] if self.gpu is None else graph_sizes(self.engine.max_num_seqs)
        return PreparedStepTime(
            self.calibration,
            self.calibration.sample_theta(rng, mirrored),
            max_tokens=self.engine.max_num_batched_tokens,
            max_seqs=self.engine.max_num_seqs,
            max_context=self.engine.max_model_len,
            graphs=graphs,
            asynchronous=self.engine.async_scheduling,
            fp8_kv=self.engine.kv_cache_dtype == "fp8",
            beyond_factor=factor,
        )

    def frontend(self, rng: np.random.Generator | None = None) -> Frontend:
        """What the API server adds: measured (in_s, out_s), or assumed (request_s) with its doubt drawn."""
        known = self.calibration.frontend
        if "in_s" in known:
            return Frontend(known["in_s"] + known.get("out_s", 0.0))
        factor = 1.0 if rng is None else float(np.exp(rng.normal(0.0, FRONTEND_REL_STD)))
        return Frontend(
            request_s=factor * known.get("request_s", 0.0),
            per_prompt_token_s=factor * known.get("per_prompt_token_s", 0.0),
        )

    def energy(self, busy_s: float, elapsed_s: float) -> float | None:
        """Joules of one replica that executed for `busy_s` of `elapsed_s`; None without a power model."""
        power = self.calibration.power
        if "busy_w" not in power or "idle_w" not in power:
            return None
        return power["busy_w"] * busy_s + power["idle_w"] * max(0.0, elapsed_s - busy_s)


def build_expert_model(expert: ExpertConfig, key: str) -> ExpertModel:
    """Resolve engine defaults, KV capacity, calibration and price of `expert`.

    `key` prefixes error messages. Raises ConfigError for unknown names, DoesNotFitError when the model
    does not fit its GPUs, DataError for a damaged calibration file.
    """
    precision = canonical_precision(expert.precision)
    named = None
    if expert.calibration not in ("auto", "roofline"):
        named = calibrations.load(calibrations.resolve(expert.calibration, key))
        _check_named(named, expert, precision, key)
    model = _model_of(expert, named)
    gpu = None if named is not None and named.gpu == "cpu" else load_gpu(expert.gpu)
    check_tensor_parallel(model, expert.tp, key)
    chosen = named or _choose(expert, model, gpu, precision)
    engine = _resolve_engine(expert, model, gpu, chosen, precision, key)
    said = _derivation_warning(chosen) + _range_warnings(chosen, engine)
    chosen = dataclasses.replace(chosen, warnings=chosen.warnings + said)
    price = _usd_per_gpu_hour(expert, None if gpu is None else gpu.name)
    return ExpertModel(model, gpu, engine, chosen, None if price is None else price * expert.tp, expert.tp)


def _model_of(expert: ExpertConfig, named: Calibration | None) -> ModelSpec:
    """The expert's model: from conf/model, or from the config.json a live calibration recorded."""
    recorded = None if named is None else named.provenance.get("model_config")
    if isinstance(recorded, dict) and not (CONF_DIR / "model" / f"{expert.model}.yaml").is_file():
        return ModelSpec.from_hf_config(recorded, expert.model)
    return load_model(expert.model)


def _check_named(named: Calibration, expert: ExpertConfig, precision: str, key: str) -> None:
    wanted = {"model": expert.model, "precision": precision, "tp": expert.tp}
    if named.gpu != "cpu":
        wanted["gpu"] = expert.gpu
    for name, value in wanted.items():
        if getattr(named, name) != value:
            must = f"{getattr(named, name)!r}, as calibration {expert.calibration} was made for"
            raise bad_value(f"{key}.{name}", must, getattr(expert, name))


def _choose(expert: ExpertConfig, model: ModelSpec, gpu: GpuSpec | None, precision: str) -> Calibration:
    assert gpu is not None  # only a named calibration can be without one
    path = None
    if expert.calibration == "auto":
        path = calibrations.find(gpu.name, model.name, precision, expert.tp)
    if path:
        return calibrations.load(path)
    if expert.calibration == "auto":
        return estimate(model, gpu, precision, expert.tp)
    return build_roofline(model, gpu, precision, expert.tp)


def estimate(
    model: ModelSpec, gpu: GpuSpec, precision: str, tp: int, leave_out: Sequence[str] = ()
) -> Calibration:
    """The uncalibrated step time: carried over from the nearest GPU that ran this model, else a roofline."""
    target = Setting(model, gpu, precision, tp)
    base = nearest(target, leave_out)
    return build_transfer(base, target) if base is not None else build_roofline(model, gpu, precision, tp)


def _resolve_engine(
    expert: ExpertConfig,
    model: ModelSpec,
    gpu: GpuSpec | None,
    chosen: Calibration,
    precision: str,
    key: str,
) -> ResolvedEngine:
    settings, recorded = expert.engine, chosen.engine

    def pick(name: str, default: int) -> int:
        value = getattr(settings, name)
        return int(value if value is not None else recorded.get(name, default))

    seqs = pick("max_num_seqs", gpu.default_num_seqs if gpu else CPU_SEQS * expert.tp)
    tokens = pick("max_num_batched_tokens", gpu.default_batched_tokens if gpu else CPU_TOKENS * expert.tp)
    if not settings.enable_chunked_prefill:
        tokens = max(tokens, settings.max_model_len)
    tokens = max(tokens, seqs) if settings.max_num_batched_tokens is None else tokens
    seqs = min(tokens, seqs) if settings.max_num_seqs is None else seqs
    block = pick("block_size", GPU_BLOCK_SIZE if gpu else CPU_BLOCK_SIZE)
    length = settings.max_model_len
    if length > model.max_position:
        raise bad_value(
            f"{key}.engine.max_model_len", f"<= {model.max_position}, what {model.name} knows", length
        )
    asynchronous = settings.async_scheduling
    if asynchronous is None:
        asynchronous = bool(recorded.get("async_scheduling", gpu is not None))
    blocks = settings.kv_blocks
    if blocks is None:
        blocks = _recorded_blocks(chosen, expert, block, seqs, tokens)
    if blocks is None:
        if gpu is None:
            raise bad_value(f"{key}.engine.kv_blocks", "set: this CPU calibration holds no block count", None)
        blocks = kv_blocks(
            model,
            gpu,
            precision,
            expert.tp,
            block_size=block,
            utilization=settings.gpu_memory_utilization,
            max_num_batched_tokens=tokens,
            max_num_seqs=seqs,
            max_model_len=length,
            kv_value_bytes=1.0 if settings.kv_cache_dtype == "fp8" else 2.0,
            key=key,
        )
    return ResolvedEngine(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=length,
        block_size=block,
        kv_blocks=blocks,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enable_chunked_prefill=settings.enable_chunked_prefill,
        enable_prefix_caching=settings.enable_prefix_caching,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        policy=settings.policy,
        watermark=settings.watermark,
        scheduler_reserve_full_isl=settings.scheduler_reserve_full_isl,
        async_scheduling=asynchronous,
        kv_cache_dtype=settings.kv_cache_dtype,
    )


def _recorded_blocks(
    chosen: Calibration, expert: ExpertConfig, block: int, seqs: int, tokens: int
) -> int | None:
    """The calibration's recorded block count, if it was recorded under the settings asked for."""
    if chosen.kv_blocks is None:
        return None
    asked = {
        "block_size": block,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": tokens,
        "gpu_memory_utilization": expert.engine.gpu_memory_utilization,
        "kv_cache_dtype": expert.engine.kv_cache_dtype,
    }
    if chosen.gpu == "cpu":  # the CPU back end's cache size is set in bytes, not by these
        asked = {"block_size": block}
    same = all(chosen.engine.get(name, value) == value for name, value in asked.items())
    return chosen.kv_blocks if same else None


def _derivation_warning(chosen: Calibration) -> tuple[str, ...]:
    """That a calibration's own precision or TP was not measured, and what it was derived from."""
    if chosen.derived is None or not chosen.calibrated:  # what is uncalibrated has said so itself
        return ()
    return (f"derived, not measured itself: {chosen.name} ({chosen.derived}); with a wider interval",)


def _range_warnings(chosen: Calibration, engine: ResolvedEngine) -> tuple[str, ...]:
    """What the engine may run that the calibration's data did not cover."""
    asked = {
        "tokens": ("max_num_batched_tokens", engine.max_num_batched_tokens),
        "decode_seqs": ("max_num_seqs", engine.max_num_seqs),
        "context_tokens": ("max_model_len", engine.max_model_len),
    }
    found = []
    for name, (setting, value) in asked.items():
        if name in chosen.valid and value > chosen.valid[name][1]:
            found.append(
                f"{setting}={value} lies beyond what calibration {chosen.name} covers "
                f"({name} up to {chosen.valid[name][1]:g}): extrapolated there, with a wider interval"
            )
    return tuple(found)


def _usd_per_gpu_hour(expert: ExpertConfig, gpu: str | None) -> float | None:
    if expert.usd_per_gpu_hour is not None:
        return expert.usd_per_gpu_hour
    return None if gpu is None else load_prices().get(gpu)


def load_prices(name: str = "on_demand") -> Mapping[str, float]:
    """US dollars per GPU-hour by GPU, from ``conf/price/<name>.yaml``."""
    path = CONF_DIR / "price" / f"{name}.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    prices = data.get("usd_per_gpu_hour") if isinstance(data, dict) else None
    if not isinstance(prices, dict):
        raise DataError(f"{path}: usd_per_gpu_hour must map GPU names to dollars, got {prices!r}")
    for gpu, value in prices.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise DataError(f"{path}: usd_per_gpu_hour.{gpu} must be a number >= 0, got {value!r}")
    return {str(gpu): float(value) for gpu, value in prices.items()}
