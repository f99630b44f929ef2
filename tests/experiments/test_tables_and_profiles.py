"""Building calibrations from raw tables and profiles; skipped where the raw data are not at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ersim.errors import DataError
from ersim.steptime import build_expert_model, load_gpu, load_model
from ersim.steptime.calibration import find, load
from ersim.types import Batch
from experiments.build_calibration import from_profile, from_tables, held_out
from experiments.layer_profile import LayerProfile, curve_of, fit_mixed, unsplit_rows
from experiments.op_tables import GemmTable, OpTables, layer_shapes, linear_maps_s, split_linear
from experiments.overheads import coefficients, load_overheads

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TABLE_DIR, PROFILE_DIR = DATA / "gpu-op-tables", DATA / "layer-profiles"
needs_tables = pytest.mark.skipif(not TABLE_DIR.is_dir(), reason="raw operator tables not at hand")
needs_profiles = pytest.mark.skipif(not PROFILE_DIR.is_dir(), reason="raw layer profiles not at hand")


def test_interpolation_between_shapes_is_linear():
    rows = [("bf16", m, n, k, 1e-3 * m * n * k) for m in (1, 16) for n in (64, 128) for k in (64, 128)]
    table = GemmTable(pd.DataFrame(rows, columns=["dtype", "m", "n", "k", "latency_ms"]), "bf16")
    expected = 1e-6 * np.asarray([1.0, 8.0]) * 96 * 80
    assert table.seconds(np.asarray([1.0, 8.0]), 96, 80) == pytest.approx(expected)
    assert table.seconds(np.asarray([32.0]), 256, 64) == pytest.approx([1e-6 * 32 * 256 * 64])


def test_missing_tables_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gemm_h100_sxm_vllm0\.24\.0\.csv is missing"):
        from_tables(tmp_path, "h100-80gb", "llama3.1-8b", "bf16", 1)
    with pytest.raises(DataError, match="no operator tables are known for l40s"):
        from_tables(tmp_path, "l40s", "llama3.1-8b", "bf16", 1)
    with pytest.raises(DataError, match="tp1 is missing"):
        from_profile(tmp_path, "rtx4090", "llama3.1-8b", 1)


def test_a_profile_of_another_gpu_or_model_is_refused(tmp_path):
    (tmp_path / "tp1").mkdir()
    (tmp_path / "meta.yaml").write_text("gpu: NVIDIA GeForce RTX 4090\nmodel: meta-llama/Llama-3.1-8B\n")
    with pytest.raises(DataError, match="profile of NVIDIA GeForce RTX 4090, but gpu=h100-80gb was asked"):
        from_profile(tmp_path, "h100-80gb", "llama3.1-8b", 1)
    with pytest.raises(DataError, match="but model=llama3"):
        from_profile(tmp_path, "rtx4090", "llama3.1-70b", 1)


@needs_tables
def test_the_shapes_are_those_that_were_measured():
    listed = pd.read_csv(TABLE_DIR / "llama_gemm_shapes.csv")
    for model, short in (("llama3.1-8b", "8b"), ("llama3.1-70b", "70b")):
        for tp in (1, 2, 4, 8):
            rows = listed[(listed.model == short) & (listed.tp == tp)].set_index("op")
            for name, n, k in layer_shapes(load_model(model), tp):
                assert (rows.n[name], rows.k[name]) == (n, k)


@needs_tables
@pytest.mark.parametrize("tokens", [1, 32, 256, 1024, 4096])
def test_corrected_linear_maps_agree_with_an_independent_measurement(tokens):
    """A100, 8B: Vidur's medians of the same GPU were never used to find the correction."""
    other = pd.read_csv(TABLE_DIR / "a100_Meta-Llama-3-8B_mlp_median_ms.csv")
    other = other[other.tp == 1].set_index("num_tokens")
    columns = ["attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms"]
    tables, model, overheads = (
        OpTables(TABLE_DIR, load_gpu("a100-80gb")),
        load_model("llama3.1-8b"),
        load_overheads(),
    )
    grid = np.asarray([1.0, 2.0, 4.0, 8.0, 16.0, float(tokens)])
    weights, arithmetic = split_linear(grid, linear_maps_s(tables, model, "bf16", 1, grid))
    ours = overheads.value("weights") * weights[-1] + overheads.value("arithmetic") * arithmetic[-1]
    assert ours == pytest.approx(model.num_layers * 1e-3 * other.loc[tokens, columns].sum(), rel=0.15)


@needs_tables
def test_attention_over_a_prefix_agrees_with_an_independent_measurement():
    """Derived prefix cost on A100 (32 heads, 4 KV heads) against Vidur's chunk by prefix table."""
    other = pd.read_csv(TABLE_DIR / "a100_llama70b-geometry_tp2_attn_prefill_ms.csv")
    table = other.set_index(["prefill_chunk", "kv_cache"]).attn_prefill_ms
    from experiments.op_tables import CHUNK_GRID, PREFIX_GRID

    ours, _ = OpTables(TABLE_DIR, load_gpu("a100-80gb")).prefill_attention_s(32, 4)
    for chunk in (512, 1024, 2048):
        row = ours[CHUNK_GRID.index(chunk)]
        added = float(np.interp(2048, PREFIX_GRID, row) - row[0])
        measured = 1e-3 * (table[chunk, 2048] - table[chunk, 0])
        assert added == pytest.approx(measured, rel=0.35), chunk


