"""What one replica's engine is configured with: vLLM's own engine arguments, all resolved."""

from __future__ import annotations

from dataclasses import dataclass

from ersim.errors import bad_value, unknown_choice

VLLM_VERSION = "0.32.0"
"""The vLLM release whose scheduler this room equals step by step; the oracle checks the claim."""

POLICIES = ("fcfs", "priority")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The arguments that decide what runs in a step, under vLLM's names; nothing is left to a default table.

    num_blocks counts KV blocks as vLLM does, its null block included: num_blocks - 1 are usable.
    watermark is the fraction of num_blocks kept free when a request is admitted beside running ones.
    Raises ConfigError for values that vLLM would refuse.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 8192
    block_size: int = 16
    num_blocks: int = 4096
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    policy: str = "fcfs"
    watermark: float = 0.0
    scheduler_reserve_full_isl: bool = True
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size"):
            if getattr(self, name) < 1:
                raise bad_value(f"engine.{name}", ">= 1", getattr(self, name))
        if self.num_blocks < 2:
            raise bad_value("engine.num_blocks", ">= 2 (one block is vLLM's null block)", self.num_blocks)
        if self.long_prefill_token_threshold < 0:
            raise bad_value("engine.long_prefill_token_threshold", ">= 0", self.long_prefill_token_threshold)
        if not 0.0 <= self.watermark < 1.0:
            raise bad_value("engine.watermark", "in [0, 1)", self.watermark)
        if self.policy not in POLICIES:
            raise unknown_choice("engine.policy", self.policy, POLICIES)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise bad_value(
                "engine.max_num_batched_tokens",
                f">= max_num_seqs ({self.max_num_seqs}), as vLLM demands",
                self.max_num_batched_tokens,
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise bad_value(
                "engine.max_num_batched_tokens",
                f">= max_model_len ({self.max_model_len}) when chunked prefill is off, as vLLM demands",
                self.max_num_batched_tokens,
            )
