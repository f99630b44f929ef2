"""Bad input ends in one clear error, or in the stated fallback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ersim.config import RouterConfig
from ersim.errors import ConfigError, DataError
from ersim.routing import build_policy, load_policy, split_prompts
from ersim.types import ExpertState, FleetState, Prompt


def build(fleet: FleetState, prompts: list[Prompt], **config):  # type: ignore[no-untyped-def]
    return build_policy(RouterConfig(**config), fleet.experts, prompts, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"policy": "clustre"}, "must be one of: best_single, cluster"),
        ({"policy": "no.such.module.Policy"}, "cannot be imported"),
        ({"policy": "pathlib.Path"}, "must be a subclass of"),
        ({"policy": "cluster", "params": {"k": 3}}, "must be one of: clusters, feature_params"),
        ({"policy": "cluster", "params": {"clusters": 0}}, "auto, sweep or an integer >= 1"),
        ({"policy": "cluster", "params": {"method": "dbscan"}}, "must be one of: agglomerative"),
        ({"policy": "cluster", "params": {"mapping": "luck"}}, "must be one of auto, quality"),
        ({"policy": "fixed", "params": {"expert": "x"}}, "one of the fleet's experts"),
        ({"policy": "random", "params": {"weights": {"big": -1}}}, "must be >= 0"),
        ({"policy": "predictive", "params": {"prices": {"big": -1}}}, "must be >= 0"),
        ({"policy": "cluster", "spill": {"at": 1}}, "must be one of: at_load"),
        ({"policy": "cluster", "spill": {"max_quality_loss": -1}}, "must be >= 0"),
    ],
)
def test_bad_configuration_is_named(
    fleet: FleetState, prompts: list[Prompt], config: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(fleet, prompts, **config)


@pytest.mark.parametrize("policy", ["threshold", "predictive", "best_single", "oracle"])
def test_a_set_without_labels_is_an_error_for_policies_that_learn_from_them(
    policy: str, fleet: FleetState, make_prompts
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="no answer quality"):
        build(fleet, make_prompts(50, labelled=False), policy=policy)
    with pytest.raises(DataError, match="train_fraction"):
        build(fleet, [], policy=policy)


def test_without_labels_the_cluster_router_falls_back_to_domains_then_load(make_fleet, make_prompts) -> None:  # type: ignore[no-untyped-def]
    prompts = make_prompts(100, labelled=False)
    names = ["small-code", "big"]
    assert build(make_fleet(names), prompts, policy="cluster").mapping_used == "load"
    names = ["small-code", "small-law", "small-medicine"]
    assert build(make_fleet(names), prompts, policy="cluster").mapping_used == "domain"
    assert build(make_fleet(names, domains=False), prompts, policy="cluster").mapping_used == "load"
    labelled = make_prompts(100)
    assert build(make_fleet(names, domains=False), labelled, policy="cluster").mapping_used == "quality"
    with pytest.raises(DataError, match="no answer quality"):
        build(make_fleet(names), prompts, policy="cluster", params={"mapping": "quality"})
    with pytest.raises(DataError, match="no expert serves any domain"):
        build(make_fleet(names, domains=False), prompts, policy="cluster", params={"mapping": "domain"})


def test_a_policy_for_other_experts_is_refused(
    fleet: FleetState, prompts: list[Prompt], tmp_path: Path
) -> None:
    path = tmp_path / "policy.ersim"
    build(fleet, prompts, policy="cluster").save(path)
    with pytest.raises(ConfigError, match=r"trained for experts .*small-law.* but the fleet has \[other\]"):
        load_policy(path, ["other"])
    config = RouterConfig(policy_path=str(path), params={"clusters": 3})
    with pytest.raises(ConfigError, match="no run-time setting"):
        build_policy(config, fleet.experts, [], 0)


def test_damaged_and_foreign_files_are_refused(
    fleet: FleetState, prompts: list[Prompt], tmp_path: Path
) -> None:
    path = tmp_path / "policy.ersim"
    names = [expert.name for expert in fleet.experts]
    build(fleet, prompts, policy="cluster").save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged"):
        load_policy(path, names)
    path.write_text("hello")
    with pytest.raises(DataError, match="not a policy file"):
        load_policy(path, names)
    with pytest.raises(DataError, match="ersim-route fit"):
        load_policy(tmp_path / "missing", names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "experts must be a list of names, got None; fit it again"),
        ({"experts": 3}, "experts must be a list of names, got 3"),
        ({"experts": [["a"]]}, r"experts must be a list of names, got \[\['a'\]\]"),
        ({"sha256": None}, "sha256 must be the policy's digest, got None; fit it again"),
    ],
)
def test_a_header_says_for_whom_the_policy_is_and_its_digest(
    changes: dict[str, Any], message: str, fleet: FleetState, prompts: list[Prompt], tmp_path: Path
) -> None:
    path = tmp_path / "policy.ersim"
    build(fleet, prompts, policy="random").save(path)
    line, _, body = path.read_bytes().partition(b"\n")
    header = {key: value for key, value in {**json.loads(line), **changes}.items() if value is not None}
    path.write_bytes(json.dumps(header).encode() + b"\n" + body)
    with pytest.raises(DataError, match=message):
        load_policy(path, [expert.name for expert in fleet.experts])


def test_a_loaded_policy_takes_a_new_threshold(
    pair: FleetState, prompts: list[Prompt], tmp_path: Path
) -> None:
    path = tmp_path / "policy.ersim"
    build(pair, prompts, policy="threshold").save(path)
    config = RouterConfig(policy_path=str(path), params={"share": 1.0})
    assert build_policy(config, pair.experts, [], 0).threshold == float("-inf")


def test_a_loaded_policy_keeps_its_threshold_when_told_nothing(
    pair: FleetState, prompts: list[Prompt], tmp_path: Path
) -> None:
    path = tmp_path / "policy.ersim"
    fitted = build(pair, prompts, policy="threshold", params={"share": 0.2})
    fitted.save(path)
    loaded = build_policy(RouterConfig(policy="saved", policy_path=str(path)), pair.experts, [], 0)
    assert loaded.threshold == fitted.threshold != 0.0


def test_split_keeps_equal_texts_together(make_prompts) -> None:  # type: ignore[no-untyped-def]
    prompts = make_prompts(60) * 3
    train, ask = split_prompts(prompts, 0.5, 4)
    assert not {prompts[i].text for i in train} & {prompts[i].text for i in ask}
    assert sorted([*train, *ask]) == list(range(len(prompts)))
    assert len(train) == len(prompts) // 2
    assert split_prompts(prompts, 0.5, 4)[0].tolist() == train.tolist()
    assert split_prompts(prompts, 0.5, 5)[0].tolist() != train.tolist()
    assert [len(part) for part in split_prompts(prompts, 0.0, 0)] == [0, 180]
    assert [len(part) for part in split_prompts(prompts, 1.0, 0)] == [180, 180]
    with pytest.raises(ConfigError, match="train_fraction"):
        split_prompts(prompts, 1.2, 0)


def test_saved_without_a_file_asks_for_one() -> None:
    state = ExpertState("a", "m", (), (), 1)
    with pytest.raises(ConfigError, match=r"router\.policy_path must be the file that ersim-route fit wrote"):
        build_policy(RouterConfig(policy="saved"), [state], [], 0)
