"""Build the workload that a config describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ersim.config import WorkloadConfig, validate_workload
from ersim.errors import bad_value
from ersim.workload.base import Workload
from ersim.workload.closed import ClosedWorkload
from ersim.workload.opened import OpenWorkload
from ersim.workload.prompts import PromptSet
from ersim.workload.replay import TraceWorkload

WORKLOADS: dict[str, Callable[[WorkloadConfig, PromptSet, int, int, Sequence[int] | None], Workload]] = {
    "closed": ClosedWorkload,
    "poisson": OpenWorkload,
    "gamma": OpenWorkload,
    "trace": TraceWorkload,
}


def build_workload(
    config: WorkloadConfig, prompts: PromptSet, users: int, seed: int, ask: Sequence[int] | None = None
) -> Workload:
    """The workload of `users` users (closed) or the stream that `config.arrivals` names.

    ask: indices of the prompts that may be asked, None for all. The same arguments give the same
    requests. Raises ConfigError for values out of range, DataError for a trace that cannot be used.
    """
    validate_workload(config)
    if users < 1:
        raise bad_value("users", ">= 1", users)
    return WORKLOADS[config.arrivals](config, prompts, users, seed, ask)
