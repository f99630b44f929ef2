"""All that can be known to be wrong before a run starts, found before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from ersim.config import SimulationConfig, validate
from ersim.errors import ErsimError
from experiments.folders import check_folder
from experiments.schema import RunConfig, to_run, to_simulation

if TYPE_CHECKING:
    from ersim import Preparations


@cache
def preparations() -> Preparations:
    """This process's prompt sets, experts and fitted policies: checked first, then used by the runs."""
    from ersim import Preparations
    from ersim.fitted import Store
    from experiments.paths import cache_dir

    folder = cache_dir()
    return Preparations(Store(folder) if folder else None)


def check(config: SimulationConfig, shared: Preparations) -> None:
    """Raise ConfigError or DataError if `config` cannot be simulated.

    Values, names of models, GPUs and calibrations, models that do not fit, prompt sets, policies
    and traces. What it loads stays in `shared`.
    """
    from ersim.routing import build_balancer

    validate(config)
    for name, expert in config.fleet.experts.items():
        shared.expert(expert, f"fleet.experts.{name}")
    prompts = shared.prompt_set(config.workload.prompts)
    shared.routing(config)
    build_balancer(config.router.balancer, config.seed)
    if config.workload.arrivals == "trace":
        from ersim.workload import build_workload

        build_workload(config.workload, prompts, config.users, config.seed)


def without_hydra(config: DictConfig) -> DictConfig:
    """The composed config without Hydra's own node."""
    copy = config.copy()
    with open_dict(copy):
        copy.pop("hydra", None)
    return copy


def check_jobs(jobs: Iterable[tuple[str, DictConfig]]) -> list[RunConfig]:
    """Check every job of a sweep, given as (label, composed config); the error names the job.

    Raises the same kinds of error as `check`.
    """
    runs = []
    for label, config in jobs:
        try:
            run = to_run(without_hydra(config))
            check(to_simulation(run), preparations())
        except ErsimError as error:
            raise type(error)(f"{error} (in the job {label}; no job was started)") from error
        runs.append(run)
    return runs


class CheckFirst(Callback):
    """Stops a single run with a bad value before Hydra makes its output folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the error and leave with exit code 2 if the config cannot be simulated."""
        try:
            check(to_simulation(to_run(without_hydra(config))), preparations())
            check_folder(Path(str(config.hydra.run.dir)), "hydra.run.dir")
        except ErsimError as error:
            print(f"ersim: {error}", file=sys.stderr)
            raise SystemExit(2) from error
