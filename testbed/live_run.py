"""Puts one load on a running fleet through a running gateway, and collects what everybody saw."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ersim.config import FleetConfig, SimulationConfig
from ersim.errors import ConfigError
from ersim.prepare import Preparations
from ersim.results import Gaps
from ersim.steptime import load_model
from testbed.access_log import read_access_log
from testbed.core_time import stolen_share
from testbed.expert_server import free_port
from testbed.fleet import LiveFleet
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings
from testbed.load import LoadResult, LoadSettings, run_load
from testbed.measured import requests_frame, token_gaps
from testbed.predict import live_workload
from testbed.prompt_tokens import PromptTokens
from testbed.step_log import StepLog, read_step_log

UNBOUNDED = 10**9


@dataclass(frozen=True)
class LiveRun:
    """One load level, measured: requests and gaps on the run's clock, logs in monotonic seconds."""

    users: int
    load: LoadResult
    access: Mapping[str, Mapping[str, Any]]
    logs: Mapping[str, StepLog]
    requests: pd.DataFrame
    gaps: Gaps


def vocabulary(fleet: FleetConfig) -> int:
    """Token ids that every expert of the fleet knows."""
    return min(load_model(expert.model).vocab_size for expert in fleet.experts.values())


def gateway_settings(
    config: SimulationConfig, shared: Preparations, live: LiveFleet, folder: Path
) -> GatewaySettings:
    """The gateway of a live run: the simulation's own policy, fitted and saved, and its balancer."""
    policy_path = folder / "policy.bin"
    shared.routing(config).policy.save(policy_path)
    endpoints = []
    for name, urls in live.urls().items():
        expert = config.fleet.experts[name]
        slots = shared.expert(expert, f"fleet.experts.{name}").engine.max_num_seqs * expert.replicas
        endpoints.append(ExpertEndpoint(name, urls, expert.model, list(expert.domains), slots))
    return GatewaySettings(
        experts=endpoints,
        policy_path=str(policy_path),
        port=free_port(),
        balancer=config.router.balancer,
        seed=config.seed,
        queue_limit=config.gateway.queue_limit or UNBOUNDED,
        queue_timeout_s=600.0,
        access_log=str(folder / "access.jsonl"),
    )


def run_level(
    config: SimulationConfig, shared: Preparations, live: LiveFleet, gateway: GatewaySettings, url: str,
    seconds: float, tag: str, repeat: int = 0,
) -> LiveRun:  # fmt: skip
    """`config.users` users for `seconds`; every repeat has requests of its own."""
    prompts = shared.prompt_set(config.workload.prompts).prompts
    tokens = PromptTokens(vocabulary(config.fleet), hash_seed(config.seed, tag))
    settings = LoadSettings(url, UNBOUNDED, max_duration_s=seconds)
    workload = live_workload(config, shared, repeat)
    load = asyncio.run(run_load(workload, config.users, settings, prompts, tokens, tag))
    live.check_alive()
    assert gateway.access_log is not None
    return collect(config, load, Path(gateway.access_log), live, prompts)


def collect(
    config: SimulationConfig, load: LoadResult, access_log: Path, live: LiveFleet, prompts: Any
) -> LiveRun:
    """Join the client's, the gateway's and the recorders' views of a load."""
    access = read_access_log(access_log)
    logs = {
        server.spec.name: read_step_log(server.spec.steps_path).between(load.start_s, load.end_s)
        for server in live.all_servers
    }
    frame = requests_frame(load, access, logs, prompts)
    return LiveRun(config.users, load, access, logs, frame, token_gaps(load))


def steps_stolen(run: LiveRun) -> float:
    """Share of the steps' time that the hypervisor gave to other machines."""
    return stolen_share(run.logs.values())


def check_answered(run: LiveRun) -> None:
    """Raise ConfigError when not a single request was completed."""
    records = run.load.records
    if not any(record.error is None for record in records):
        seen = next((record.error for record in records), "none ended in time; make the run longer")
        raise ConfigError(f"{run.users} users: no request of {len(records)} was completed live: {seen}")


def hash_seed(seed: int, tag: str) -> int:
    """A seed for prompt texts: different for every load, so that none finds another's prefix cache."""
    value = seed
    for char in tag:
        value = (value * 31 + ord(char)) % 2**31
    return value


def level_config(config: SimulationConfig, users: int, seconds: float) -> SimulationConfig:
    """The simulation of one load level: as long as the live run, however many requests that is."""
    workload = dataclasses.replace(config.workload, requests=UNBOUNDED, max_duration_s=seconds)
    return dataclasses.replace(config, users=users, workload=workload)
