"""How fast one start of a server is: what it makes of its calibration, whatever the host's speed.

Two starts of one server on one machine differ. In one `make live` every step of the larger expert
took 25 % longer than in the start that had been profiled minutes before, in all runs alike, with the
engine's thread on its core for 99 % of the time (where its weights came to lie in memory may be why).
So before each round of runs every server answers a few fixed requests alone. What its steps take over
what its calibration says, cleared of the host's speed at that moment, is its slowness, felt by each
step as the host's is (`sensitivity`). No request of a run is looked at. All rounds of one start are one
figure: a round that was disturbed has a large doubt, and counts little; how far they are apart goes
into the intervals. Not used on GPUs, nor for the start that was profiled, which is its own measure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import trim_mean

from ersim.config import FleetConfig, WorkloadConfig
from ersim.errors import DataError
from ersim.prepare import Preparations
from ersim.steptime import Calibration, load_model
from ersim.types import StepTime
from testbed.calmly import TRIES, Calmly
from testbed.common_load import ROUND_STD
from testbed.expert_server import ExpertServer
from testbed.fleet import LiveFleet
from testbed.front_end import FrontEnd
from testbed.plan import ProfilePlan
from testbed.profile_fit import profile_steps
from testbed.profiling import Profiler, ProfileRun
from testbed.sensitivity import Sensitivity, one_row_share
from testbed.speed_probe import UsualProbe
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
LEAST_DOUBT = 0.015  # of one check: its phases may agree by chance
USUAL_WANDER = ROUND_STD  # relative, from round to round
START_STD = 0.15  # relative, between starts: single checks said 0.79 to 1.42 in three measurements
USUAL_CHECKS = 3  # as many checks' worth that is; three of one's own may agree by chance


@dataclass(frozen=True)
class Standing:
    """One start of a server, measured over calibrated, both at the same speed of the host.

    factor: slowness of the start, multiplied with the host's; doubt: its relative standard error, from
    the spread between phases or checks. steps: how many were seen. wander: relative standard deviation
    between checks of one start, which is as far as a run may be from their mean; few checks say little
    of it, and are held near what is usual. share: of a step of one row in the steps seen (see
    `sensitivity`): how steps of that share took is known, whatever the exponents.
    """

    factor: float = 1.0
    doubt: float = 0.0
    steps: int = 0
    wander: float = 0.0
    share: float = 1.0


def together(standings: Sequence[Standing]) -> Standing:
    """All checks of one start as one: each counts by its doubt, and their spread adds to it.

    Starts are near 1 (`START_STD`): a doubtful check alone moves little. The checks' own doubt is no wander.
    """
    if not standings:
        return Standing()
    logs = np.log([one.factor for one in standings])
    doubts = np.array([one.doubt for one in standings])
    weights = 1.0 / (doubts**2 + LEAST_DOUBT**2)
    known = float(weights.sum()) + 1.0 / START_STD**2
    mean = float(weights @ logs) / known
    others = len(standings) - 1
    variance = float(weights @ (logs - mean) ** 2 / weights.sum()) * len(standings) / max(1, others)
    doubt = float(np.sqrt(max(1.0 / known, variance / len(standings) if others else 0.0)))
    own = float(weights @ doubts**2 / weights.sum())
    seen = others * max(0.0, variance - own)
    wander = float(np.sqrt((seen + USUAL_CHECKS * USUAL_WANDER**2) / (others + USUAL_CHECKS)))
    share = float(weights @ [one.share for one in standings] / weights.sum())
    return Standing(float(np.exp(mean)), doubt, sum(one.steps for one in standings), wander, share)


def check_standing(
    server: ExpertServer,
    alone: StepTime,
    calibration: Calibration,
    vocab_size: int,
    workload: WorkloadConfig,
    seed: int,
    calmly: Calmly,
) -> Standing:
    """Drive the `CHECK` plan through one server while nothing else runs; again where others disturbed it.

    alone: step time of its calibration. seed: of the prompts, and as many after it as there may be `TRIES`:
    prompts seen before would be cached. Raises ExpertFailed with the end of its log once it has ended.
    """
    plan = short_enough(CHECK, int(calibration.engine["max_model_len"]))

    def check(attempt: int) -> Standing:
        profiler = Profiler(
            server.spec.url, server.spec.expert, vocab_size, workload, seed + attempt,
            check_alive=server.check_alive,
        )  # fmt: skip
        began_s = time.monotonic()
        run = asyncio.run(profiler.run(plan, max(plan.decode_batches)))
        time.sleep(FLUSH_S)
        server.check_alive()
        log = read_step_log(server.spec.steps_path).between(began_s, time.monotonic())
        return standing(
            log, run, alone, UsualProbe.of(calibration), Sensitivity.of(calibration), FrontEnd.of(calibration)
        )

    return calmly.now(f"{server.spec.name} alone", check)


def short_enough(plan: ProfilePlan, max_model_len: int) -> ProfilePlan:
    """The plan without the prompts that an engine of that context would refuse."""
    longest = max_model_len - plan.decode_tokens
    prompts = [min(tokens, longest) for tokens in plan.prefill_tokens]
    return replace(plan, prefill_tokens=sorted(set(prompts)))


def check_all(
    live: LiveFleet,
    fleet: FleetConfig,
    shared: Preparations,
    workload: WorkloadConfig,
    seed: int,
    calmly: Calmly,
    say: Callable[[str], None] | None = None,
    known: Collection[str] = (),
) -> dict[str, Standing]:
    """Every CPU server in turn, by server; servers on GPUs are left out, and those known.

    fleet: with calibrations. known: servers that need no check, since they themselves were profiled.
    """
    vocab_size = min(load_model(expert.model).vocab_size for expert in fleet.experts.values())
    found = {}
    for number, (name, servers) in enumerate(live.servers.items()):
        model = shared.expert(fleet.experts[name], f"fleet.experts.{name}")
        alone = model.step_time(None)
        for server in servers:
            if server.spec.live.device != "cpu" or server.spec.name in known:
                continue
            prompts = CHECK_SEED + 100 * seed + TRIES * number
            stands = check_standing(server, alone, model.calibration, vocab_size, workload, prompts, calmly)
            found[server.spec.name] = stands
            if say is not None:
                known_to = f"{stands.factor:.3f} +- {stands.factor * stands.doubt:.3f}"
                say(f"{server.spec.name} alone: this start runs as on a host of slowness {known_to}")
    return found


def standing(
    log: StepLog,
    run: ProfileRun,
    alone: StepTime,
    usual: UsualProbe | None = None,
    sensitivity: Sensitivity | None = None,
    own: FrontEnd | None = None,
) -> Standing:
    """The standing that a check's steps show. Raises DataError when it recorded none.

    A check of which one phase is left (requests failed) is as doubtful as none.

    usual: what the probe takes at slowness 1; None where nothing is probed. sensitivity, own: the exponents
    and the front end of the calibration.
    """
    felt = sensitivity or Sensitivity()
    ratios, shares = [], []
    for phase in run.phases:
        if phase.name == "warmup" or phase.skipped is not None:
            continue
        try:
            batches, measured_s, slow = profile_steps(log, ProfileRun([phase]), usual, own)
        except DataError:  # a phase without steps; none at all is an error below
            continue
        told_s = np.array([alone.step_s(batch) for batch in batches])
        share = one_row_share(alone, told_s)
        cleared_s = measured_s / felt.slowed_each(slow, share)
        each = (cleared_s / told_s) ** (1.0 / felt.exponents(share))
        ratios.append(float(trim_mean(each, TRIMMED)))
        shares.append(float(share.mean()))
    if not ratios:
        raise DataError(f"no step of the check was recorded ({run.failures or 'no request failed'})")
    factor = float(np.mean(ratios))
    doubt = float(np.std(ratios, ddof=1) / np.sqrt(len(ratios)) / factor) if len(ratios) > 1 else START_STD
    return Standing(factor, doubt, len(log.steps), share=float(np.mean(shares)))
