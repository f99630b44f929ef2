"""How fast this machine is right now, relative to when its calibration was made.

Shared machines change speed by tens of percent within minutes. A short burst with lengths of its
own, sent to each expert before and after a measured run while nothing else is on the fleet, tells
the factor between recorded and predicted step times at that moment. It uses no request of the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import numpy as np

from ersim.config import SimulationConfig
from ersim.prepare import Preparations
from testbed.fleet import LiveFleet
from testbed.plan import ProfilePlan
from testbed.profiling import Profiler, ProfileRun
from testbed.step_log import read_step_log

BURSTS = ProfilePlan(
    prefill_tokens=[96],
    repeats=2,
    decode_batches=[1, 3],
    decode_contexts=[48],
    decode_tokens=12,
    mixed_users=[],
    seconds=10.0,
)
LOG_DELAY_S = 0.7  # the recorder writes twice a second


def speed_factors(
    config: SimulationConfig, shared: Preparations, live: LiveFleet, seed: int
) -> dict[str, float]:
    """Recorded over predicted step time by expert, median over the bursts' steps; 1 is as calibrated."""
    runs: dict[str, ProfileRun] = {}
    for index, name in enumerate(config.fleet.experts):
        url = live.servers[name][0].spec.url
        profiler = Profiler(url, name, 1000, config.workload, seed + index)
        runs[name] = asyncio.run(profiler.run(BURSTS, 8))
    time.sleep(LOG_DELAY_S)
    return {name: _factor(config, shared, live, name, run) for name, run in runs.items()}


def _factor(
    config: SimulationConfig, shared: Preparations, live: LiveFleet, name: str, run: ProfileRun
) -> float:
    step_time = shared.expert(config.fleet.experts[name], f"fleet.experts.{name}").step_time()
    log = read_step_log(live.servers[name][0].spec.steps_path)
    log = log.between(run.phases[0].start_s, run.phases[-1].end_s)
    ratios = log.periods_s() / np.array([step_time.step_s(step.batch()) for step in log.steps])
    return float(np.median(ratios))


def scaled(base: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """Base factors of a fleet calibration at the machine's present speed."""
    return {name: value * factors.get(name, 1.0) for name, value in base.items()}


def mean_factors(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The speed during a run, from the bursts around it."""
    return {name: (before[name] + after[name]) / 2 for name in before}
