"""Model folders without weights: Llama 3's config.json and, if wanted, a word-level tokenizer.

A server started on such a folder with ``--load-format dummy`` runs the real kernels on random
weights: timing is real, text is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ersim.errors import unknown_choice
from ersim.steptime import ModelSpec

UNKNOWN_WORD = "<unk>"
SPECIAL_WORDS = (UNKNOWN_WORD, "<s>", "</s>")

_INT8_ARGS: dict[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "observer": "minmax",
}
_COMPRESSED_INT8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8_ARGS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8_ARGS, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}
QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "fp16": None,
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "int8": _COMPRESSED_INT8,
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "damp_percent": 0.01,
        "true_sequential": True,
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    },
}
"""quantization_config by method; the names are what `live.quantization` accepts."""

DEFAULT_METHOD = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8", "int8": "int8", "int4": "gptq"}
"""The method that serves a precision when `live.quantization` does not say."""


def model_shape(spec: ModelSpec) -> dict[str, Any]:
    """A model's shape under config.json's names."""
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
    }


def llama_config(spec: ModelSpec, method: str, max_model_len: int) -> dict[str, Any]:
    """The Hugging Face config.json of a Llama 3 of this shape; ConfigError for an unknown method."""
    if method not in QUANTIZATIONS:
        raise unknown_choice("live.quantization", method, QUANTIZATIONS)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **model_shape(spec),
        "max_position_embeddings": max(max_model_len, 8192),
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "torch_dtype": "float16" if method == "fp16" else "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if QUANTIZATIONS[method] is not None:
        config["quantization_config"] = QUANTIZATIONS[method]
    return config


def word(token_id: int) -> str:
    """The text of a token of the word-level tokenizer; one word is one token."""
    return SPECIAL_WORDS[token_id] if token_id < len(SPECIAL_WORDS) else f"w{token_id}"


def word_level_tokenizer(vocab_size: int) -> dict[str, Any]:
    """tokenizer.json in which every word between spaces is exactly one token."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word(token_id): token_id for token_id in range(vocab_size)},
            "unk_token": UNKNOWN_WORD,
        },
    }


_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_model(folder: Path, spec: ModelSpec, method: str, max_model_len: int, tokenizer: bool) -> Path:
    """Write config.json (and a tokenizer) for a weightless expert; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", llama_config(spec, method, max_model_len))
    if tokenizer:
        _write_json(folder / "tokenizer.json", word_level_tokenizer(spec.vocab_size))
        _write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": UNKNOWN_WORD,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "add_bos_token": False,
                "chat_template": _CHAT_TEMPLATE,
                "model_max_length": max_model_len,
            },
        )
    return folder
