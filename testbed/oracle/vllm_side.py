"""vLLM's own V1 `Scheduler` as a side, without model, worker or GPU.

Only this file of the oracle needs vLLM installed. The scheduler gets a one-layer full-attention KV
cache configuration and a made-up Llama `config.json`; outputs are scripted, so that each request
ends exactly where its specification says.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from ersim.engine import EngineConfig
from ersim.types import Segment
from testbed.oracle.cases import RequestSpec
from testbed.oracle.sides import Observation

os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STOP_TOKEN = 7
"""The token that ends an answer early; no content contains it."""

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32000,
    "max_position_embeddings": 1 << 20,
    "torch_dtype": "bfloat16",
}


def vllm_version() -> str:
    """The installed release."""
    import vllm

    return str(vllm.__version__)


class Vllm:
    """What every vLLM side needs once: imports, a model folder, a hash function."""

    def __init__(self) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import init_none_hash

        self._folder = tempfile.TemporaryDirectory(prefix="ersim-oracle-")
        Path(self._folder.name, "config.json").write_text(json.dumps(_MODEL))
        self.hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(self.hash_function)

    def scheduler(self, config: EngineConfig) -> Any:
        """Build a scheduler with these settings."""
        import torch
        from vllm.config import (
            CacheConfig,
            DeviceConfig,
            ModelConfig,
            ParallelConfig,
            SchedulerConfig,
            VllmConfig,
        )
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        whole = VllmConfig(
            model_config=ModelConfig(
                model=self._folder.name,
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=config.max_model_len,
                seed=0,
            ),
            scheduler_config=SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                long_prefill_token_threshold=config.long_prefill_token_threshold,
                enable_chunked_prefill=config.enable_chunked_prefill,
                is_encoder_decoder=False,
                policy=config.policy,
                watermark=config.watermark,
                scheduler_reserve_full_isl=config.scheduler_reserve_full_isl,
            ),
            cache_config=CacheConfig(
                block_size=config.block_size, enable_prefix_caching=config.enable_prefix_caching
            ),
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig("cpu"),
        )
        # the CPU platform overrides these; what is compared is the scheduler, not the platform
        whole.scheduler_config.async_scheduling = config.async_scheduling
        whole.scheduler_config.enable_chunked_prefill = config.enable_chunked_prefill
        whole.cache_config.enable_prefix_caching = config.enable_prefix_caching
        whole.cache_config.block_size = config.block_size
        whole.cache_config.num_gpu_blocks = config.num_blocks
        attention = FullAttentionSpec(
            block_size=config.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        return (AsyncScheduler if config.async_scheduling else Scheduler)(
            vllm_config=whole,
            kv_cache_config=KVCacheConfig(
                num_blocks=config.num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], attention)],
            ),
            block_size=config.block_size,
            hash_block_size=config.block_size,
            log_stats=False,
            structured_output_manager=StructuredOutputManager(whole),
        )


class VllmSide:
    """One vLLM scheduler, driven with scripted outputs."""

    def __init__(self, vllm: Vllm, config: EngineConfig) -> None:
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher

        self.scheduler = vllm.scheduler(config)
        self.max_model_len = config.max_model_len
        self.hasher = (
            get_request_block_hasher(config.block_size, vllm.hash_function)
            if config.enable_prefix_caching
            else None
        )
        self.flight: deque[tuple[Any, list[str]]] = deque()
        self.specs: dict[str, RequestSpec] = {}
        self.contents: dict[Any, int] = {}
        self.arrivals = 0

    def add(self, spec: RequestSpec) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        name = str(spec.request_id)
        self.specs[name] = spec
        request = Request(
            request_id=name,
            prompt_token_ids=self._prompt(spec),
            sampling_params=SamplingParams(
                max_tokens=spec.max_tokens, ignore_eos=True, stop_token_ids=[STOP_TOKEN]
            ),
            pooling_params=None,
            arrival_time=float(self.arrivals),
            priority=spec.priority,
            block_hasher=self.hasher,
        )
        self.arrivals += 1
        self.scheduler.add_request(request)

    def _tokens(self, content: Any, start: int, count: int) -> range:
        number = self.contents.setdefault(content, len(self.contents))
        first = 1000 + number * 1_000_000 + start
        return range(first, first + count)

    def _prompt(self, spec: RequestSpec) -> list[int]:
        segments = spec.segments or (Segment(-1 - spec.request_id, spec.prompt_tokens),)
        return [
            token for segment in segments for token in self._tokens(segment.content_id, 0, segment.tokens)
        ]

    def _answer(self, spec: RequestSpec, position: int) -> int:
        limit = min(spec.max_tokens, self.max_model_len - spec.prompt_tokens)
        if position + 1 == spec.output_tokens < limit:  # at the limit itself the request ends by length
            return STOP_TOKEN
        content = spec.output_content_id
        key = ("private answer", spec.request_id) if content is None else content
        return self._tokens(key, position, 1)[0]

    def abort(self, request_id: int) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests([str(request_id)], RequestStatus.FINISHED_ABORTED)

    def has_requests(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def schedule(self) -> Observation:
        scheduler = self.scheduler
        before = {r.request_id: r.num_preemptions for r in scheduler.waiting}
        decoding = {r.request_id for r in scheduler.running if not r.is_prefill_chunk}
        output = scheduler.schedule()
        counts = output.num_scheduled_tokens
        requests = scheduler.requests
        emitting = [name for name in counts if not requests[name].is_prefill_chunk]
        self.flight.append((output, emitting))
        contexts = [requests[name].num_computed_tokens - counts[name] for name in counts if name in decoding]
        joined = [r.request_id for r in scheduler.running if r.request_id in before]
        return self._state() | {
            "scheduled": sorted((int(name), count) for name, count in counts.items()),
            "tokens": output.total_num_scheduled_tokens,
            "admitted": [int(name) for name in joined if not before[name]],
            "resumed": [int(name) for name in joined if before[name]],
            "preempted": sorted(int(name) for name in output.preempted_req_ids or ()),
            "sampled": len(emitting),
            "prefills": sorted(
                (count, requests[name].num_computed_tokens - count)
                for name, count in counts.items()
                if name not in decoding
            ),
            "decodes": (len(contexts), sum(contexts), max(contexts, default=0)),
        }

    def update(self) -> Observation:
        from vllm.v1.outputs import ModelRunnerOutput

        output, emitting = self.flight.popleft()
        names = list(output.num_scheduled_tokens)
        emits = set(emitting)
        sampled: list[list[int]] = []
        first = []
        for name in names:
            request = self.scheduler.requests.get(name)
            if name not in emits:
                sampled.append([])
                continue
            position = 0 if request is None else request.num_output_tokens
            sampled.append([self._answer(self.specs[name], position)])
            if request is not None and position == 0:
                first.append(int(name))
        result = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=sampled,
            ),
        )
        outputs = [entry for group in result.values() for entry in group.outputs]
        return self._state() | {
            "finished": sorted(
                (int(entry.request_id), str(entry.finish_reason))
                for entry in outputs
                if entry.finish_reason is not None
            ),
            "tokens_out": sum(len(entry.new_token_ids) for entry in outputs),
            "first": sorted(first),
        }

    def _state(self) -> Observation:
        scheduler = self.scheduler
        return {
            "running": [
                (int(r.request_id), r.num_computed_tokens, r.num_output_tokens) for r in scheduler.running
            ],
            "waiting": [(int(r.request_id), r.num_output_tokens) for r in scheduler.waiting],
            "free_blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        }
