"""Evaluation: scalar and vectorised agree, interpolation is linear, doubt grows beyond the range."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ersim.config import EngineSettings, ExpertConfig
from ersim.steptime import build_expert_model
from ersim.steptime.evaluate import PreparedStepTime, SharedStepTime, graph_sizes, padded_tokens
from ersim.types import Batch

EXPERTS = {
    "tables": ExpertConfig(),
    "tables, FlashAttention 2": ExpertConfig(model="llama3.1-70b", gpu="a100-80gb", tp=4),
    "profile": ExpertConfig(gpu="rtx4090", engine=EngineSettings(max_model_len=4096)),
    "roofline": ExpertConfig(calibration="roofline"),
    "fp8 KV": ExpertConfig(precision="fp8", engine=EngineSettings(kv_cache_dtype="fp8")),
    "synchronous": ExpertConfig(engine=EngineSettings(async_scheduling=False)),
}
MODELS = {name: build_expert_model(config, "expert") for name, config in EXPERTS.items()}


def _decode(rows: int, total: int, longest: int) -> Batch:
    return Batch(rows, rows, total, longest, (), rows)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_decode_run_equals_its_steps(name, data):
    model = MODELS[name]
    rows = data.draw(st.integers(1, min(200, model.engine.max_num_seqs)))
    longest = data.draw(st.integers(1, 7000))
    total = data.draw(st.integers(longest, rows * longest))
    time_of = model.step_time(np.random.default_rng(data.draw(st.integers(0, 5))))
    run = time_of.decode_run_s(rows, total, longest, 7)
    steps = [time_of.step_s(_decode(rows, total + i * rows, longest + i)) for i in range(7)]
    assert run == pytest.approx(steps, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_more_work_takes_longer(name):
    time_of = MODELS[name].step_time(None)
    assert time_of.step_s(_decode(8, 8000, 1000)) < time_of.step_s(_decode(8, 32_000, 4000))
    assert time_of.step_s(_decode(8, 8000, 1000)) < time_of.step_s(_decode(200, 200_000, 1000))
    short = time_of.step_s(Batch(512, 0, 0, 0, [(512, 0)], 1))
    assert short < time_of.step_s(Batch(2048, 0, 0, 0, [(2048, 0)], 1))
    assert short < time_of.step_s(Batch(512, 0, 0, 0, [(512, 4096)], 1))


def test_uneven_contexts_cost_more():
    time_of = MODELS["profile"].step_time(None)
    assert time_of.step_s(_decode(32, 32_000, 3000)) > time_of.step_s(_decode(32, 32_000, 1000))


@pytest.mark.parametrize("tp", [1, 2])
def test_one_long_row_costs_more_where_contexts_are_no_longer_split(tp):
    """FlashAttention 2 on 188 multiprocessors splits contexts up to 37 rows of 8 KV heads, 75 of 4.

    Padded to CUDA graphs that is 32 and 72. From there on the longest row is walked by one block per head.
    """
    engine = EngineSettings(max_model_len=8192)
    time_of = build_expert_model(ExpertConfig(gpu="rtxpro6000", tp=tp, engine=engine), "x").step_time(None)

    def excess_s(rows: int) -> float:
        even = _decode(rows, rows * 1200, 1200)
        return time_of.step_s(_decode(rows, rows * 1200, 4200)) - time_of.step_s(even)

    split, whole, many = 32 * tp if tp == 1 else 72, 33 if tp == 1 else 73, 256
    assert excess_s(whole) > 3 * excess_s(split)
    assert excess_s(whole) == pytest.approx(excess_s(64 * tp), rel=0.25)  # the same walk, whoever else runs
    assert excess_s(many) / many < 0.25 * excess_s(whole) / whole  # later waves hide it


def test_decode_rows_cost_more_inside_a_prefill_step_of_flash_attention_2():
    time_of = MODELS["profile"].step_time(None)
    prefill = time_of.step_s(Batch(512, 0, 0, 0, [(512, 0)], 1))
    mixed = time_of.step_s(Batch(544, 32, 32_000, 1000, [(512, 0)], 33))
    alone = time_of.step_s(_decode(32, 32_000, 1000))
    assert mixed > prefill
    assert mixed - prefill > 0.2 * alone


def test_fp8_kv_cache_reads_faster():
    wide = build_expert_model(ExpertConfig(precision="fp8", calibration="roofline"), "expert").step_time(None)
    narrow_engine = EngineSettings(kv_cache_dtype="fp8")
    narrow = build_expert_model(
        ExpertConfig(precision="fp8", calibration="roofline", engine=narrow_engine), "expert"
    ).step_time(None)
    assert narrow.step_s(_decode(64, 256_000, 4000)) < wide.step_s(_decode(64, 256_000, 4000))


def test_synchronous_scheduling_shows_the_host():
    batch = _decode(4, 4000, 1000)
    assert MODELS["synchronous"].step_time(None).step_s(batch) > MODELS["tables"].step_time(None).step_s(
        batch
    )


def test_graph_padding_steps():
    sizes = graph_sizes(256)
    assert sizes[:5] == [1, 2, 4, 8, 16] and sizes[-1] == 512 and 248 in sizes and 264 not in sizes
    padded = padded_tokens(600, sizes)
    assert padded[[1, 3, 9, 250, 257, 512, 513]].tolist() == [1, 4, 16, 256, 272, 512, 513]
    time_of = MODELS["tables"].step_time(None)
    linear = [time_of._tokens[n] for n in (33, 36, 40)]
    assert linear[0] == linear[1] == linear[2]


def test_interpolation_is_linear_in_context():
    time_of = MODELS["tables"].step_time(None)
    low, middle, high = (time_of.step_s(_decode(16, 16 * c, c)) for c in (2048, 3072, 4096))
    assert middle == pytest.approx((low + high) / 2, rel=1e-9)


def test_draws_are_reproducible_and_spread_as_told():
    model = MODELS["tables"]
    batch = _decode(32, 32_000, 1500)
    first = model.step_time(np.random.default_rng(3)).step_s(batch)
    assert first == model.step_time(np.random.default_rng(3)).step_s(batch)
    draws = [model.step_time(np.random.default_rng(seed)).step_s(batch) for seed in range(60)]
    assert np.mean(draws) == pytest.approx(model.step_time(None).step_s(batch), rel=0.03)
    assert 0.01 < np.std(draws) / np.mean(draws) < 0.15


def test_beyond_the_range_is_counted_and_wider():
    engine = EngineSettings(max_model_len=130_000, max_num_seqs=8, kv_blocks=100_000)
    model = build_expert_model(ExpertConfig(engine=engine), "expert")
    inside, outside = _decode(8, 8 * 30_000, 30_000), _decode(8, 8 * 120_000, 120_000)
    mean = model.step_time(None)
    mean.step_s(inside)
    assert mean.beyond == {}
    mean.step_s(outside)
    assert mean.beyond["context_tokens"] > 0
    draws = [model.step_time(np.random.default_rng(seed)) for seed in range(40)]
    spread = [np.std([d.step_s(b) for d in draws]) / mean.step_s(b) for b in (inside, outside)]
    assert spread[1] > 1.2 * spread[0]


def _narrow(config: ExpertConfig, valid):
    """An expert that may run more than its calibration covers, told to cover `valid`."""
    engine = EngineSettings(
        max_model_len=60_000, max_num_seqs=400, max_num_batched_tokens=8192, kv_blocks=10**6
    )
    model = build_expert_model(dataclasses.replace(config, engine=engine), "expert")
    return dataclasses.replace(model, calibration=dataclasses.replace(model.calibration, valid=valid))


PREFILL_KEYS = {"prefill_chunk_tokens": (1, 512), "prefill_context_tokens": (0, 4096)}
RANGE = {"tokens": (1, 2048), "decode_seqs": (1, 64), "context_tokens": (0, 8192)}


@pytest.mark.parametrize("prefill_keys", [False, True])
@pytest.mark.parametrize("name", ["tables", "tables, FlashAttention 2", "profile", "linear"])
@pytest.mark.parametrize(
    ("key", "batch"),
    [
        ("tokens", Batch(4096, 0, 0, 0, [(512, 0)] * 8, 8)),
        ("decode_seqs", _decode(300, 300 * 500, 500)),
        ("context_tokens", _decode(8, 8 * 40_000, 40_000)),
        ("context_tokens", _decode(8, 8 * 4000, 20_000)),
        ("context_tokens", Batch(520, 8, 8 * 40_000, 40_000, [(512, 0)], 9)),
        ("prefill_context_tokens", Batch(512, 0, 0, 0, [(512, 40_000)], 1)),
        ("prefill_chunk_tokens", Batch(4096, 0, 0, 0, [(4096, 0)], 1)),
    ],
)
def test_whatever_lies_beyond_the_range_is_counted_and_widened(name, prefill_keys, key, batch):
    """Draws differ in how much longer than at the range's edge a step takes, whichever way it is left."""
    valid = RANGE | (PREFILL_KEYS if prefill_keys else {})
    key = key if key in valid else {"prefill_context_tokens": "context_tokens"}.get(key, "tokens")
    model = _linear_model(valid) if name == "linear" else _narrow(EXPERTS[name], valid)
    plain, wide = (_with_factor(model, factor) for factor in (1.0, 1.5))
    inside = plain.step_s(plain._at_edge(batch))
    assert plain.beyond == {}
    seconds = plain.step_s(batch)
    assert plain.beyond.get(key) == 1
    assert wide.step_s(batch) - inside == pytest.approx(1.5 * (seconds - inside), rel=1e-9)
    assert seconds > inside
    if not batch.prefills:
        run = batch.decode_seqs, batch.decode_context_tokens, batch.decode_context_max
        assert wide.decode_run_s(*run, 1)[0] == pytest.approx(wide.step_s(batch), rel=1e-12)
        assert wide.beyond[key] == 3  # two steps and a run of one


