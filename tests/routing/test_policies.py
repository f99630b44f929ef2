"""What every policy promises: determinism, parity of batch and single calls, save and load, blindness."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ersim.config import RouterConfig
from ersim.errors import ConfigError
from ersim.routing import build_policy, load_policy, policy_names
from ersim.types import FleetState, Prompt, RoutingQuery

CASES: dict[str, tuple[str, dict]] = {
    "round_robin": ("round_robin", {}),
    "random": ("random", {}),
    "fixed": ("fixed", {}),
    "least_loaded": ("least_loaded", {}),
    "best_single": ("best_single", {}),
    "oracle": ("oracle", {}),
    "prompt_length": ("prompt_length", {}),
    "spill": ("spill", {"policy": "cluster", "params": {"clusters": 6}}),
    **{
        f"cluster-{method}": ("cluster", {"method": method, "clusters": 6})
        for method in ("kmeans", "minibatch", "balanced", "gaussian_mixture", "agglomerative", "hdbscan")
    },
    **{f"cluster-{mapping}": ("cluster", {"mapping": mapping}) for mapping in ("quality", "domain", "load")},
    **{
        f"threshold-{predictor}": ("threshold", {"predictor": predictor, "share": 0.4})
        for predictor in ("knn", "ridge", "logistic", "matrix_factorisation", "mlp", "blend")
    },
    "predictive-knn": ("predictive", {"predictor": "knn", "cost_weight": 0.1}),
    "predictive-mlp": ("predictive", {"predictor": "mlp", "predictor_params": {"epochs": 20}}),
    "predictive-blend": ("predictive", {"predictor": "blend", "cost_weight": 0.1}),
    "predictive-load": ("predictive", {"predictor": "ridge", "load_weight": 0.1}),
}
ODD = ["", " ", "\x00", "12 34.5", "!!!", "ünïcödé 你好", "word " * 20_000, "\ud800 lone surrogate"]


FITTED: dict[str, bytes] = {}


def fit(case: str, fleet: FleetState, prompts: list[Prompt], asked: list[Prompt]):  # type: ignore[no-untyped-def]
    policy, params = CASES[case]
    config = RouterConfig(policy=policy, params=params)
    return build_policy(config, fleet.experts, prompts[:200], 3, asked)


def make(case: str, fleet: FleetState, prompts: list[Prompt]):  # type: ignore[no-untyped-def]
    """A fresh copy of the case's policy; fitted once, for fitting is nearly all that these tests cost."""
    if case not in FITTED:
        FITTED[case] = pickle.dumps(fit(case, fleet, prompts, prompts))
    policy = pickle.loads(FITTED[case])
    if policy.sees_asked:
        policy.reveal(prompts)
    return policy


def queries(prompts: list[Prompt]) -> list[RoutingQuery]:
    return [RoutingQuery(prompt.text) for prompt in prompts]


def test_every_registered_policy_is_tested_here() -> None:
    assert {policy for policy, _ in CASES.values()} == set(policy_names())


@pytest.mark.parametrize("case", CASES)
def test_same_seed_same_decisions(case: str, fleet: FleetState, prompts: list[Prompt]) -> None:
    first, second = make(case, fleet, prompts), fit(case, fleet, prompts, prompts)
    asked = queries(prompts)
    assert [first.route(q, fleet) for q in asked] == [second.route(q, fleet) for q in asked]


@pytest.mark.parametrize("case", CASES)
def test_decisions_made_in_a_batch_equal_single_ones(
    case: str, fleet: FleetState, prompts: list[Prompt]
) -> None:
    policy = make(case, fleet, prompts)
    asked = queries(prompts) + [RoutingQuery(text) for text in ODD]
    batch = policy.score(asked)
    assert batch.shape == (len(asked), len(fleet.experts))
    assert np.isfinite(batch).all()
    if not policy.static:
        pytest.skip("decides by the fleet's state, not by the query alone")
    single = [policy.route(query, fleet).expert for query in asked]
    assert policy.decide(batch).tolist() == single
    assert [policy.choose(row, fleet).expert for row in batch] == single


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_policy_decides_the_same(
    case: str, fleet: FleetState, prompts: list[Prompt], tmp_path: Path
) -> None:
    policy = make(case, fleet, prompts)
    policy.save(tmp_path / "policy.ersim")
    loaded = load_policy(tmp_path / "policy.ersim", [expert.name for expert in fleet.experts])
    if policy.sees_asked:
        assert pickle.loads(pickle.dumps(policy))._known == {}  # an oracle's answers are never saved
        loaded.reveal(prompts)
    asked = queries(prompts)
    assert [loaded.route(q, fleet) for q in asked] == [policy.route(q, fleet) for q in asked]


