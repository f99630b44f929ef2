"""What a model and a GPU are, in the numbers that time and memory follow from.

Both are data (`conf/model/*.yaml`, `conf/gpu/*.yaml`); this page reads and checks them.
Bytes, FLOP/s and bytes/s, never GB or TFLOPS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ersim.errors import DataError, bad_value, unknown_choice

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

# Bytes per weight of the linear layers. int4 holds 4 bits plus one 16-bit scale (and a packed zero
# point of 4 bits) per group of 128 (GPTQ and AWQ as published); fp8 and int8 hold one scale per channel.
LINEAR_BYTES: Mapping[str, float] = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2.5 / 128}

PCIE_BYTES_S = 1e11  # links up to here are PCIe, not NVLink


def canonical_precision(precision: str) -> str:
    """fp16 and bf16 take the same bytes and the same tensor-core rate: both are ``bf16``."""
    name = "bf16" if precision == "fp16" else precision
    if name not in LINEAR_BYTES:
        raise unknown_choice("precision", precision, ("fp16", *LINEAR_BYTES))
    return name


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A dense Llama-style decoder: grouped-query attention and a gated MLP."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    tie_word_embeddings: bool = False

    @staticmethod
    def from_hf_config(config: Mapping[str, Any], name: str = "model") -> ModelSpec:
        """Read the fields of a Hugging Face ``config.json`` (already parsed).

        Raises DataError naming the missing or impossible field.
        """
        where = f"config.json of {name}"

        def number(key: str, default: int | None = None) -> int:
            return _positive_int(config, key, where, default)

        hidden, heads = number("hidden_size"), number("num_attention_heads")
        return ModelSpec(
            name=name,
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            num_layers=number("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=number("num_key_value_heads", heads),
            head_dim=number("head_dim", hidden // heads),
            vocab_size=number("vocab_size"),
            max_position=number("max_position_embeddings", 8192),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def qkv_out(self) -> int:
        """Output features of the fused query, key and value projection, all GPUs together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def linear_params(self) -> int:
        """Weights of all layers' linear maps (what quantisation shrinks)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = hidden * self.qkv_out + self.num_heads * self.head_dim * hidden
        return self.num_layers * (attention + 3 * hidden * inner)

    @property
    def embedding_params(self) -> int:
        """Weights of token embedding and LM head, which stay in 16 bits."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def norm_params(self) -> int:
        """Weights of the RMS norms, one copy on every GPU."""
        return (2 * self.num_layers + 1) * self.hidden_size

    @property
    def params(self) -> int:
        """All weights."""
        return self.linear_params + self.embedding_params + self.norm_params

    def weight_bytes(self, precision: str, tp: int = 1) -> float:
        """Bytes of weights on each of `tp` GPUs."""
        per_weight = LINEAR_BYTES[canonical_precision(precision)]
        return (self.linear_params * per_weight + 2.0 * self.embedding_params) / tp + 2.0 * self.norm_params

    def kv_heads_per_gpu(self, tp: int) -> int:
        """Key-value heads on each GPU; vLLM replicates them when tp exceeds their number."""
        return max(1, self.num_kv_heads // tp)

    def kv_bytes_per_token(self, tp: int = 1, bytes_per_value: float = 2.0) -> float:
        """Bytes of KV cache one token takes on each of `tp` GPUs (keys and values, all layers)."""
        return 2 * self.num_layers * self.kv_heads_per_gpu(tp) * self.head_dim * bytes_per_value

    def linear_flops_per_token(self, tp: int = 1) -> float:
        """FLOPs of the layers' linear maps for one token on each GPU (2 per weight)."""
        return 2.0 * self.linear_params / tp

    def lm_head_flops(self, tp: int = 1) -> float:
        """FLOPs of the LM head for one sampled row on each GPU."""
        return 2.0 * self.vocab_size * self.hidden_size / tp

    def attention_flops(self, chunk_tokens: float, context_tokens: float, tp: int = 1) -> float:
        """FLOPs of causal attention of one prefill chunk over its prefix, all layers, on each GPU."""
        pairs = chunk_tokens * (context_tokens + chunk_tokens / 2)
        return 4.0 * pairs * self.num_layers * self.num_heads * self.head_dim / tp


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU by its datasheet.

    memory_bytes: total memory as CUDA reports it. multiprocessors: how many (SMs). flops: dense tensor-core
    peak by precision (int4 weights compute in bf16). link_bytes_s: one-way bandwidth to its peers in a node.
    flops_efficiency and bandwidth_efficiency: share of peak that kernels reach, for the roofline.
    idle_w and tdp_w: board power, None when unknown.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_s: float
    multiprocessors: int
    flops: Mapping[str, float]
    link_bytes_s: float
    link_latency_s: float
    flops_efficiency: float
    bandwidth_efficiency: float
    is_a100: bool
    idle_w: float | None
    tdp_w: float | None
    source: str

    def peak_flops(self, precision: str) -> float:
        """Dense peak FLOP/s at which `precision` computes (int4, and what the GPU lacks, in bf16)."""
        return float(self.flops.get(canonical_precision(precision), self.flops["bf16"]))

    def all_reduce_latency_s(self, tp: int) -> float:
        """Seconds of the smallest all-reduce among `tp` GPUs.

        NVLink's custom kernels hardly depend on their number (operator tables); over PCIe, where vLLM has
        custom kernels for two GPUs only, NCCL's steps add up: 8 to 12 us at 2, 19 us at 4 GPUs in CUDA
        graphs (flashinfer pull request 5023, sglang-V100 pull request 2).
        """
        return self.link_latency_s * (1.0 if self.link_bytes_s > PCIE_BYTES_S else math.log2(max(2, tp)))

    @property
    def default_batched_tokens(self) -> int:
        """vLLM 0.32's max_num_batched_tokens of a server on this GPU (by memory and name)."""
        gib = self.memory_bytes / 2**30
        if gib >= 160:
            return 16384
        return 8192 if gib >= 70 and not self.is_a100 else 2048

    @property
    def default_num_seqs(self) -> int:
        """vLLM 0.32's max_num_seqs of a server on this GPU."""
        return 1024 if self.memory_bytes / 2**30 >= 70 and not self.is_a100 else 256


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} must hold a mapping of fields, got {type(data).__name__}")
    return data


