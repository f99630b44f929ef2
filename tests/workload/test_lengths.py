"""Fitted lengths against the traffic and the figures that they stand for."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ersim.config import LengthsConfig
from ersim.errors import ConfigError
from ersim.workload.fit_lengths import main as fit
from ersim.workload.fit_lengths import render
from ersim.workload.lengths import fitted_kinds, length_model

TRACES = {"conversation": "splitwise_conv.csv", "code": "splitwise_code.csv"}
DATA = Path(__file__).parents[2] / "ersim" / "workload" / "data" / "lengths.json"


def draw(kind: str, size: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return length_model(LengthsConfig(kind=kind)).draw(rng.random(size), rng.random(size))


@pytest.mark.parametrize("kind", TRACES)
def test_fit_reproduces_the_trace_marginally(kind: str, shared_data: Path) -> None:
    """Two-sample KS distance below 0.01 and means within 2 % for prompt and answer."""
    trace = pd.read_csv(shared_data / "traces" / TRACES[kind])
    prompt, output = draw(kind)
    for drawn, real in ((prompt, trace.num_prefill_tokens), (output, trace.num_decode_tokens)):
        assert stats.ks_2samp(drawn, real).statistic < 0.01
        assert drawn.mean() == pytest.approx(real.mean(), rel=0.02)
        assert drawn.std() == pytest.approx(real.std(), rel=0.05)


@pytest.mark.parametrize("kind", TRACES)
def test_fit_reproduces_how_answers_depend_on_prompts(kind: str, shared_data: Path) -> None:
    """KS distance of the answer length below 0.06 within each tenth of the prompt lengths."""
    trace = pd.read_csv(shared_data / "traces" / TRACES[kind])
    prompt, output = draw(kind)
    edges = np.quantile(trace.num_prefill_tokens, np.linspace(0, 1, 11))
    for low, high in pairwise(edges):
        real = trace.num_decode_tokens[trace.num_prefill_tokens.between(low, high)]
        drawn = output[(prompt >= low) & (prompt <= high)]
        assert stats.ks_2samp(drawn, real).statistic < 0.06


def test_committed_coefficients_are_those_of_the_fit(shared_data: Path) -> None:
    tables = fit(*(shared_data / "traces" / TRACES[kind] for kind in ("conversation", "code")))
    assert json.loads(render(tables)) == json.loads(DATA.read_text("utf-8"))


def test_summarisation_has_the_published_means() -> None:
    """CNN/DailyMail: 781 and 56 words on average, 4/3 tokens a word; nothing above the cut."""
    prompt, output = draw("summarisation")
    assert prompt.mean() == pytest.approx(781 * 4 / 3, rel=0.02)
    assert output.mean() == pytest.approx(56 * 4 / 3, rel=0.02)
    assert prompt.max() <= round(2000 * 4 / 3)


@pytest.mark.parametrize("kind", ["conversation", "code", "summarisation"])
def test_every_uniform_gives_a_whole_positive_length(kind: str) -> None:
    edge = np.array([1e-12, 0.5, 1 - 1e-12])
    for prompt_u in edge:
        prompt, output = length_model(LengthsConfig(kind=kind)).draw(np.full(3, prompt_u), edge)
        assert prompt.dtype == output.dtype == np.int64
        assert prompt.min() >= 1 and output.min() >= 1


def test_every_fitted_kind_names_its_source() -> None:
    assert fitted_kinds() == ["code", "conversation", "summarisation"]
    for kind in fitted_kinds():
        assert len(length_model(LengthsConfig(kind=kind)).source) > 40


def test_constant_lengths() -> None:
    config = LengthsConfig(kind="constant", prompt_tokens=512, output_tokens=64)
    prompt, output = length_model(config).draw(np.random.random(5), np.random.random(5))
    assert prompt.tolist() == [512] * 5 and output.tolist() == [64] * 5


def test_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(ConfigError, match=r"lengths.kind must be one of: .*conversation.*got 'chat'"):
        length_model(LengthsConfig(kind="chat"))


def test_constant_without_lengths_is_an_error() -> None:
    with pytest.raises(ConfigError, match="must be set for constant"):
        length_model(LengthsConfig(kind="constant"))
