"""Tiny Llama-3 checkpoints with stored weights, plain or packed as the public formats pack them.

Packing is written from the formats' definitions, and every checkpoint comes with the weights that it
stands for, so that vLLM's loaders and kernels are checked against something that is not vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ersim.steptime import ModelSpec
from testbed.weightless import llama_config, write_model

TINY = ModelSpec(
    name="tiny",
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=128,
    max_position=8192,
)
MAX_MODEL_LEN = 1024
GROUP = 128  # input features that share a scale
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours lies in nibble 0, 1, ... of a word
Stored = dict[str, Tensor]
Packed = tuple[Stored, Tensor]
"""Tensors by the ending of their name, and the weight (out, in) that they stand for."""


def _words(nibbles: Tensor) -> Tensor:
    """Eight nibbles of the last axis in one int32, the first one lowest."""
    shifts = torch.arange(0, 32, 4)
    return (nibbles.to(torch.int64) << shifts).sum(-1).to(torch.int32)


def _grouped(weight: Tensor) -> Tensor:
    """(out, in) as (groups, GROUP, out)."""
    return weight.t().reshape(-1, GROUP, weight.shape[0])


def _ungrouped(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).t().contiguous()


def plain(weight: Tensor) -> Packed:
    """bfloat16, as it is."""
    return {"weight": weight.bfloat16()}, weight


def int8(weight: Tensor) -> Packed:
    """compressed-tensors int-quantized: one scale for each output feature."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    quantized = (weight / scale).round()
    return {"weight": quantized.to(torch.int8), "weight_scale": scale}, quantized * scale


def gptq(weight: Tensor) -> Packed:
    """GPTQ, symmetric: nibbles packed along the input, zero point 8 stored as 7."""
    groups = _grouped(weight)
    scale = (groups.abs().amax(1, keepdim=True) / 7).bfloat16().float()
    nibbles = (groups / scale).round().clamp(-8, 7) + 8
    out, features = weight.shape
    stored = {
        "qweight": _words(nibbles.reshape(features // 8, 8, out).transpose(1, 2)),
        "qzeros": _words(torch.full((features // GROUP, out // 8, 8), 7)),
        "scales": scale[:, 0].bfloat16(),
        "g_idx": torch.arange(features, dtype=torch.int32) // GROUP,
    }
    return stored, _ungrouped((nibbles - 8) * scale)


def awq(weight: Tensor) -> Packed:
    """AWQ (gemm): nibbles packed along the output in AWQ's order, each group with a zero point."""
    groups = _grouped(weight)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (-low / scale).round().clamp(0, 15)
    nibbles = ((groups / scale).round() + zero).clamp(0, 15)
    out, features = weight.shape
    order = list(AWQ_ORDER)
    stored = {
        "qweight": _words(nibbles.reshape(features, out // 8, 8)[..., order]),
        "qzeros": _words(zero.reshape(-1, out // 8, 8)[..., order]),
        "scales": scale[:, 0].bfloat16(),
    }
    return stored, _ungrouped((nibbles - zero) * scale)


PACKINGS: dict[str, Callable[[Tensor], Packed]] = {"bf16": plain, "int8": int8, "gptq": gptq, "awq": awq}
"""How a linear layer is stored, by the project's name of the method."""


def reference_model(seed: int) -> LlamaForCausalLM:
    """A random model in float32 whose weights bfloat16 holds exactly; large ones, so that layers matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(**llama_config(TINY, "bf16", MAX_MODEL_LEN))
    config.initializer_range = 0.08
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones so far, which a model that was not loaded may have too
                parameter.uniform_(0.5, 1.5)
            parameter.copy_(parameter.bfloat16().float())
    return model


def write_checkpoint(folder: Path, method: str, seed: int) -> LlamaForCausalLM:
    """config.json, tokenizer and model.safetensors; returns the model in transformers that they stand for."""
    write_model(folder, TINY, method, MAX_MODEL_LEN, tokenizer=True)
    model = reference_model(seed)
    stored: Stored = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            linear = name.endswith("_proj.weight")
            tensors, weight = (PACKINGS[method] if linear else plain)(parameter.detach().clone())
            parameter.copy_(weight)
            stored |= {f"{name.removesuffix('weight')}{ending}": value for ending, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors")
    return model


def sure_answers(
    model: LlamaForCausalLM, asked: int, kept: int, prompt_tokens: int, answer_tokens: int
) -> list[tuple[list[int], list[int], float]]:
    """Prompts, transformers' greedy answers, and the smallest lead of a chosen logit over the next.

    Of `asked` random prompts the `kept` with the largest such lead, so that rounding cannot turn an answer;
    none whose answer repeats one token most of the time.
    """
    torch.manual_seed(1)
    prompts = torch.randint(3, TINY.vocab_size, (asked, prompt_tokens))
    with torch.no_grad():
        made = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=answer_tokens,
            min_new_tokens=answer_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(made.logits, 1).topk(2).values  # (prompt, token, best and next)
    leads = (best[..., 0] - best[..., 1]).amin(1)
    answers = made.sequences[:, prompt_tokens:]
    varied = [
        i for i in leads.argsort(descending=True).tolist() if 2 * len(answers[i].unique()) > answer_tokens
    ]
    return [(prompts[i].tolist(), answers[i].tolist(), float(leads[i])) for i in varied[:kept]]
