"""How many KV-cache blocks vLLM finds room for: the memory it may use less what it sees used.

vLLM measures once, at start: weights, the peak of a profiling pass with `max_num_batched_tokens`
tokens and `max_num_seqs` sampled rows, and everything outside PyTorch's allocator (CUDA context,
communicators, kernel workspaces). What `gpu_memory_utilization` leaves goes to KV blocks.
"""

from __future__ import annotations

import math

from ersim.errors import DoesNotFitError
from ersim.steptime.specs import GpuSpec, ModelSpec

# CUDA context, kernel workspaces and allocator slack on one GPU, bytes. Set by one recorded start:
# RTX 4090, Llama 3.1 8B bf16, utilization 0.9, 2,048 tokens, 256 sequences: 2,588 blocks of 16.
CONTEXT_BYTES = 0.90e9
# NCCL communicators and the custom all-reduce's buffers, bytes per GPU when tp > 1. Set by one
# recorded start: H100-80GB, Llama 3.1 70B bf16, tp 4: 30,251 blocks of 16.
COMMUNICATOR_BYTES = 0.27e9
# The sampler's profiling pass holds, per row and vocabulary entry, bf16 logits, their fp32 copy and
# one fp32 working array.
SAMPLER_BYTES_PER_LOGIT = 10.0


def activation_bytes(model: ModelSpec, tp: int, tokens: int, seqs: int) -> float:
    """Peak of vLLM's profiling pass on each GPU, bytes.

    The larger of one MLP's live tensors (gate and up projection, their product, hidden state,
    residual and one more hidden state, 2 bytes each) over `tokens` and the sampler's over `seqs`.
    """
    mlp = tokens * 2.0 * (3 * model.intermediate_size / tp + 3 * model.hidden_size)
    sampler = seqs * model.vocab_size * SAMPLER_BYTES_PER_LOGIT
    return max(mlp, sampler)


def kv_cache_bytes(
    model: ModelSpec, gpu: GpuSpec, precision: str, tp: int, utilization: float, tokens: int, seqs: int
) -> float:
    """Bytes left for the KV cache on each GPU; negative when even the weights do not fit."""
    overhead = CONTEXT_BYTES + (COMMUNICATOR_BYTES if tp > 1 else 0.0)
    used = model.weight_bytes(precision, tp) + activation_bytes(model, tp, tokens, seqs) + overhead
    return utilization * gpu.memory_bytes - used


def kv_blocks(
    model: ModelSpec,
    gpu: GpuSpec,
    precision: str,
    tp: int,
    *,
    block_size: int,
    utilization: float,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    kv_value_bytes: float = 2.0,
    key: str = "expert",
) -> int:
    """KV blocks of `block_size` tokens that vLLM would allocate.

    Raises DoesNotFitError, with the shortage and what would fit, when the cache could not hold one
    request of `max_model_len` tokens: vLLM refuses to start then.
    """
    free = kv_cache_bytes(model, gpu, precision, tp, utilization, max_num_batched_tokens, max_num_seqs)
    per_token = model.kv_bytes_per_token(tp, kv_value_bytes)
    per_block = per_token * block_size
    blocks = math.floor(free / per_block)
    if blocks * block_size >= max_model_len:
        return blocks
    missing = max_model_len * per_token - free
    raise DoesNotFitError(
        f"{key}: {model.name} in {precision} with tp={tp} does not fit {gpu.name}: "
        f"{missing / 1e9:.2f} GB short on each GPU for weights and one request of {max_model_len} tokens "
        f"at gpu_memory_utilization={utilization:g}. "
        + _what_fits(
            model, gpu, precision, tp, utilization, max_num_batched_tokens, max_num_seqs, max_model_len
        )
    )


def _what_fits(
    model: ModelSpec,
    gpu: GpuSpec,
    precision: str,
    tp: int,
    utilization: float,
    tokens: int,
    seqs: int,
    length: int,
) -> str:
    """One sentence naming the nearest choices that do fit this GPU."""

    def room(candidate: str, degree: int) -> float:
        free = kv_cache_bytes(model, gpu, candidate, degree, utilization, tokens, seqs)
        return free / model.kv_bytes_per_token(degree)

    choices = []
    shorter = int(room(precision, tp)) // 16 * 16
    if shorter >= 256:
        choices.append(f"max_model_len={shorter}")
    degrees = (degree for degree in (2, 4, 8) if degree > tp and model.num_heads % degree == 0)
    wider = next((degree for degree in degrees if room(precision, degree) >= length), None)
    if wider:
        choices.append(f"tp={wider}")
    smaller = [p for p in ("fp8", "int4") if p != precision and room(p, tp) >= length]
    if smaller:
        choices.append(f"precision={smaller[0]}")
    return (
        "It would fit with " + " or ".join(choices) if choices else "No precision or tp up to 8 fits this GPU"
    )
