"""No committed calibration may beat the datasheet: FLOPs / peak for prefill, bytes / bandwidth for decode."""

from __future__ import annotations

import pytest

from ersim.config import EngineSettings, ExpertConfig
from ersim.steptime import build_expert_model, list_files, load, load_gpu, load_model
from ersim.types import Batch

FILES = [path for path in list_files() if load(path).gpu != "cpu"]


def _expert(path):
    calibration = load(path)
    config = ExpertConfig(
        model=calibration.model,
        precision=calibration.precision,
        gpu=calibration.gpu,
        tp=calibration.tp,
        calibration=str(path),
        engine=EngineSettings(
            max_num_seqs=256, max_num_batched_tokens=16_384, kv_blocks=10_000, max_model_len=131_072
        ),
    )
    return build_expert_model(config, "expert"), calibration


def test_there_are_calibrations():
    assert len(FILES) > 80


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_prefill_never_beats_peak_flops(path):
    expert, calibration = _expert(path)
    model, gpu, tp = load_model(calibration.model), load_gpu(calibration.gpu), calibration.tp
    # Weight-only precisions compute in bf16; A100 has no fp8 cores.
    peak = gpu.flops["bf16"] if calibration.precision == "int4" else gpu.peak_flops(calibration.precision)
    time = expert.step_time(None)
    chunks = ((c, 0) for c in (256, 1024, 2048, 3000, 8192, 16_384))
    for chunk, context in (*chunks, (2048, 8192), (512, 16_384), (8192, 32_768), (2048, 120_000)):
        step = time.step_s(Batch(chunk, 0, 0, 0, [(chunk, context)], 0))
        linear = chunk * model.linear_flops_per_token(tp) / peak
        attention = model.attention_flops(chunk, context, tp) / gpu.flops["bf16"]
        assert step >= linear + attention, (chunk, context)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_decode_never_beats_bandwidth(path):
    expert, calibration = _expert(path)
    model, gpu, tp = load_model(calibration.model), load_gpu(calibration.gpu), calibration.tp
    weights = model.weight_bytes(calibration.precision, tp) - 2.0 * model.embedding_params / 2 / tp
    time = expert.step_time(None)
    for rows, context in (
        *((1, c) for c in (128, 16_384, 32_768, 131_000)),
        *((16, 2048), (16, 32_768), (64, 4096), (256, 1024), (32, 16_384)),
    ):
        step = time.step_s(Batch(rows, rows, rows * context, context, [], rows))
        read = weights + rows * context * model.kv_bytes_per_token(tp)
        assert step >= read / gpu.bandwidth_bytes_s, (rows, context)