def _with_factor(model, factor):
    return PreparedStepTime(
        model.calibration,
        np.asarray(model.calibration.theta),
        max_tokens=8192,
        max_seqs=400,
        max_context=60_000,
        graphs=graph_sizes(400),
        asynchronous=True,
        beyond_factor=factor,
    )


def _linear_model(valid):
    """As fitted to recorded steps: every feature of a batch has its price, and nothing is tabulated."""
    names = ("step", "tokens", "sampled_seqs", "decode_context_tokens", "decode_skew_tokens", "prefill_pairs")
    names += ("prefill_context_tokens",)
    theta = (1e-3, 1e-5, 1e-5, 1e-8, 1e-9, 1e-10, 1e-9)
    terms = tuple({"kind": "linear", "feature": n, "side": "gpu", "label": n} for n in names)
    covariance = tuple(map(tuple, (np.diag(theta) ** 2 * 0.01).tolist()))
    model = _narrow(EXPERTS["tables"], valid)
    calibration = dataclasses.replace(model.calibration, terms=terms, theta=theta, covariance=covariance)
    return dataclasses.replace(model, calibration=calibration)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_costs_the_same_whatever_the_batch(name):
    """O(1): CPU time of one evaluation does not grow with rows or contexts (about 1 us when idle)."""
    time_of = MODELS[name].step_time(None)
    small, large = _decode(2, 300, 200), _decode(200, 600_000, 5000)
    ratios = [_cpu_s(time_of, large) / _cpu_s(time_of, small) for _ in range(7)]
    assert np.median(ratios) < 2.0


def _cpu_s(time_of, batch) -> float:
    start = time.process_time()
    for _ in range(3000):
        time_of.step_s(batch)
    return time.process_time() - start


def test_a_shared_step_time_is_equal_and_counts_its_own_excursions():
    first = MODELS["tables"].step_time(None)
    second = SharedStepTime(first)
    longer = _decode(8, 8 * 10**6, 10**6)
    assert second.step_s(longer) == first.step_s(longer) == SharedStepTime(second).step_s(longer)
    assert second.decode_run_s(8, 8000, 1000, 5).tolist() == first.decode_run_s(8, 8000, 1000, 5).tolist()
    assert first.beyond == second.beyond == {"context_tokens": 1}
    assert first.beyond is not second.beyond
