"""Fitting recorded steps: known coefficients come back, held-out error is the noise, small models work."""

from __future__ import annotations

import numpy as np
import pytest

from ersim.config import EngineSettings, ExpertConfig
from ersim.errors import DataError
from ersim.steptime import build_expert_model, fit_live_calibration, load, save
from ersim.steptime.evaluate import PreparedStepTime
from ersim.steptime.fit import batch_features, design_matrix
from ersim.types import Batch

CONFIG = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32_000,
}
ENGINE = {"max_num_seqs": 16, "max_num_batched_tokens": 2048, "block_size": 128, "async_scheduling": False}


def _true_s(batch: Batch) -> float:
    pairs = sum(chunk * (context + chunk / 2) for chunk, context in batch.prefills)
    return 0.031 + 3e-4 * batch.tokens + 1e-6 * batch.decode_context_tokens + 1e-7 * pairs


def _record(steps: int, noise: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    batches, durations = [], []
    for _ in range(steps):
        rows = int(rng.integers(0, 16))
        contexts = rng.integers(1, 2000, size=rows)
        prefills = []
        if rows == 0 or rng.random() < 0.3:
            prefills = [(int(rng.integers(1, 1500)), int(rng.integers(0, 2)) * 512)]
        tokens = rows + sum(chunk for chunk, _ in prefills)
        longest = int(contexts.max()) if rows else 0
        batch = Batch(tokens, rows, int(contexts.sum()), longest, prefills, rows + len(prefills))
        batches.append(batch)
        durations.append(_true_s(batch) * rng.lognormal(0, noise))
    return batches, durations


def _fit(batches, durations, **changes):
    arguments = dict(
        name="live",
        model="llama-tiny",
        precision="bf16",
        gpu="cpu",
        tp=1,
        vllm_version="0.32.0",
        kv_blocks=77,
        engine=ENGINE,
        provenance={"model_config": CONFIG, "date": "2026-11-20"},
        seed=1,
    )
    return fit_live_calibration(batches, durations, **{**arguments, **changes})


def test_known_coefficients_come_back(tmp_path):
    calibration = _fit(*_record(1500, 0.03))
    assert calibration.fit["held_out_mape"] == pytest.approx(0.024, abs=0.006)  # mean |N(0, 0.03)|
    assert calibration.residual_rel_std == pytest.approx(0.03, rel=0.15)
    path = tmp_path / "live.json"
    save(calibration, path)
    assert load(path) == calibration
    expert = ExpertConfig(
        model="llama-tiny", calibration=str(path), engine=EngineSettings(max_model_len=4096)
    )
    model = build_expert_model(expert, "expert")
    assert (model.engine.kv_blocks, model.engine.block_size, model.engine.async_scheduling) == (
        77,
        128,
        False,
    )
    assert model.usd_per_hour is None
    batches, _ = _record(200, 0.0, seed=9)
    time_of = model.step_time(None)
    errors = [time_of.step_s(batch) / _true_s(batch) - 1 for batch in batches]
    assert np.mean(np.abs(errors)) < 0.01


def test_the_covariance_covers_the_truth():
    batches, durations = _record(800, 0.05)
    calibration = _fit(batches, durations)
    probe = Batch(8, 8, 8000, 1800, (), 8)
    matrix = np.linalg.cholesky(np.asarray(calibration.covariance) + 1e-18 * np.eye(len(calibration.theta)))
    assert np.isfinite(matrix).all()
    row = design_matrix(calibration.terms, batch_features([probe]))[0]
    predicted = float(row @ np.asarray(calibration.theta))
    spread = float(np.sqrt(row @ np.asarray(calibration.covariance) @ row))
    assert abs(predicted - _true_s(probe)) < 4 * spread + 0.01 * predicted


def test_one_stall_does_not_move_the_fit():
    batches, durations = _record(600, 0.02)
    durations[100] = 60.0
    calibration = _fit(batches, durations)
    assert calibration.fit["dropped_outliers"] == 1
    assert calibration.fit["held_out_mape"] < 0.03


def test_the_same_seed_gives_the_same_file():
    record = _record(300, 0.03)
    assert _fit(*record).digest == _fit(*record).digest


def test_steps_that_scatter_are_told_by_their_mean():
    """Errors relative to the measured time would tell 1 - 2 s^2 of it: 8 % too little at a scatter of 0.2."""
    rng = np.random.default_rng(3)
    batches, _ = _record(3000, 0.0)
    scatter = rng.normal(1.0, 0.2, len(batches)).clip(0.4, 1.6)
    durations = [_true_s(batch) * factor for batch, factor in zip(batches, scatter, strict=True)]
    calibration = _fit(batches, durations)
    assert abs(calibration.fit["bias"]) < 0.002
    told = design_matrix(calibration.terms, batch_features(batches)) @ np.asarray(calibration.theta)
    true = np.array([_true_s(batch) for batch in batches])
    prefill = np.array([bool(batch.prefills) for batch in batches])
    for kind in (prefill, ~prefill):
        assert np.mean(told[kind] / true[kind]) == pytest.approx(1.0, abs=0.015)


def test_two_tokens_may_take_a_kernel_of_their_own():
    rng = np.random.default_rng(4)
    batches = [Batch(n, n, 100 * n, 100, (), n) for n in rng.choice([1, 2, 3, 4, 8], 1500).tolist()]
    truth = {1: 0.015, 2: 0.018, 3: 0.0155, 4: 0.016, 8: 0.018}
    calibration = _fit(batches, [truth[batch.tokens] * rng.normal(1.0, 0.03) for batch in batches])
    assert any(term["label"] == "more for 2 tokens" for term in calibration.terms)
    time_of = PreparedStepTime(
        calibration, np.asarray(calibration.theta),
        max_tokens=64, max_seqs=16, max_context=512, graphs=[], asynchronous=False,
    )  # fmt: skip
    for tokens, seconds in truth.items():
        batch = Batch(tokens, tokens, 100 * tokens, 100, (), tokens)
        assert time_of.step_s(batch) == pytest.approx(seconds, rel=0.01)
    drawn = [
        PreparedStepTime(
            calibration, calibration.sample_theta(np.random.default_rng(seed)),
            max_tokens=64, max_seqs=16, max_context=512, graphs=[], asynchronous=False,
        )
        for seed in range(300)
    ]  # fmt: skip
    for tokens in truth:
        batch = Batch(tokens, tokens, 100 * tokens, 100, (), tokens)
        mean_s = np.mean([one.step_s(batch) for one in drawn])
        assert mean_s == pytest.approx(time_of.step_s(batch), rel=0.005), "no term stands for another"
    assert any(term["kind"] == "tokens" for term in _fit(*_record(300, 0.03)).terms)
    on_graphs = _fit(*_record(300, 0.03), engine={**ENGINE, "cudagraph_sizes": [1, 2, 4, 8, 16]})
    assert not any(term["kind"] == "tokens" for term in on_graphs.terms), "graphs pad two tokens anyway"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b, d: (b, d[:-1]), "one duration per batch"),
        (lambda b, d: (b[:5], d[:5]), "too few"),
        (lambda b, d: (b, [*d[:-1], 0.0]), r"durations_s\[\d+\] must be > 0"),
        (lambda b, d: (b, [float("nan"), *d[1:]]), r"durations_s\[0\] must be > 0"),
    ],
)
def test_impossible_records_are_refused(change, match):
    with pytest.raises(DataError, match=match):
        _fit(*change(*_record(100, 0.03)))
