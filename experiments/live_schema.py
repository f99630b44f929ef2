"""What `ersim-profile` and `ersim-validate` compose, and what both do with it."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ersim.config import (
    ExpertConfig,
    FleetConfig,
    GatewayConfig,
    ObjectiveConfig,
    RouterConfig,
    SimulationConfig,
    UncertaintyConfig,
    WorkloadConfig,
)
from ersim.errors import ConfigError, ErsimError, bad_value
from experiments.group_values import leave_on_bad_groups
from experiments.live_check import check_live
from experiments.names import check_names
from experiments.paths import conf_dir
from experiments.schema import TrackingConfig
from testbed.plan import ProfilePlan


@dataclass
class LiveConfig:
    """A live job.

    users: the loads. seconds: length of a run, warmup_s of them are not counted. repeats: runs per
    load, each with its own requests; they are judged together. replications: simulations per load, one of the
    means and then pairs of a draw and its reflection; an even number leaves the last draw without one.
    remeasure_s: what may go in all into measuring loads (a profile's common load) and checks again that
    others disturbed; not on GPUs. name: the study's name.
    folder: where calibrations and runs are written and read. measure false: nothing is started, the runs
    that lie in `folder` are simulated again. install: copy a profile's calibrations to conf/calibration,
    where `calibration=auto` finds them.
    """

    name: str = "live"
    users: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    seconds: float = 26.0
    warmup_s: float = 5.0
    repeats: int = 3
    replications: int = 9
    remeasure_s: float = 30.0
    folder: Optional[str] = None
    install: bool = False
    measure: bool = True
    seed: int = 0
    fleet: Optional[FleetConfig] = None
    expert: Optional[ExpertConfig] = None
    plan: ProfilePlan = field(default_factory=ProfilePlan)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    uncertainty: UncertaintyConfig = field(default_factory=UncertaintyConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class ServeConfig(LiveConfig):
    """What `ersim-serve` is told on top of a fleet, a router and a folder; what measures has no effect.

    host, port: where the gateway listens; a host that others can reach needs `api_keys`. restarts: how often
    each server that ends is started again.
    """

    host: str = "127.0.0.1"
    port: int = 8100
    api_keys: list[str] = field(default_factory=list)
    restarts: int = 3


def register() -> None:
    """Put the schemas into Hydra's config store."""
    ConfigStore.instance().store(name="live_schema", node=LiveConfig)
    ConfigStore.instance().store(name="serve_schema", node=ServeConfig)


def list_overrides(arguments: list[str]) -> list[str]:
    """`users=1,2,4` as `users=[1,2,4]`: these commands take all loads in one job."""
    changed = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        plain = key == "users" and equals and not value.startswith("[")
        changed.append(f"users=[{value}]" if plain else argument)
    return changed


def to_live(config: DictConfig) -> LiveConfig:
    """The composed config as typed objects, checked (see `check_live`). Raises ConfigError naming the key."""
    check_names(config)
    try:
        job: LiveConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise ConfigError(f"{key} cannot be used: {str(error).splitlines()[0]}") from error
    if job.expert is not None:
        check_one_of(HydraConfig.get().overrides.task)
        name = HydraConfig.get().runtime.choices.get("expert") or "expert"
        job = dataclasses.replace(job, fleet=FleetConfig(name=name, experts={name: job.expert}))
    if job.fleet is None or not job.fleet.experts:
        raise bad_value("fleet", "chosen (fleet=live_cpu), or an expert (expert=tiny_bf16)", None)
    if job.folder is not None:
        job.folder = os.path.expanduser(job.folder)
    check_live(job, simulation(job, job.fleet, 1), home(job), not isinstance(job, ServeConfig))
    return job


def check_one_of(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a fleet chosen or changed beside an expert: only the expert would be measured."""
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]  # with ~ the fleet is left out
        if key.partition(".")[0].partition("@")[0] == "fleet":
            raise ConfigError(
                f"{override} has no effect beside expert=...: leave one of them out (what concerns the "
                "expert is expert.gpu=..., expert.engine....)"
            )


def simulation(job: LiveConfig, fleet: FleetConfig, users: int) -> SimulationConfig:
    """The simulation that corresponds to a live job at one load."""
    return SimulationConfig(
        users=users,
        seed=job.seed,
        fleet=fleet,
        workload=job.workload,
        router=job.router,
        gateway=job.gateway,
        objective=job.objective,
        uncertainty=job.uncertainty,
    )


def one_line_errors(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """The task with ErsimError turned into what Hydra shows without a traceback."""

    @functools.wraps(task)
    def wrapped(config: DictConfig) -> None:
        try:
            task(config)
        except ErsimError as error:
            raise CompactHydraException(str(error)) from error

    return wrapped


def again_s(job: LiveConfig, fleet: FleetConfig) -> float | None:
    """Seconds for measuring again what others disturbed (see `Calmly`); None where no expert runs on CPUs."""
    on_cpu = any(expert.gpu == "cpu" for expert in fleet.experts.values())
    return job.remeasure_s if on_cpu else None


def home(job: LiveConfig) -> Path:
    """Where a fleet's calibrations and runs lie."""
    assert job.fleet is not None  # to_live has checked it
    return Path(job.folder or f"outputs/live/{job.fleet.name}")


def say(text: str) -> None:
    """Progress, apart from the results on standard output."""
    print(text, file=sys.stderr, flush=True)


def run_task(task: Callable[[DictConfig], None], name: str) -> None:
    """Run a task of conf/live/ on the command line in sys.argv; what is wrong with that is one line."""
    command = f"ersim-{name}"
    try:
        conf = conf_dir()
    except ErsimError as error:
        print(f"{command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    sys.argv[1:] = list_overrides(sys.argv[1:])
    leave_on_bad_groups(command, sys.argv[1:], conf, f"live/{name}")
    register()
    started = hydra.main(version_base="1.3", config_path=str(conf), config_name=f"live/{name}")
    run_command(started(task), command)


def run_command(command: Callable[[], None], name: str) -> None:
    """Run a command; an interrupt is one line and status 130."""
    try:
        command()
    except KeyboardInterrupt:
        print(f"{name}: interrupted; its servers are stopped", file=sys.stderr)
        raise SystemExit(130) from None
