"""What a live command refuses, it refuses before a server starts."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from ersim.config import (
    EngineSettings,
    ExpertConfig,
    FleetConfig,
    PromptSetConfig,
    RouterConfig,
    UncertaintyConfig,
    WorkloadConfig,
)
from ersim.errors import ConfigError, ErsimError
from experiments.live_check import check_live
from experiments.live_schema import LiveConfig, simulation


def checked(expert: dict[str, Any] | None = None, **changes: Any) -> None:
    described = dataclasses.replace(ExpertConfig("llama-36m", "bf16", "cpu"), **(expert or {}))
    fleet = FleetConfig("f", experts={"a": described})
    job = dataclasses.replace(LiveConfig(fleet=fleet), **changes)
    check_live(job, simulation(job, fleet, 1), Path("outputs"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": [0]}, "users must be one or more loads >= 1"),
        ({"users": [[1]]}, "users must be whole numbers, as users=1,2,4, got [[1]]"),
        ({"users": [{}]}, "users must be whole numbers, as users=1,2,4, got [{}]"),
        ({"users": [4, 4]}, "each given once, got [4, 4]"),
        ({"repeats": 0}, "repeats must be >= 1, got 0"),
        ({"remeasure_s": -1.0}, "remeasure_s must be a number of seconds >= 0, got -1.0"),
        ({"seconds": float("inf")}, "seconds must be a number of seconds > 0, got inf"),
        ({"warmup_s": 90.0}, "warmup_s must be in [0, seconds=26), got 90.0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"uncertainty": UncertaintyConfig(level=2.0)}, "uncertainty.level must be in [0.5, 0.999], got 2.0"),
        ({"router": RouterConfig(policy="clusterr")}, "router.policy must be one of: "),
        ({"router": RouterConfig(balancer="best")}, "router.balancer must be one of: "),
        ({"router": RouterConfig(params={"clusterz": 3})}, "a parameter of router.params for policy cluster"),
        ({"router": RouterConfig(policy_path="nowhere")}, "nowhere"),
        ({"workload": WorkloadConfig("trace", trace_path="nowhere.csv")}, "nowhere.csv"),
        ({"workload": WorkloadConfig(prompts=PromptSetConfig("nowhere.csv"))}, "workload.prompts.path: no"),
        ({"expert": {"gpu": "h200"}}, "fleet.experts.a.gpu must be one of: a10, "),
        ({"expert": {"model": "llama9"}}, "model must be one of: "),
        ({"expert": {"engine": EngineSettings(watermark=2.0)}}, "a.engine.watermark must be in"),
        ({"expert": {"live": {"prot": 1}}}, "fleet.experts.a.live must be one of: "),
        ({"expert": {"live": {"record_steps": False}}}, "fleet.experts.a.live.record_steps must be true"),
        ({"expert": {"live": {"port": 65535}, "replicas": 2}}, "fleet.experts.a.live.port must be at most"),
        ({"expert": {"live": {"device": "gpu"}}}, "fleet.experts.a.gpu must be the name of its GPU where"),
        ({"expert": {"gpu": "l40s", "live": {"device": "cpu"}}},
         "fleet.experts.a.live.device must be gpu, or fleet.experts.a.gpu cpu (it is l40s), got 'cpu'"),
    ],
)  # fmt: skip
def test_what_could_not_be_used_is_named(changes: dict[str, Any], message: str) -> None:
    checked()
    with pytest.raises(ErsimError, match=re.escape(message)):
        checked(**changes)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"policy": "clusterr"}, "^router.policy must be one of"),
        ({"params": {"clusterz": 3}}, "^a parameter of router.params for policy cluster"),
        ({"policy": "saved"}, "^router.policy_path must be the file"),
        ({"policy_path": "nowhere"}, "^policy file nowhere cannot be read"),
    ],
)
def test_a_router_is_checked_where_prices_are_not_known_yet(router: dict[str, Any], message: str) -> None:
    described = {"model": "llama3.1-8b", "gpu": "h200-141gb"}
    checked(described)
    with pytest.raises(ErsimError, match=message):
        checked(described, router=RouterConfig(**router))


def test_no_expert_has_the_routers_name() -> None:
    fleet = FleetConfig("f", experts={"auto": ExpertConfig("llama-36m", "bf16", "cpu")})
    job = LiveConfig(fleet=fleet)
    with pytest.raises(ConfigError, match=r"fleet\.experts must be of names other than 'auto', which is the"):
        check_live(job, simulation(job, fleet, 1), Path("outputs"))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells")
def test_stored_runs_are_predicted_on_any_machine() -> None:
    elsewhere = {"live": {"cores": [[9999]]}}
    with pytest.raises(ConfigError, match=r"fleet\.experts\.a\.live\.cores must be cores of this machine"):
        checked(elsewhere)
    checked(elsewhere, measure=False)
