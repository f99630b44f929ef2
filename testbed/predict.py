"""Simulates a live run: the same requests, the measured calibration, contention included.

The requests are those of the live run in every replication (same workload seed); what varies is
what we are unsure of: the coefficients and the noise of single steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import numpy as np

from ersim.config import SimulationConfig
from ersim.prepare import Preparations
from ersim.results import Window, breakdown, combine, summarise
from ersim.system import RunOutput, System
from ersim.types import StepTime
from ersim.workload import Workload, build_workload
from testbed.contention import ContendedStepTime, Contention
from testbed.fleet_calibration import FleetCalibration
from testbed.host_speed import SpeedTrace


def live_workload(config: SimulationConfig, shared: Preparations) -> Workload:
    """The workload object of a run; the live load and every replication make it anew from one seed."""
    prompts = shared.prompt_set(config.workload.prompts)
    return build_workload(config.workload, prompts, config.users, config.seed, shared.routing(config).ask)


Speed = Mapping[str, SpeedTrace]  # by expert: how fast the host ran while its run was measured


def _step_times(
    config: SimulationConfig,
    shared: Preparations,
    known: FleetCalibration | None,
    seed: int | None,
    speed: Speed,
) -> list[StepTime]:
    """One step time per expert; `seed` None takes the mean coefficients."""
    times: list[StepTime] = []
    names = list(config.fleet.experts)
    for index, (name, expert) in enumerate(config.fleet.experts.items()):
        model = shared.expert(expert, f"fleet.experts.{name}")
        alone = model.step_time(None if seed is None else np.random.default_rng([seed, 5, index]))
        if known is None:
            times.append(alone)
            continue
        others = [other for other in names if other != name]
        contention = known.contention.get(name, Contention())
        times.append(ContendedStepTime(alone, contention, others, speed.get(name)))
    return times


def predict_once(
    config: SimulationConfig,
    shared: Preparations,
    known: FleetCalibration | None,
    replication: int,
    speed: Speed | None = None,
) -> RunOutput:
    """One replication; number 0 has the mean coefficients, later ones draw them. No speed: slowness 1."""
    routing = shared.routing(config)
    seed = None if replication == 0 else config.seed + replication
    times = _step_times(config, shared, known, seed, speed or {})
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
            neighbours = [row for other, row in enumerate(system.replicas) if other != index]
            time.watch(neighbours, lambda: system.env.now)
    return system.run()


def predicted_summary(
    config: SimulationConfig,
    shared: Preparations,
    known: FleetCalibration | None,
    window: Window,
    replications: int,
    speeds: Sequence[Speed] = ({},),
) -> tuple[dict[str, object], RunOutput]:
    """Combined figures over the live run's own window, and the first replication's output.

    speeds: one for each repeat of the live run; replications take them in turn.
    """
    outputs = [
        predict_once(config, shared, known, number, speeds[number % len(speeds)])
        for number in range(max(replications, len(speeds)))
    ]
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
