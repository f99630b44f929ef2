from __future__ import annotations

import numpy as np
import pytest

from ersim.config import RouterConfig
from ersim.errors import ConfigError
from ersim.routing import build_policy
from ersim.types import FleetState, Prompt, RoutingQuery


def fit(pair: FleetState, prompts: list[Prompt], **params):  # type: ignore[no-untyped-def]
    return build_policy(RouterConfig(policy="threshold", params=params), pair.experts, prompts[:300], 1)


def share(policy, prompts: list[Prompt]) -> float:  # type: ignore[no-untyped-def]
    return float(np.mean(policy.decide(policy.score([RoutingQuery(p.text) for p in prompts])) == 1))


@pytest.mark.parametrize("predictor", ["ridge", "knn", "logistic", "matrix_factorisation", "blend"])
def test_predicts_where_the_strong_model_is_needed(pair: FleetState, make_prompts, predictor: str) -> None:  # type: ignore[no-untyped-def]
    prompts = make_prompts(800)
    policy = fit(pair, prompts, predictor=predictor)
    needs = policy.need([RoutingQuery(p.text) for p in prompts[300:]])
    code = np.array([p.domain == "code" for p in prompts[300:]])
    assert needs[~code].mean() > needs[code].mean() + 0.2  # the small model knows code and little else


def test_share_is_met_and_changes_without_training(pair: FleetState, make_prompts) -> None:  # type: ignore[no-untyped-def]
    prompts = make_prompts(900)
    policy = fit(pair, prompts, share=0.3)
    weights = policy.predictor._weights
    assert share(policy, prompts[300:]) == pytest.approx(0.3, abs=0.08)
    for target in (0.0, 0.6, 1.0):
        policy.adjust(share=target)
        assert share(policy, prompts[300:]) == pytest.approx(target, abs=0.08)
    assert policy.predictor._weights is weights


def test_quality_level_costs_fewer_strong_calls_than_random_would(pair: FleetState, make_prompts) -> None:  # type: ignore[no-untyped-def]
    prompts = make_prompts(900)
    policy = fit(pair, prompts, quality=0.8)
    asked = prompts[300:]
    chosen = policy.decide(policy.score([RoutingQuery(p.text) for p in asked]))
    got = np.mean([p.quality[("small-code", "big")[c]] for p, c in zip(asked, chosen, strict=True)])
    weak = np.mean([p.quality["small-code"] for p in asked])
    strong = np.mean([p.quality["big"] for p in asked])
    assert (got - weak) / (strong - weak) > 0.7
    assert np.mean(chosen) < 0.8  # random needs 80 % strong calls for 80 % of the gap


def test_budget_becomes_a_share_by_price(pair: FleetState, make_prompts) -> None:  # type: ignore[no-untyped-def]
    prompts = make_prompts(900)
    policy = fit(pair, prompts, budget=0.1 + 0.9 * 0.25)  # prices 0.1 and 1.0: a quarter may be strong
    assert share(policy, prompts[300:]) == pytest.approx(0.25, abs=0.08)
    with pytest.raises(ConfigError, match=r"budget must be >= 0.1"):
        policy.adjust(budget=0.05)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"threshold": 1.5}, r"threshold must be in \[-1, 1\]"),
        ({"share": -0.1}, r"share must be in \[0, 1\]"),
        ({"quality": 2}, r"quality must be in \[0, 1\]"),
        ({"share": 0.5, "quality": 0.5}, "at most one of"),
        ({"share": float("nan")}, "share must be a number"),
        ({"strong": "gpt"}, "strong must be an expert or a model of the fleet"),
        ({"strong": "big", "weak": "big"}, "different from"),
        ({"predictor": "tarot"}, "must be one of: blend, knn"),
        ({"predictor_params": {"k": 3}}, "predictor_params: .* takes no arguments"),
        (
            {"features": "tea_leaves"},
            "must be one of: embedding, length, package.module.Class, surface, tfidf",
        ),
    ],
)
def test_bad_parameters_are_named(
    pair: FleetState, prompts: list[Prompt], params: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(pair, prompts, **params)


def test_only_run_time_settings_can_change_later(pair: FleetState, prompts: list[Prompt]) -> None:
    policy = fit(pair, prompts)
    with pytest.raises(ConfigError, match="predictor cannot change without training"):
        policy.adjust(predictor="knn")


def test_a_refused_setting_changes_nothing(pair: FleetState, prompts: list[Prompt]) -> None:
    policy = fit(pair, prompts, share=0.3)
    before = policy.threshold
    for wrong in ({"threshold": 7.0}, {"share": 2.0}, {"budget": 1e-9}, {"share": 0.1, "quality": 0.5}):
        with pytest.raises(ConfigError):
            policy.adjust(**wrong)
        policy.adjust()
        assert policy.threshold == before
    policy._apply()
    assert policy.threshold == before


def test_a_tier_of_several_experts_spreads_by_load(make_fleet, make_prompts, replica) -> None:  # type: ignore[no-untyped-def]
    from dataclasses import replace

    fleet = make_fleet(["small-code", "big"], domains=False)
    twins = FleetState([*fleet.experts, replace(fleet.experts[1], name="big-2")])
    policy = build_policy(
        RouterConfig(policy="threshold", params={"share": 1.0}), twins.experts, make_prompts(200), 0
    )
    assert not policy.static
    busy = FleetState(
        [twins.experts[0], replace(twins.experts[1], replicas=[replica(running=3)]), twins.experts[2]]
    )
    assert policy.route(RoutingQuery("hello"), busy).expert == 2
    assert policy.route(RoutingQuery("hello"), twins).expert == 1
