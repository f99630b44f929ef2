"""Step time from datasheets alone: always labelled uncalibrated.

Each linear map takes max(weights / bandwidth, FLOPs / peak), both at the share of peak that measured
kernels reach (`conf/gpu`). Decode attention reads the KV cache at ATTENTION_EFFICIENCY of the
bandwidth, prefill attention computes at 60 % of the linear maps' rate, and two all-reduces a layer
move the hidden state over the link. Overheads are fixed constants, so the interval is wide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ersim.steptime.calibration import Calibration
from ersim.steptime.specs import LINEAR_BYTES, GpuSpec, ModelSpec, canonical_precision

LAYER_OVERHEAD_S = 24e-6  # norms, rotary, cache write, activation, launches, attention's floor of 10 us
ATTENTION_EFFICIENCY = (
    0.6  # of the GPU's bandwidth, of decode attention over 500 to 4,000 tokens in the tables
)
HOST_STEP_S = (
    3.5e-3  # scheduler, input preparation, output processing of vLLM V1, hidden under a longer GPU step
)
HOST_SEQ_S = 8e-6
EXPOSED_STEP_S = 3e-4
REL_STD = 0.12  # common error of rooflines against the measured tables of the GPUs that have them
TOKEN_GRID = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768)


def dense_s(model: ModelSpec, gpu: GpuSpec, precision: str, tp: int, tokens: np.ndarray) -> np.ndarray:
    """Seconds of all layers' linear maps, small operators and all-reduces, by tokens in the step."""
    rate = gpu.bandwidth_bytes_s * gpu.bandwidth_efficiency
    weights_s = model.linear_params * LINEAR_BYTES[precision] / tp / rate
    flops_s = model.linear_flops_per_token(tp) / (gpu.peak_flops(precision) * gpu.flops_efficiency)
    small_bytes = 2.0 * model.num_layers * (10 * model.hidden_size + 4 * model.intermediate_size / tp)
    small_s = tokens * small_bytes / rate + model.num_layers * LAYER_OVERHEAD_S
    total = np.maximum(weights_s, tokens * flops_s) + small_s
    if tp > 1:
        moved = 2.0 * tokens * model.hidden_size * 2 * (tp - 1) / tp
        total = total + 2 * model.num_layers * (
            gpu.all_reduce_latency_s(tp) + moved / (gpu.link_bytes_s * 0.7)
        )
    return np.asarray(total, dtype=float)


def _linear(feature: str, side: str, label: str) -> dict[str, Any]:
    return {"kind": "linear", "feature": feature, "side": side, "label": label}


def build_roofline(model: ModelSpec, gpu: GpuSpec, precision: str, tp: int) -> Calibration:
    """The uncalibrated step time of `model` at `precision` on `tp` of `gpu`."""
    precision = canonical_precision(precision)
    rate = gpu.bandwidth_bytes_s * gpu.bandwidth_efficiency
    tokens = np.asarray(TOKEN_GRID, dtype=float)
    seqs = np.asarray((1, 64, 128, 256, 512, 1024, 2048), dtype=float)
    head_flops_s = model.lm_head_flops(tp) / (gpu.peak_flops("bf16") * gpu.flops_efficiency)
    head_bytes_s = 2.0 * model.vocab_size * model.hidden_size / tp / rate
    sampler_s = seqs * model.vocab_size * 12.0 / rate + 4e-5
    head = np.maximum(head_bytes_s, seqs * head_flops_s) + sampler_s
    pair_s = model.attention_flops(1, 0.5, tp) / (gpu.peak_flops("bf16") * gpu.flops_efficiency * 0.6)
    dense = dense_s(model, gpu, precision, tp, tokens)
    terms: list[dict[str, Any]] = [
        {
            "kind": "tokens",
            "side": "gpu",
            "label": "dense layers",
            "padded": True,
            "tokens": list(TOKEN_GRID),
        },
        {"kind": "sampled", "side": "gpu", "label": "LM head and sampler", "sequences": seqs.tolist()},
        _linear("decode_context_tokens", "gpu", "decode attention"),
        _linear("prefill_pairs", "gpu", "prefill attention"),
        _linear("step", "host", "host time per step"),
        _linear("sampled_seqs", "host", "host time per sequence"),
        _linear("step", "exposed", "host time not hidden"),
    ]
    terms[0]["time_us"] = (dense * 1e6).round(2).tolist()
    terms[1]["time_us"] = (head * 1e6).round(2).tolist()
    context_s = model.kv_bytes_per_token(tp) / (gpu.bandwidth_bytes_s * ATTENTION_EFFICIENCY)
    theta = [1.0, 1.0, context_s, pair_s, HOST_STEP_S, HOST_SEQ_S, EXPOSED_STEP_S]
    mean = np.asarray(theta)
    covariance = np.outer(mean, mean) * REL_STD**2 + np.diag((mean * 0.10) ** 2)
    return Calibration(
        name=f"roofline {gpu.name} {model.name} {precision} tp{tp}",
        source="roofline",
        model=model.name,
        precision=precision,
        gpu=gpu.name,
        tp=tp,
        terms=tuple(terms),
        theta=tuple(theta),
        covariance=tuple(map(tuple, covariance.tolist())),
        residual_rel_std=0.03,
        valid={"tokens": [1, 32768], "context_tokens": [0, model.max_position]},
        provenance={"source": gpu.source},
        warnings=("uncalibrated: step times come from datasheet figures, nothing was measured on this GPU",),
    )
