"""How fast a server runs just before a load: what this start of it, at this hour, makes of its calibration.

Two starts of one server on one machine differ. In one `make live` every step of the larger expert
took 25 % longer than in the start that had been profiled minutes before, in all runs alike, with the
engine's thread on its core for 99 % of the time (where its weights came to lie in memory may be why).
So before each round of runs every server answers a few fixed requests alone. What its steps take over
what its calibration says is its factor; no request of a run is looked at. Not used on GPUs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import trim_mean

from ersim.config import FleetConfig, WorkloadConfig
from ersim.errors import DataError
from ersim.prepare import Preparations
from ersim.steptime import load_model
from ersim.types import StepTime
from testbed.expert_server import ExpertServer
from testbed.fleet import LiveFleet
from testbed.host_speed import reference_probe_s
from testbed.plan import ProfilePlan
from testbed.profiling import Profiler, ProfileRun, profile_steps
from testbed.step_log import StepLog, read_step_log

CHECK = ProfilePlan(
    prefill_tokens=[128, 512],
    repeats=1,
    decode_batches=[1, 4],
    decode_contexts=[64],
    decode_tokens=24,
    mixed_users=[],
    rounds=2,
    seconds=15.0,
)
"""Some four seconds on one CPU core."""
TRIMMED = 0.05  # of the ratios at either end: stalls
CHECK_SEED = 500_000  # prompts of a check are nobody else's
FLUSH_S = 1.0  # the recorder writes twice a second


@dataclass(frozen=True)
class Standing:
    """One server alone, measured over calibrated.

    factor: on step times; doubt: its relative standard error, from the spread between phases.
    probe_s: what the speed probe took meanwhile (see `host_speed`), None without one. steps: how many.
    """

    factor: float = 1.0
    doubt: float = 0.0
    probe_s: float | None = None
    steps: int = 0


def check_standing(
    server: ExpertServer, alone: StepTime, vocab_size: int, workload: WorkloadConfig, seed: int
) -> Standing:
    """Drive the `CHECK` plan through one server while nothing else runs.

    alone: its calibrated step time. seed: of the prompts; another one each time, or they are cached.
    """
    profiler = Profiler(server.spec.url, server.spec.expert, vocab_size, workload, seed)
    began_s = time.monotonic()
    run = asyncio.run(profiler.run(CHECK, max(CHECK.decode_batches)))
    time.sleep(FLUSH_S)
    return standing(read_step_log(server.spec.steps_path).between(began_s, time.monotonic()), run, alone)


def check_all(
    live: LiveFleet,
    fleet: FleetConfig,
    shared: Preparations,
    workload: WorkloadConfig,
    seed: int,
    say: Callable[[str], None] | None = None,
) -> dict[str, Standing]:
    """Every CPU server in turn, by server; servers on GPUs are left out. fleet: with calibrations."""
    vocab_size = min(load_model(expert.model).vocab_size for expert in fleet.experts.values())
    found = {}
    for number, (name, servers) in enumerate(live.servers.items()):
        expert = fleet.experts[name]
        alone = shared.expert(expert, f"fleet.experts.{name}").step_time(None)
        for server in servers:
            if server.spec.live.device != "cpu":
                continue
            stands = check_standing(server, alone, vocab_size, workload, CHECK_SEED + 100 * seed + number)
            found[server.spec.name] = stands
            if say is not None:
                say(f"{server.spec.name} alone: steps take {stands.factor:.3f} of the calibrated time")
    return found


def standing(log: StepLog, run: ProfileRun, alone: StepTime) -> Standing:
    """The standing that a check's steps show. Raises DataError when it recorded none."""
    ratios = []
    for phase in run.phases:
        if phase.name == "warmup" or phase.skipped is not None:
            continue
        try:
            batches, measured = profile_steps(log, ProfileRun([phase]))
        except DataError:  # a phase without steps; none at all is an error below
            continue
        told = np.array([alone.step_s(batch) for batch in batches])
        ratios.append(float(trim_mean(measured / told, TRIMMED)))
    if not ratios:
        raise DataError(f"no step of the check was recorded ({run.failures or 'no request failed'})")
    factor = float(np.mean(ratios))
    doubt = float(np.std(ratios, ddof=1) / np.sqrt(len(ratios)) / factor) if len(ratios) > 1 else 0.0
    return Standing(factor, doubt, reference_probe_s(log), len(log.steps))
