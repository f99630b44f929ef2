"""The invariants of the design: conservation, causality, determinism, blindness, parity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ersim
from ersim.config import (
    EngineSettings,
    ExpertConfig,
    FaultConfig,
    FleetConfig,
    GatewayConfig,
    RouterConfig,
    SimulationConfig,
    WorkloadConfig,
)
from ersim.errors import ConfigError
from ersim.simulation import replicate
from ersim.system import System
from ersim.system.replica import _RUN, _STEP, Replica
from ersim.types import RoutingQuery
from ersim.workload import build_workload

Build = Callable[..., SimulationConfig]


def tight(config: SimulationConfig, kv_blocks: int = 400) -> SimulationConfig:
    """The same fleet with so few KV blocks that requests are preempted."""
    experts = {
        name: replace(expert, engine=EngineSettings(kv_blocks=kv_blocks, max_model_len=4096))
        for name, expert in config.fleet.experts.items()
    }
    return replace(config, fleet=FleetConfig("tight", experts=experts))


def build_system(config: SimulationConfig) -> System:
    """The system of replication 0, not yet run."""
    shared = ersim.Preparations()
    experts = [shared.expert(expert, name) for name, expert in config.fleet.experts.items()]
    routing = shared.routing(config)
    prompts = shared.prompt_set(config.workload.prompts)
    workload = build_workload(config.workload, prompts, config.users, 1, routing.ask)
    times = [expert.step_time(None) for expert in experts]
    return System(config, experts, times, prompts.prompts, workload, routing.policy, routing.known, 1)


@pytest.mark.parametrize("squeeze", [False, True])
def test_every_request_is_somewhere_at_every_instant(config: Build, squeeze: bool) -> None:
    chosen = config(users=60)
    system = build_system(tight(chosen) if squeeze else chosen)
    for _ in range(3000):
        system.env.step()
        counts = system.counts()
        assert counts.balanced, counts
    assert counts.completed > 20


def test_causality_in_every_row(config: Build) -> None:
    rows = ersim.simulate(tight(config(users=60))).requests
    rows = rows[rows["status"] == "completed"]
    assert rows["preemptions"].sum() > 0
    assert (rows["send_s"] < rows["submit_s"]).all()
    assert (rows["submit_s"] < rows["first_token_s"]).all()
    assert (rows["first_token_s"] <= rows["last_token_s"]).all()
    assert (rows["gateway_s"] > 0).all()
    several = rows["output_tokens"] > 1
    assert (rows["first_token_s"] < rows["last_token_s"])[several].all()


def test_same_seed_same_bytes_and_another_seed_another_run(config: Build, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ersim.simulate(config()).write(tmp_path / name)
    for file in ("summary.json", "replications.json", "requests.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = ersim.simulate(config(seed=4))
    assert not other.requests.equals(pd.read_parquet(tmp_path / "a" / "requests.parquet"))


def test_shared_preparations_do_not_leak_from_run_to_run(config: Build) -> None:
    shared = ersim.Preparations()
    first = ersim.simulate(config(), shared)
    second = ersim.simulate(config(), shared)
    assert first.summary == second.summary


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("squeeze", [False, True])
def test_stretches_give_the_same_run_as_single_steps(
    config: Build, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, squeeze: bool
) -> None:
    chosen = tight(config(users=25)) if squeeze else config(users=5)
    experts = {
        name: replace(expert, engine=replace(expert.engine, async_scheduling=asynchronous))
        for name, expert in chosen.fleet.experts.items()
    }
    chosen = replace(chosen, fleet=replace(chosen.fleet, experts=experts))
    fast = ersim.simulate(chosen)
    monkeypatch.setattr("ersim.system.replica.MIN_RUN_STEPS", 10**9)
    slow = ersim.simulate(chosen)
    pd.testing.assert_frame_equal(fast.requests, slow.requests, check_exact=True)
    assert fast.summary == slow.summary
    for name in ("end_s", "gap_s", "count", "tokens"):
        np.testing.assert_array_equal(getattr(fast.gaps, name), getattr(slow.gaps, name))


def test_idle_replica_never_has_work_waiting(config: Build) -> None:
    system = build_system(config(users=40))
    replicas: Sequence[Replica] = [replica for row in system.replicas for replica in row]
    for _ in range(4000):
        system.env.step()
        for replica in replicas:
            if replica._due not in (_STEP, _RUN):
                assert replica._engine.running == 0
                assert replica._engine.waiting == 0


def test_decisions_do_not_depend_on_the_answer_length(config: Build) -> None:
    """Doubling every answer changes when things happen, not where the router sends them."""
    policy = RouterConfig(policy="cluster")
    short = config(router=policy, workload=WorkloadConfig(requests=200, think_s=0.0, ramp_s=0.0), users=1)
    longer = replace(short, workload=replace(short.workload, lengths=replace(short.workload.lengths)))
    longer.workload.lengths.output_scale = 2.0
    a, b = ersim.simulate(short).requests, ersim.simulate(longer).requests
    joined = a.merge(b, on="request_id", suffixes=("", "_long"))
    assert (joined["expert"] == joined["expert_long"]).all()
    assert joined["output_tokens_long"].sum() > 1.5 * joined["output_tokens"].sum()


def test_router_is_never_given_domain_or_answer_length(
    config: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(RoutingQuery.__dataclass_fields__) == {"text", "prompt_tokens", "max_tokens"}


def test_busy_time_and_littles_law(config: Build) -> None:
    """Closed loop: users = throughput x (E2E + think + what the gateway needs to notice)."""
    result = ersim.simulate(config(users=50, workload=WorkloadConfig(requests=4000, think_s=1.0)))
    rows = result.requests
    late = rows[rows["last_token_s"] > result.window.start_s]
    throughput = len(late) / result.window.duration_s
    residence_s = float((late["last_token_s"] - late["send_s"]).mean())
    assert throughput * (residence_s + 1.0) == pytest.approx(50, rel=0.06)


def test_dead_replica_fails_its_requests_and_comes_back(config: Build) -> None:
    chosen = config(
        users=30,
        workload=WorkloadConfig(requests=2000, think_s=0.2),
        faults=[FaultConfig("large", 0, at_s=5.0, back_s=15.0)],
    )
    rows = ersim.simulate(chosen).requests
    failed = rows[rows["status"] == "failed"]
    assert len(failed) > 0
    assert set(failed["expert"]) == {"large"}
    assert failed["error"].str.contains("died").all()
    served = rows[(rows["status"] == "completed") & (rows["expert"] == "large")]
    assert not ((served["submit_s"] > 5.01) & (served["submit_s"] < 15.0)).any()
    assert (served["submit_s"] > 15.0).any()


def test_full_gateway_queue_turns_requests_away(config: Build) -> None:
    gateway = GatewayConfig(workers=1, queue_limit=2, base_s=0.5)
    rows = ersim.simulate(config(users=30, gateway=gateway)).requests
    rejected = rows[rows["status"] == "rejected"]
    assert len(rejected) > 0
    assert rejected["error"].str.contains("429").all()
    assert (rejected["expert"] == "").all()


def test_too_long_prompts_are_rejected_and_counted(config: Build) -> None:
    experts = {
        "only": ExpertConfig(engine=EngineSettings(max_model_len=512)),
    }
    result = ersim.simulate(config(fleet=FleetConfig("short", experts=experts)))
    assert result.summary["rejected"] > 0
    assert result.summary["completed_in_all"] + result.summary["rejected"] == len(result.requests)


def test_a_request_that_can_never_run_fails_by_name_and_the_queue_goes_on(config: Build) -> None:
    engine = EngineSettings(kv_blocks=60, max_model_len=8192)
    fleet = FleetConfig("tiny", experts={"only": ExpertConfig(engine=engine)})
    result = ersim.simulate(config(fleet=fleet, users=5))
    failed = result.requests[result.requests["status"] == "failed"]
    assert len(failed) > 0
    assert failed["error"].str.contains("can never be scheduled").all()
    assert result.summary["completed_in_all"] > 50


def test_replications_share_users_between_fleets_and_differ_from_each_other(config: Build) -> None:
    chosen = config()
    shared = ersim.Preparations()
    experts = [shared.expert(expert, name) for name, expert in chosen.fleet.experts.items()]
    one, two = (replicate(chosen, shared, experts, number).requests for number in (0, 1))
    assert not one["prompt_tokens"].equals(two["prompt_tokens"])
    single = FleetConfig("single", experts={"small": chosen.fleet.experts["small"]})
    other = replace(chosen, fleet=single)
    third = replicate(other, shared, [shared.expert(single.experts["small"], "small")], 0).requests
    joined = one.merge(third, on="request_id")
    assert len(joined) > 100
    assert (joined["prompt_tokens_x"] == joined["prompt_tokens_y"]).all()


def test_users_zero_is_one_clear_message(config: Build) -> None:
    with pytest.raises(ConfigError, match="users must be >= 1, got 0"):
        ersim.simulate(config(users=0))
