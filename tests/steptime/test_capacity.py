"""KV capacity against recorded starts of real servers, and the error that says what would fit."""

from __future__ import annotations

import pytest

from ersim.config import EngineSettings, ExpertConfig
from ersim.errors import DoesNotFitError
from ersim.steptime import build_expert_model, load_gpu, load_model


def _blocks(model: str, gpu: str, tp: int = 1, precision: str = "bf16", **engine) -> int:
    config = ExpertConfig(
        model=model,
        gpu=gpu,
        tp=tp,
        precision=precision,
        calibration="roofline",
        engine=EngineSettings(**engine),
    )
    return build_expert_model(config, "expert").engine.kv_blocks


def test_rtx4090_8b_as_recorded():
    assert _blocks("llama3.1-8b", "rtx4090", gpu_memory_utilization=0.9) == pytest.approx(2588, rel=0.03)


@pytest.mark.parametrize("seqs", [128, 256, None])
def test_h100_70b_tp4_as_recorded(seqs):
    blocks = _blocks("llama3.1-70b", "h100-80gb", tp=4, gpu_memory_utilization=0.9, max_num_seqs=seqs)
    assert blocks == pytest.approx(30_251, rel=0.03)


def test_fp8_kv_cache_doubles_the_blocks():
    wide = _blocks("llama3.1-8b", "h100-80gb")
    assert _blocks("llama3.1-8b", "h100-80gb", kv_cache_dtype="fp8") in (2 * wide, 2 * wide + 1)


def test_more_memory_utilization_and_fewer_weights_leave_more_blocks():
    low = _blocks("llama3.1-70b", "h200-141gb", precision="fp8", gpu_memory_utilization=0.8)
    high = _blocks("llama3.1-70b", "h200-141gb", precision="fp8", gpu_memory_utilization=0.9)
    small = _blocks("llama3.1-70b", "h200-141gb", precision="int4", gpu_memory_utilization=0.9)
    per_block = 16 * load_model("llama3.1-70b").kv_bytes_per_token()
    assert (high - low) * per_block == pytest.approx(0.1 * load_gpu("h200-141gb").memory_bytes, rel=0.01)
    assert small > high


def test_what_does_not_fit_says_by_how_much_and_what_would():
    with pytest.raises(DoesNotFitError, match=r"fleet.experts.big.*68\.\d+ GB short.*tp=2.*precision=fp8"):
        build_expert_model(ExpertConfig(model="llama3.1-70b", gpu="h100-80gb"), "fleet.experts.big")


def test_a_request_longer_than_the_cache_is_refused_as_vllm_does():
    with pytest.raises(DoesNotFitError, match="max_model_len="):
        _blocks("llama3.1-8b", "rtx4090", max_model_len=131_072)


@pytest.mark.parametrize(
    ("gpu", "tokens", "seqs"),
    [("a100-80gb", 2048, 256), ("h100-80gb", 8192, 1024), ("b200", 16384, 1024), ("rtx4090", 2048, 256)],
)
def test_engine_defaults_follow_the_gpu(gpu, tokens, seqs):
    engine = build_expert_model(ExpertConfig(gpu=gpu), "expert").engine
    assert (engine.max_num_batched_tokens, engine.max_num_seqs) == (tokens, seqs)
    assert engine.block_size == 16
    assert engine.async_scheduling