def _named_file(group: str, name: str) -> Path:
    path = CONF_DIR / group / f"{name}.yaml"
    if not path.is_file():
        raise unknown_choice(group, name, (file.stem for file in (CONF_DIR / group).glob("*.yaml")))
    return path


def _positive(data: Mapping[str, Any], key: str, where: str) -> float:
    value = data.get(key)
    if isinstance(value, str):  # YAML 1.1 reads 3.35e12 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise DataError(f"{where}: {key} must be a number > 0, got {data.get(key)!r}")
    return float(value)


def _positive_int(data: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = data.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{where}: {key} must be an integer >= 1, got {value!r}")
    return value


def load_model(name: str) -> ModelSpec:
    """Read ``conf/model/<name>.yaml``. Raises ConfigError for an unknown name, DataError for a bad file."""
    path = _named_file("model", name)
    spec = ModelSpec.from_hf_config(_read_yaml(path), name)
    if spec.num_heads % spec.num_kv_heads:
        raise DataError(f"{path}: num_key_value_heads must divide num_attention_heads ({spec.num_heads})")
    return spec


def load_gpu(name: str) -> GpuSpec:
    """Read ``conf/gpu/<name>.yaml``. Raises ConfigError for an unknown name, DataError for a bad file."""
    path = _named_file("gpu", name)
    data = _read_yaml(path)
    where = str(path)
    flops = data.get("flops")
    if not isinstance(flops, dict) or "bf16" not in flops:
        raise DataError(f"{where}: flops must map precisions to FLOP/s and hold bf16, got {flops!r}")

    def optional(key: str) -> float | None:
        return _positive(data, key, where) if data.get(key) is not None else None

    return GpuSpec(
        name=name,
        memory_bytes=int(_positive(data, "memory_bytes", where)),
        bandwidth_bytes_s=_positive(data, "bandwidth_bytes_s", where),
        multiprocessors=int(_positive(data, "multiprocessors", where)),
        flops={key: _positive(flops, key, f"{where}: flops") for key in flops},
        link_bytes_s=_positive(data, "link_bytes_s", where),
        link_latency_s=_positive(data, "link_latency_s", where),
        flops_efficiency=_positive(data, "flops_efficiency", where),
        bandwidth_efficiency=_positive(data, "bandwidth_efficiency", where),
        is_a100="a100" in name,
        idle_w=optional("idle_w"),
        tdp_w=optional("tdp_w"),
        source=str(data.get("source", "")),
    )


def check_tensor_parallel(model: ModelSpec, tp: int, key: str) -> None:
    """Raise ConfigError if `tp` GPUs cannot share the model's heads evenly, as vLLM demands."""
    if model.num_heads % tp:
        raise bad_value(
            f"{key}.tp", f"a divisor of the {model.num_heads} attention heads of {model.name}", tp
        )