@pytest.mark.parametrize("case", CASES)
def test_odd_prompts_never_crash_and_reasons_fit_a_header(
    case: str, fleet: FleetState, prompts: list[Prompt]
) -> None:
    policy = make(case, fleet, prompts)
    for text in ODD:
        decision = policy.route(RoutingQuery(text), fleet)
        assert 0 <= decision.expert < len(fleet.experts)
        assert decision.reason.isascii() and "\n" not in decision.reason and len(decision.reason) < 100
        assert policy.routing_s(len(text)) <= policy.routing_s(policy.max_chars)


@pytest.mark.parametrize("case", CASES)
def test_an_expert_that_is_down_gets_nothing(
    case: str, fleet: FleetState, prompts: list[Prompt], replica: type
) -> None:
    policy = make(case, fleet, prompts)
    for down in range(len(fleet.experts)):
        experts = list(fleet.experts)
        experts[down] = replace(experts[down], replicas=[replica(healthy=False)])
        state = FleetState(experts)
        assert all(policy.route(query, state).expert != down for query in queries(prompts[:40]))


@pytest.mark.parametrize("case", CASES)
def test_blind_to_domain_and_answer_of_what_is_asked(
    case: str, fleet: FleetState, prompts: list[Prompt]
) -> None:
    """A query has no field for either; training on shuffled held-out labels changes nothing."""
    assert set(RoutingQuery.__dataclass_fields__) == {"text", "prompt_tokens", "max_tokens"}
    if case == "oracle":
        pytest.skip("an upper bound that is shown the answers on purpose")
    lies = [replace(p, domain="law", output_tokens=1, quality={"big": 0.0}) for p in prompts]
    honest, fooled = make(case, fleet, prompts), fit(case, fleet, prompts, lies)
    asked = queries(prompts[200:])
    assert [honest.route(q, fleet) for q in asked] == [fooled.route(q, fleet) for q in asked]


def test_cluster_router_finds_the_domain_and_the_specialist(fleet: FleetState, prompts: list[Prompt]) -> None:
    for mapping in ("domain", "quality"):
        specialists = FleetState(fleet.experts[:4])
        config = RouterConfig(policy="cluster", params={"mapping": mapping})
        policy = build_policy(config, specialists.experts, prompts[:200], 0)
        right = [
            specialists.experts[policy.route(RoutingQuery(p.text), specialists).expert].domains[0] == p.domain
            for p in prompts[200:]
        ]
        assert np.mean(right) > 0.9


def test_load_mapping_keeps_every_expert_near_its_share(fleet: FleetState, prompts: list[Prompt]) -> None:
    config = RouterConfig(policy="cluster", params={"mapping": "load", "clusters": 20, "method": "balanced"})
    policy = build_policy(config, fleet.experts, prompts[:300], 0)
    chosen = policy.decide(policy.score(queries(prompts[:300])))
    share = np.bincount(chosen, minlength=5) / 300
    assert share.max() < 0.3 and share.min() > 0.1


def test_spill_pays_at_most_the_stated_price(fleet: FleetState, prompts: list[Prompt], replica: type) -> None:
    spill = RouterConfig(
        policy="predictive", params={"predictor": "ridge"}, spill={"at_load": 1.0, "max_quality_loss": 0.2}
    )
    policy = build_policy(spill, fleet.experts, prompts[:200], 0)
    asked = queries(prompts[200:])
    scores = policy.score(asked)
    first = policy.decide(scores)
    assert [policy.route(q, fleet).expert for q in asked] == first.tolist()
    busy = FleetState(
        [replace(fleet.experts[i], replicas=[replica(running=8, waiting=4)]) for i in range(4)]
        + [fleet.experts[4]]
    )
    chosen = np.array([policy.route(q, busy).expert for q in asked])
    lost = scores[np.arange(len(asked)), first] - scores[np.arange(len(asked)), chosen]
    assert (chosen != first).any()
    assert lost.max() <= 0.2
    assert set(chosen[chosen != first]) == {4}


