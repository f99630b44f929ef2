"""Simulates a live run: the same requests, the measured calibration, contention included.

The requests are those of the live run in every replication (same workload seed); what varies is
what we are unsure of: the coefficients and the noise of single steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np

from ersim.config import SimulationConfig
from ersim.prepare import Preparations
from ersim.results import Window, breakdown, combine, summarise
from ersim.system import RunOutput, System
from ersim.types import StepTime
from ersim.workload import Workload, build_workload
from testbed.contention import ContendedStepTime
from testbed.fleet_calibration import FleetCalibration


def live_workload(config: SimulationConfig, shared: Preparations) -> Workload:
    """The workload object of a run; the live load and every replication make it anew from one seed."""
    prompts = shared.prompt_set(config.workload.prompts)
    return build_workload(config.workload, prompts, config.users, config.seed, shared.routing(config).ask)


def _step_times(
    config: SimulationConfig, shared: Preparations, known: FleetCalibration | None, seed: int | None
) -> list[StepTime]:
    """One step time per expert; `seed` None takes the mean coefficients."""
    times: list[StepTime] = []
    names = list(config.fleet.experts)
    for index, (name, expert) in enumerate(config.fleet.experts.items()):
        model = shared.expert(expert, f"fleet.experts.{name}")
        rng = None if seed is None else np.random.default_rng([seed, 5, index])
        alone = model.step_time(rng)
        if known is None:
            times.append(alone)
            continue
        slowdowns = [known.slowdowns.get(name, {}).get(other, 0.0) for other in names if other != name]
        times.append(ContendedStepTime(alone, known.base.get(name, 1.0), slowdowns))
    return times


def predict_once(
    config: SimulationConfig, shared: Preparations, known: FleetCalibration | None, replication: int
) -> RunOutput:
    """One replication; number 0 has the mean coefficients, later ones draw them."""
    routing = shared.routing(config)
    times = _step_times(config, shared, known, None if replication == 0 else config.seed + replication)
    experts = [shared.expert(e, f"fleet.experts.{n}") for n, e in config.fleet.experts.items()]
    system = System(
        config,
        experts,
        times,
        shared.prompt_set(config.workload.prompts).prompts,
        live_workload(config, shared),
        deepcopy(routing.policy),
        None if config.faults else routing.known,
        config.seed + 7919 * replication,
        fast_forward=known is None,
    )
    for index, time in enumerate(times):
        if isinstance(time, ContendedStepTime):
            time.watch([row for other, row in enumerate(system.replicas) if other != index])
    return system.run()


def predicted_summary(
    config: SimulationConfig,
    shared: Preparations,
    known: FleetCalibration | None,
    window: Window,
    replications: int,
) -> tuple[dict[str, object], RunOutput]:
    """Combined figures over the live run's own window, and the first replication's output."""
    outputs = [predict_once(config, shared, known, number) for number in range(replications)]
    summaries = [_figures(config, output, window) for output in outputs]
    return combine(summaries, config.uncertainty.level), outputs[0]


def _figures(config: SimulationConfig, output: RunOutput, window: Window) -> dict[str, object]:
    """The live run's figures. Measured gateway time ends where the expert's front end begins, so the
    time that stands for those front ends (backend_network_s, both ways) is not counted as gateway."""
    requests = output.requests.assign(
        gateway_s=output.requests["gateway_s"] - 2 * config.gateway.backend_network_s
    )
    summary = summarise(
        requests,
        output.gaps,
        window,
        ttft_objective_s=config.objective.ttft_s,
        tpot_objective_s=config.objective.tpot_s,
    )
    summary["per_expert"] = breakdown(requests, window, "expert")
    return summary


def shares(summary: dict[str, object], experts: Sequence[str]) -> dict[str, float]:
    """Share of requests per expert."""
    blocks = summary.get("per_expert") or {}
    assert isinstance(blocks, dict)
    return {name: float((blocks.get(name) or {}).get("share") or 0.0) for name in experts}
