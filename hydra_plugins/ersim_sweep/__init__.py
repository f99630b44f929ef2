"""Hydra plugins: a sweeper that checks all jobs first, a launcher that uses all cores.

Hydra imports this page at every start, so it holds no more than the classes' names. It does so
outside sys.modules, where dataclasses cannot resolve postponed annotations: hence no __future__.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class ErsimSweeperConf(BasicSweeperConf):
    """Options of the sweeper: `params` as in Hydra's basic sweeper."""

    _target_: str = "hydra_plugins.ersim_sweep.ErsimSweeper"


class ErsimSweeper(BasicSweeper):
    """Every combination of the overrides; all are checked before the first starts."""

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep, write its comparison and figures, log it. Raises SystemExit on bad input."""
        from experiments.sweep import run_sweep

        return run_sweep(self, arguments)


@dataclass
class ProcessLauncherConf:
    """Options of the launcher: how many worker processes; None takes one per core."""

    _target_: str = "hydra_plugins.ersim_sweep.ProcessLauncher"
    workers: Optional[int] = None


class ProcessLauncher(Launcher):
    """Runs jobs in forked processes that inherit all that is already loaded, with a progress bar."""

    def __init__(self, workers: Optional[int]) -> None:
        self.workers = workers
        self.config: Optional[DictConfig] = None
        self.hydra_context: Optional[HydraContext] = None
        self.task_function: Optional[TaskFunction] = None
        self.composed: Sequence[DictConfig] = ()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; one return per job, failed ones included, in order."""
        from experiments.launch import launch

        return launch(self, job_overrides, initial_job_idx)


_STORE = ConfigStore.instance()
_STORE.store(group="hydra/sweeper", name="ersim", node=ErsimSweeperConf, provider="ersim")
_STORE.store(group="hydra/launcher", name="processes", node=ProcessLauncherConf, provider="ersim")