def test_load_in_the_objective_moves_requests_away(
    fleet: FleetState, prompts: list[Prompt], replica: type
) -> None:
    config = RouterConfig(policy="predictive", params={"predictor": "ridge", "load_weight": 0.5})
    policy = build_policy(config, fleet.experts, prompts[:200], 0)
    busy = FleetState([*fleet.experts[:4], replace(fleet.experts[4], replicas=[replica(waiting=16)])])
    idle_share = np.mean([policy.route(q, fleet).expert == 4 for q in queries(prompts[200:])])
    busy_share = np.mean([policy.route(q, busy).expert == 4 for q in queries(prompts[200:])])
    assert busy_share < idle_share


def test_cost_weight_moves_requests_to_cheap_experts_without_training(
    fleet: FleetState, prompts: list[Prompt]
) -> None:
    policy = build_policy(
        RouterConfig(policy="predictive", params={"cost_weight": 0.01}), fleet.experts, prompts[:200], 0
    )
    asked = queries(prompts[200:])
    dear = [np.mean(policy.decide(policy.score(asked)) == 4)]
    for weight in (0.2, 0.5, 2.0):
        policy.adjust(cost_weight=weight)
        dear.append(np.mean(policy.decide(policy.score(asked)) == 4))
    assert dear == sorted(dear, reverse=True) and dear[-1] == 0.0
    for wrong in ({"cost_weight": float("inf")}, {"load_weight": 0.5, "cost_weight": -1.0}, {"prices": {}}):
        with pytest.raises(ConfigError):
            policy.adjust(**wrong)
        assert (policy.cost_weight, policy.load_weight) == (2.0, 0.0)


def test_random_follows_its_weights_and_round_robin_is_even(fleet: FleetState) -> None:
    weights = {"small-code": 1.0, "big": 3.0}
    policy = build_policy(RouterConfig(policy="random", params={"weights": weights}), fleet.experts, [], 5)
    chosen = [policy.route(RoutingQuery("x"), fleet).expert for _ in range(4000)]
    assert np.bincount(chosen, minlength=5)[[1, 2, 3]].sum() == 0
    assert abs(np.mean(np.array(chosen) == 4) - 0.75) < 0.03
    turns = build_policy(RouterConfig(policy="round_robin"), fleet.experts, [], 5)
    assert [turns.route(RoutingQuery("x"), fleet).expert for _ in range(6)] == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("policy", "params"),
    [("predictive", {"predictor": "mlp", "predictor_params": {"epochs": 5}}), ("oracle", {})],
)
def test_experts_with_one_model_share_its_requests_by_load(
    policy: str, params: dict, fleet: FleetState, prompts: list[Prompt], replica: type
) -> None:
    """Three experts answer with the strong model: nothing but load tells them apart."""
    big = fleet.experts[4]
    twins = FleetState([fleet.experts[0], big, replace(big, name="big-2"), replace(big, name="big-3")])
    router = build_policy(
        RouterConfig(policy=policy, params=params), twins.experts, prompts[:200], 0, prompts
    )
    assert not router.static
    alone = build_policy(
        RouterConfig(policy=policy, params=params), twins.experts[:2], prompts[:200], 0, prompts
    )
    assert alone.static
    chosen = [router.route(query, twins).expert for query in queries(prompts[200:])]
    assert 1 in chosen and not {2, 3} & set(chosen)  # all idle: the first
    busy = FleetState(
        [
            twins.experts[0],
            replace(twins.experts[1], replicas=[replica(running=3)]),
            replace(twins.experts[2], replicas=[replica(running=1)]),
            replace(twins.experts[3], replicas=[replica(healthy=False)]),
        ]
    )
    moved = [router.route(query, busy).expert for query in queries(prompts[200:])]
    assert [expert == 2 for expert in moved] == [expert == 1 for expert in chosen]
