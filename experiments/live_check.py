"""All that can be known to be wrong with a live job before a server starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ersim.config import ExpertConfig, SimulationConfig, validate
from ersim.errors import bad_value, unknown_choice
from ersim.routing import Policy, build_balancer, build_policy, create_policy, split_prompts
from ersim.routing.build import SAVED
from ersim.routing.policy import ExpertProfile
from ersim.steptime import load_gpu, load_model
from ersim.steptime.expert import load_prices
from ersim.steptime.specs import CONF_DIR
from ersim.types import ExpertState, Prompt
from ersim.workload import build_workload, load_prompt_set
from experiments.folders import check_folder
from testbed.gateway.exchange import AUTO_MODELS
from testbed.live_settings import check_machine, read_live

if TYPE_CHECKING:
    from experiments.live_schema import LiveConfig

CPU = "cpu"  # an expert's `gpu` where it has none


def check_live(job: LiveConfig, config: SimulationConfig, folder: Path, recorded: bool = True) -> None:
    """Raise ConfigError or DataError for what neither measuring nor simulating could make use of.

    config: the job's simulation at any load. folder: where its files will lie. recorded: whether it reads
    what the recorder writes. What a fitted policy says of
    an expert's price (a budget below it, say) is seen only with the expert's calibration: a price is what a
    GPU costs over the tokens it makes, which a profile is there to measure. A validation has it, and asks
    its policy before servers start.
    """
    if not all(isinstance(one, int) for one in job.users):  # OmegaConf lets lists in a list of numbers pass
        raise bad_value("users", "whole numbers, as users=1,2,4", list(job.users))
    if not job.users or min(job.users) < 1 or len(set(job.users)) < len(job.users):
        raise bad_value("users", "one or more loads >= 1, each given once", list(job.users))
    for name in ("repeats", "replications"):
        if getattr(job, name) < 1:
            raise bad_value(name, ">= 1", getattr(job, name))
    if not 0 < job.seconds < math.inf:
        raise bad_value("seconds", "a number of seconds > 0", job.seconds)
    if not 0 <= job.warmup_s < job.seconds:
        raise bad_value("warmup_s", f"in [0, seconds={job.seconds:g})", job.warmup_s)
    if not 0 <= job.remeasure_s < math.inf:
        raise bad_value("remeasure_s", "a number of seconds >= 0", job.remeasure_s)
    validate(config)
    for name, expert in config.fleet.experts.items():
        if name in AUTO_MODELS:
            raise bad_value("fleet.experts", f"of names other than {name!r}, which is the router's", name)
        _check_expert(expert, f"fleet.experts.{name}", job.measure, recorded)
    prompts = load_prompt_set(config.workload.prompts)
    if config.workload.arrivals == "trace":
        build_workload(config.workload, prompts, config.users, config.seed)
    _check_router(config, prompts.prompts)
    check_folder(folder)


def _check_expert(expert: ExpertConfig, key: str, measure: bool, recorded: bool) -> None:
    """Names of its model and GPU, and its `live` mapping; if it is to be measured, on this machine."""
    load_model(expert.model)
    if expert.gpu != CPU:
        gpus = [file.stem for file in (CONF_DIR / "gpu").glob("*.yaml")]
        if expert.gpu not in gpus:
            raise unknown_choice(f"{key}.gpu", expert.gpu, [CPU, *gpus])
        load_gpu(expert.gpu)
    live = read_live(expert.live, expert.precision, key, expert.gpu, expert.replicas)
    if live.device == "gpu" and expert.gpu == CPU:
        raise bad_value(f"{key}.gpu", "the name of its GPU where live.device is gpu", expert.gpu)
    if live.device == "cpu" and expert.gpu != CPU:  # a CPU's times would pass for that GPU's
        raise bad_value(f"{key}.live.device", f"gpu, or {key}.gpu cpu (it is {expert.gpu})", live.device)
    if not measure:
        return
    if recorded and not live.record_steps:
        raise bad_value(f"{key}.live.record_steps", "true: profiles and validations read the steps", False)
    check_machine(live, key)


def _check_router(config: SimulationConfig, prompts: Sequence[Prompt]) -> None:
    """Policy and balancer; the policy is read, or fitted where no price is known that it could count with."""
    router, experts = config.router, config.fleet.experts
    build_balancer(router.balancer, config.seed)
    states = [
        ExpertState(name, expert.model, tuple(expert.domains), (), 1) for name, expert in experts.items()
    ]
    priced = any(one.usd_per_gpu_hour is not None or one.gpu in load_prices() for one in experts.values())
    if priced and router.policy_path is None and router.policy != SAVED:
        create_policy(router.policy, [ExpertProfile.of(state) for state in states], router.params)
        return
    fit_unpriced(config, states, prompts)


def fit_unpriced(
    config: SimulationConfig, states: Sequence[ExpertState], prompts: Sequence[Prompt]
) -> Policy:
    """The config's policy, fitted with what is known of experts that have no calibration: no prices."""
    train, _ = split_prompts(prompts, config.router.train_fraction, config.seed)
    return build_policy(config.router, states, [prompts[index] for index in train], config.seed)
