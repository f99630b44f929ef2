"""On real grades (GSM8K, two models): learnt beats length, length beats random. Skips without the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ersim.config import PromptSetConfig, RouterConfig
from experiments.route_eval import evaluate
from experiments.route_schema import RouteConfig, SetConfig

DATA = Path(__file__).parents[3] / "shared" / "data" / "router-quality" / "routellm_mmlu_gsm8k.parquet"


@pytest.mark.skipif(not DATA.is_file(), reason="needs the graded prompt sets")
def test_learnt_routers_beat_the_baselines_on_prompts_they_did_not_see() -> None:
    labelled = SetConfig(
        name="gsm8k",
        prompts=PromptSetConfig(
            path=str(DATA), quality_columns={"strong": "strong_correct", "weak": "weak_correct"}
        ),
        where={"benchmark": "gsm8k", "contaminated": False},
        strong="strong",
        weak="weak",
        routers={
            "length": RouterConfig(policy="prompt_length"),
            "ridge": RouterConfig(policy="threshold", params={"predictor": "ridge"}),
        },
    )
    outcomes = evaluate(RouteConfig(set=labelled, train=0.8, seeds=4))
    apgr = {o.router: float(np.mean([row["apgr"] for row in o.figures])) for o in outcomes if o.curves}
    assert apgr["random"] == pytest.approx(0.5)
    assert 0.53 < apgr["length"] < apgr["oracle (sees the answers)"]
    assert 0.56 < apgr["ridge"] < apgr["oracle (sees the answers)"]
