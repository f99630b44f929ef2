"""Model and GPU specs against published figures, and what bad files say."""

from __future__ import annotations

import pytest

from ersim.errors import ConfigError, DataError
from ersim.steptime import ModelSpec, load_gpu, load_model, load_prices
from ersim.steptime.specs import CONF_DIR


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama3.1-8b", 8_030_261_248),  # parameter counts of the published checkpoints
        ("llama3.1-70b", 70_553_706_496),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
    ],
)
def test_parameter_counts(name, params):
    assert load_model(name).params == params


def test_kv_bytes_per_token():
    assert load_model("llama3.1-8b").kv_bytes_per_token() == 131_072
    assert load_model("llama3.1-70b").kv_bytes_per_token(tp=8) == 327_680 / 8
    assert load_model("llama3.1-8b").kv_bytes_per_token(tp=8, bytes_per_value=1) == 131_072 / 16


def test_int4_is_a_little_over_half_a_byte():
    model = load_model("llama3.1-8b")
    quantised = model.weight_bytes("int4") - 2.0 * (model.embedding_params + model.norm_params)
    assert 0.5 < quantised / model.linear_params < 0.53


def test_every_gpu_and_price_is_sound():
    prices = load_prices()
    for path in (CONF_DIR / "gpu").glob("*.yaml"):
        gpu = load_gpu(path.stem)
        assert gpu.source
        assert 0 < gpu.flops_efficiency <= 1 and 0 < gpu.bandwidth_efficiency <= 1
        assert gpu.flops["bf16"] / gpu.bandwidth_bytes_s > 50  # FLOPs per byte: all are tensor-core GPUs
        assert gpu.name in prices


def test_unknown_names_list_the_choices():
    with pytest.raises(ConfigError, match=r"model must be one of:.*llama3.1-8b.*got 'llama4'"):
        load_model("llama4")
    with pytest.raises(ConfigError, match=r"gpu must be one of:.*h100-80gb"):
        load_gpu("h900")


def test_a_config_without_a_field_names_it():
    with pytest.raises(DataError, match=r"config\.json of tiny: num_hidden_layers must be an integer >= 1"):
        ModelSpec.from_hf_config(
            {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}, "tiny"
        )
