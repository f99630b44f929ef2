"""The roofline against the measured calibrations: right on the whole, never far off, labelled."""

from __future__ import annotations

import numpy as np
import pytest

from ersim.config import EngineSettings, ExpertConfig
from ersim.steptime import build_expert_model
from ersim.types import Batch

CASES = [
    (gpu, model, precision, tp)
    for gpu in ("a100-80gb", "h100-80gb", "h200-141gb")
    for model, precision, tp in (
        ("llama3.1-8b", "bf16", 1),
        ("llama3.1-70b", "bf16", 4),
        ("llama3.1-70b", "fp8", 2),
        ("llama3.1-8b", "int4", 1),
    )
]
BATCHES = [
    Batch(1, 1, 1000, 1000, (), 1),
    Batch(32, 32, 32_000, 1000, (), 32),
    Batch(128, 128, 128_000, 1000, (), 128),
    Batch(2048, 0, 0, 0, [(2048, 0)], 1),
]


def _ratios() -> np.ndarray:
    engine = EngineSettings(max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096)
    found = []
    for gpu, model, precision, tp in CASES:
        config = ExpertConfig(model=model, precision=precision, gpu=gpu, tp=tp, engine=engine)
        measured = build_expert_model(config, "expert")
        config.calibration = "roofline"
        guessed = build_expert_model(config, "expert")
        assert measured.calibration.calibrated and not guessed.calibration.calibrated
        times = measured.step_time(None), guessed.step_time(None)
        found.append([times[1].step_s(batch) / times[0].step_s(batch) for batch in BATCHES])
    return np.asarray(found)


def test_the_roofline_is_right_on_the_whole():
    ratios = _ratios()
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1.0, abs=0.08)
    assert np.mean(np.abs(np.log(ratios))) < 0.15
    assert ratios.min() > 0.55 and ratios.max() < 1.6


def test_its_interval_is_wide():
    expert = build_expert_model(ExpertConfig(gpu="l40s", calibration="roofline"), "expert")
    draws = [expert.step_time(np.random.default_rng(i)).step_s(BATCHES[1]) for i in range(60)]
    assert 0.09 < np.std(draws) / np.mean(draws) < 0.2
