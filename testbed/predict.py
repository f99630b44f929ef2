"""Simulates a live run: the same requests, the measured calibration, contention included.

The requests are those of the live run in every replication (same workload seed); what varies is
what we are unsure of: the coefficients of steps and of contention, how fast this start of a server is and
how far a run may be from that (`standing`), what single steps do beyond them (`step_scatter`), and what
requests wait for outside the engines (`waits`), of which a profile records a hundred or two.

Replication 0 has the means of coefficients, starts and exponents; those after it come in pairs, a draw of
them and its reflection (for the scatter the same recording from half of it on; waits are drawn for each,
and so is the factor on steps beyond a calibration's range). Otherwise the mean of a few replications is
that of a few draws, of the same seeds in every run: in the mean of seven live runs the first three of seven
draws told requests of the smaller of two experts 2 to 7 % too short at 16 users, and the means 1 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np

from ersim.config import SimulationConfig
from ersim.prepare import Preparations
from ersim.results import Window, combine
from ersim.system import RunOutput, System
from ersim.types import StepTime
from ersim.workload import Workload, build_workload
from testbed.contention import ContendedStepTime, Contention, neighbours
from testbed.fleet_calibration import FleetCalibration
from testbed.host_speed import SpeedTrace
from testbed.pooled import IdArray, Run, pooled_figures
from testbed.sensitivity import Sensitivity
from testbed.waits import add_waits, resampled

ANOTHER_SEED = 104_729
LONGER = 1.5  # simulated over measured seconds: a slower prediction still ends the requests it is judged on


def live_workload(config: SimulationConfig, shared: Preparations, repeat: int = 0) -> Workload:
    """The workload object of a run; the live load and every replication make it anew from one seed.

    Each repeat has a seed of its own, so that repeats are more requests and not the same ones again.
    """
    prompts = shared.prompt_set(config.workload.prompts)
    seed = config.seed + ANOTHER_SEED * repeat
    return build_workload(config.workload, prompts, config.users, seed, shared.routing(config).ask)


Speed = Mapping[str, SpeedTrace]  # by expert: how fast the host ran while its run was measured


def _step_times(
    config: SimulationConfig,
    shared: Preparations,
    known: FleetCalibration | None,
    replication: int,
    speed: Speed,
    repeat: int,
) -> list[StepTime]:
    """Step times by expert: coefficients and starts by pair of replications, the rest by repeat too."""
    times: list[StepTime] = []
    replicas = {name: expert.replicas for name, expert in config.fleet.experts.items()}
    pair, mirrored = (replication + 1) // 2, replication > 0 and replication % 2 == 0
    if replication:
        start = np.random.default_rng([config.seed + pair, 8])
        run = [config.seed + pair, 9, repeat]  # one host, which all experts of a run share
        speed = {
            name: trace.drawn(start, np.random.default_rng(run), mirrored) for name, trace in speed.items()
        }
    models = {name: shared.expert(e, f"fleet.experts.{name}") for name, e in config.fleet.experts.items()}
    draws = {
        name: np.random.default_rng([config.seed + pair, 5, index]) if replication else None
        for index, name in enumerate(models)
    }
    alone = {name: model.step_time(draws[name], mirrored) for name, model in models.items()}
    if known is None:
        return list(alone.values())
    for index, (name, model) in enumerate(models.items()):
        rng = draws[name]
        fitted = known.contention.get(name, Contention())
        contention = fitted if rng is None else fitted.drawn(rng, mirrored)
        moments = np.random.default_rng([config.seed + pair, 6, index, repeat])
        player = fitted.scatter.player(moments, mirrored) if config.uncertainty.step_noise else None
        around = neighbours(name, replicas)
        felt = Sensitivity.of(model.calibration)
        times.append(ContendedStepTime(alone[name], contention, around, speed.get(name), player, name, felt))
    return times


def predict_once(
    config: SimulationConfig,
    shared: Preparations,
    known: FleetCalibration | None,
    replication: int,
    speed: Speed | None = None,
    repeat: int = 0,
) -> RunOutput:
    """One replication; number 0 has the means, later ones draw in pairs. No speed: slowness 1."""
    routing = shared.routing(config)
    times = _step_times(config, shared, known, replication, speed or {}, repeat)
    if known is not None:  # which brings its own scatter of steps
        config = replace(config, uncertainty=replace(config.uncertainty, step_noise=False))
    experts = [shared.expert(e, f"fleet.experts.{n}") for n, e in config.fleet.experts.items()]
    system = System(
        config,
        experts,
        times,
        shared.prompt_set(config.workload.prompts).prompts,
        live_workload(config, shared, repeat),
        deepcopy(routing.policy),
        None if config.faults else routing.known,
        config.seed + 7919 * replication,
        fast_forward=known is None,
    )
    states = dict(zip(config.fleet.experts, system.replicas, strict=True))
    counts = {name: len(row) for name, row in states.items()}
    contended = {
        name: time for name, time in zip(states, times, strict=True) if isinstance(time, ContendedStepTime)
    }
    for name, time in contended.items():
        around = neighbours(name, counts)
        theirs = [contended[other] for other in around]
        time.watch([states[other] for other in around], lambda: system.env.now, theirs)
    return system.run()


def predicted_summary(
    config: SimulationConfig,
    shared: Preparations,
    known: FleetCalibration,
    window: Window,
    replications: int,
    judged: Sequence[IdArray],
    speeds: Sequence[Speed],
) -> dict[str, object]:
    """Combined figures of a load over the live runs' own windows and requests.

    A pair of draws is one degree of freedom: either tells what the other one does.

    judged: ids of the requests that latencies are taken from, by repeat (see `pooled`). speeds: how
    fast the host ran, by repeat.
    """
    workload = replace(config.workload, max_duration_s=LONGER * window.end_s)
    config = replace(config, workload=workload)
    summaries = []
    for number in range(replications):
        rng = np.random.default_rng([config.seed + number, 7])
        waits = resampled(known.waits, rng) if number else known.waits
        runs = [
            _seen_by_clients(predict_once(config, shared, known, number, speed, repeat), config, waits, rng)
            for repeat, speed in enumerate(speeds)
        ]
        summaries.append(pooled_figures(runs, window, judged, config.objective))
    return combine(summaries, config.uncertainty.level, freedom=max(1, replications // 2))


def _seen_by_clients(
    output: RunOutput, config: SimulationConfig, waits: Sequence[Sequence[float]], rng: np.random.Generator
) -> Run:
    """Requests and gaps with recorded waits. Measured gateway time ends where the expert's front end begins,
    so the time that stands for those front ends (backend_network_s, both ways) is not counted as gateway."""
    frame = output.requests
    frame = frame.assign(gateway_s=frame["gateway_s"] - 2 * config.gateway.backend_network_s)
    return add_waits(frame, waits, rng), output.gaps


def with_shares(summary: Mapping[str, Any], experts: Sequence[str]) -> dict[str, Any]:
    """The summary and `share_<expert>`, of completed requests, with its interval where there is one.

    An expert that completed nothing has a share of 0.
    """
    blocks = summary.get("per_expert") or {}
    found = dict(summary)
    for name in experts:
        block = blocks.get(name) or {}
        found[f"share_{name}"] = float(block.get("share") or 0.0)
        for edge in ("low", "high"):
            found[f"share_{name}_{edge}"] = block.get(f"share_{edge}")
    return found