@needs_tables
def test_committed_files_are_what_the_tables_give():
    built = from_tables(TABLE_DIR, "h100-80gb", "llama3.1-8b", "fp8", 2)
    path = find("h100-80gb", "llama3.1-8b", "fp8", 2)
    assert path is not None
    assert built.digest == load(path).digest


@needs_profiles
def test_a_profiled_layer_comes_back():
    """At a profiled point the calibration gives the profile's own sum, but for its coefficients."""
    from ersim.config import EngineSettings, ExpertConfig

    engine = EngineSettings(max_model_len=4096, gpu_memory_utilization=0.9)
    model = build_expert_model(ExpertConfig(gpu="rtx4090", engine=engine), "expert")
    profile = LayerProfile(PROFILE_DIR / "RTX4090_Llama-3.1-8B_bf16", 1)
    tokens, dense = profile.dense_s(32)
    sequences, head = profile.per_sequence_s()
    attention = profile.attention()
    row = attention[
        (attention.prefill_chunk == 0) & (attention.n_decode == 32) & (attention.kv_decode == 1024)
    ]
    kernels = (
        float(np.interp(32, tokens, dense) + np.interp(32, sequences, head)) + 32e-6 * row.time_us.iloc[0]
    )
    step = model.step_time(None).step_s(Batch(32, 32, 32 * 1024, 1024, (), 32))
    assert step == pytest.approx(kernels, rel=0.05)


@needs_profiles
def test_mixed_attention_is_fitted_within_a_tenth():
    profile = LayerProfile(PROFILE_DIR / "RTX4090_Llama-3.1-8B_bf16", 1)
    theta, error = fit_mixed(profile.attention())
    assert error < 0.1
    assert all(value > 0 for value in theta.values())


def test_the_held_out_error_of_a_stepped_curve_is_not_the_height_of_its_steps():
    """Both ends of each tile are measured: a curve of steps is known, a point off its tiles' line is not."""
    ends = [1, *range(2, 17), *(x for tile in range(1, 20) for x in (16 * tile + 1, 16 * (tile + 1)))]
    tokens = sorted(set(ends))
    steps = [100.0 * -(-n // 16) for n in tokens]
    found = held_out([{"kind": "tokens", "tokens": tokens, "time_us": steps}])
    assert found["held_out_mape"] < 0.01 and found["held_out_prefill_mape"] < 0.01
    steps[tokens.index(64)] *= 1.5
    worse = held_out([{"kind": "tokens", "tokens": tokens, "time_us": steps}])
    assert worse["held_out_mape"] > found["held_out_mape"] + 0.005
    assert worse["held_out_prefill_mape"] == found["held_out_prefill_mape"]


def test_doubt_of_the_curves_widens_linear_maps_alone():
    terms = [{"label": "weights", "side": "gpu"}, {"label": "decode attention", "side": "gpu"}]
    overheads = load_overheads()
    chosen = {"calibration": "new", "source": "tables", "precision": "bf16", "derived": False}
    plain, wide = (
        np.asarray(coefficients(terms, overheads, **chosen, maps_rel_std=s)[1]) for s in (0.0, 0.1)
    )
    assert wide[0, 0] == pytest.approx(plain[0, 0] + 0.01 * overheads.value("weights") ** 2, rel=1e-3)
    assert wide[1, 1] == plain[1, 1]


def test_a_jump_lies_between_profiled_rows():
    found = curve_of({16: 0.02, 32: 0.16, 64: 0.08}, 25)
    assert found["sequences"] == [16, 24, 25, 28, 32, 64]
    assert found["share"] == pytest.approx([0.02, 0.02, 0.16 * 32 / 25, 0.16 * 32 / 28, 0.16, 0.08], abs=1e-4)
    assert curve_of({16: 0.02, 32: 0.16}, None) == {"sequences": [16, 32], "share": [0.02, 0.16]}


@needs_profiles
@pytest.mark.parametrize(
    ("folder", "gpu", "tp"),
    [
        ("RTX4090_Llama-3.1-8B_bf16", "rtx4090", 1),
        ("RTXPRO6000_Llama-3.1-8B_bf16", "rtxpro6000", 1),
        ("RTXPRO6000_Llama-3.1-8B_bf16", "rtxpro6000", 2),
    ],
)
def test_profiles_jump_where_flash_attention_stops_splitting(folder, gpu, tp):
    """From where on long contexts cost more follows from multiprocessors and KV heads, in all profiles."""
    heads = load_model("llama3.1-8b").kv_heads_per_gpu(tp)
    jump = unsplit_rows(heads, load_gpu(gpu).multiprocessors)
    found = LayerProfile(PROFILE_DIR / folder, tp).skew(heads, load_gpu(gpu).multiprocessors, mixed=False)
    share = dict(zip(found["sequences"], found["share"], strict=True))
    profiled = [8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
    below, above = max(n for n in profiled if n < jump), min(n for n in profiled if n >= jump)
    assert share[above] > 3 * share[below]
    assert all(share[n] > share[2 * n] for n in profiled if above <= n < 256)
