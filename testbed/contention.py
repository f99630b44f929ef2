"""How much experts on one machine slow each other, and step times that know it.

Two servers on one host share caches, memory bandwidth and whatever cores their front ends, the
gateway and the client run on. A calibration is made with the others idle: gateway and client then have a
core of their own. Here what busy neighbours add is fitted to steps recorded under common load:

    period / slowed = base * alone * (1 + felt * sum over others of slowdown[other] * share they ran)
                      + token_wait_s * traffic

traffic is what gateway and client have to pass on while the step holds one of the cores that they run on:
the tokens that the others hand out meanwhile, and its own as far as the others run too (whose cores are free
otherwise). What one step of theirs hands out comes in one piece, which costs as much as `HAND_OUT_TOKENS`
tokens more, however many are in it. The engine's thread knows what it waited for its core
(`core_wait`), beyond what its own front end takes of it (`front_end`): token_wait_s is that over the traffic,
and 0 where nobody counts it.

felt is the exponent with which the step feels a slow host (`sensitivity`): a neighbour is one more user of
the same memory and caches. Others are all replicas of
other experts and the other ones of its own, each for itself: two that run all the time count twice. Steps
of all of the expert's replicas make the fit. slowed is what the host's speed makes of the step; what it did
beyond the probe in a round of common load is a factor on the first term (`common_load`). base is 1 on a host
that is probed, since the time alone was measured on it; elsewhere it holds what gateway and front ends add.
(A cost per row and per request beside the slowdowns predicted worse: it fitted the round.)

Steps of moments at which the hypervisor took cores away are left out (`core_time.calmest`): what it stole can
be taken off their mean, but not off their scatter, which is replayed.

The doubt of the fit is that of its moments: the same fit to blocks of a few seconds, drawn with
replacement. What single steps do beyond the fit is kept as it came (`step_scatter`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ersim.types import Batch, ReplicaState, StepTime
from testbed.common_load import CommonLoad
from testbed.core_time import calmest, told_stretch, waited_for_others_s
from testbed.front_end import FrontEnd
from testbed.host_speed import SpeedTrace
from testbed.sensitivity import ONE_ROW, OUTLIER_RATIO, Sensitivity, one_row_share
from testbed.step_log import StepLog
from testbed.step_scatter import ScatterPlayer, StepScatter, measure_scatter

FloatArray = npt.NDArray[np.float64]
MIN_STEPS = 50
TINY_S = 1e-9
HAND_OUT_TOKENS = 2.0
"""What steps of two experts waited in five measurements at 1 to 16 users was fitted with a time for each
token and one for each hand-out: the latter was 0.9 to 3.4 times the former. By tokens alone steps were told
to wait up to 1.3 % of their time too little at 8 users where that was right at 16."""


def busy_share(starts_s: FloatArray, ends_s: FloatArray, other: StepLog) -> FloatArray:
    """Share of each interval during which the other expert executed a step, shape (n,)."""
    other_ends = other.ends_s()
    if len(other_ends) == 0:
        return np.zeros(len(starts_s))
    lengths = other.periods_s()
    other_starts = other_ends - lengths
    total = np.concatenate(([0.0], np.cumsum(lengths)))

    def executed_before(moment: FloatArray) -> FloatArray:
        index = np.searchsorted(other_starts, moment, side="right")
        last = np.maximum(index - 1, 0)
        inside = np.clip(moment - other_starts[last], 0.0, lengths[last])
        result: FloatArray = np.where(index > 0, total[last] + inside, 0.0)
        return result

    share = (executed_before(ends_s) - executed_before(starts_s)) / np.maximum(ends_s - starts_s, 1e-9)
    clipped: FloatArray = np.clip(share, 0.0, 1.0)
    return clipped


def handed_out(starts_s: FloatArray, ends_s: FloatArray, other: StepLog, each: float = 0.0) -> FloatArray:
    """Tokens that another's steps handed out during each interval, spread over those steps, shape (n,).

    each: tokens that a step's hand-out counts beside them; one that hands out nothing counts nothing.
    """
    if not other.steps:
        return np.zeros(len(starts_s))
    counted = [step.tokens_out + each * (step.tokens_out > 0) for step in other.steps]
    ends, handed = other.ends_s(), np.cumsum(counted)
    edges_s = np.maximum.accumulate(np.stack([ends - other.periods_s(), ends], axis=1).ravel())
    so_far = np.stack([np.concatenate(([0], handed[:-1])), handed], axis=1).ravel()
    found: FloatArray = np.interp(ends_s, edges_s, so_far) - np.interp(starts_s, edges_s, so_far)
    return found


@dataclass(frozen=True)
class Contention:
    """What common load adds to one expert's steps, see this module's head; factors.

    slowdowns: by the expert whose replica runs, its own name standing for its other replicas. token_wait_s:
    for each token of the traffic; hand_out_tokens: how many a hand-out of this expert's counts in that of
    others, beside its tokens.
    refits: [base, *slowdowns, token_wait_s] fitted to other moments.
    scatter: of single steps under common load. rounds: what each round of common load took over all of this;
    for the record.
    """

    slowdowns: Mapping[str, float] = field(default_factory=dict)
    refits: Sequence[Sequence[float]] = ()
    scatter: StepScatter = field(default_factory=StepScatter)
    base: float = 1.0
    rounds: Sequence[float] = ()
    token_wait_s: float = 0.0
    hand_out_tokens: float = 0.0

    def drawn(self, rng: np.random.Generator, mirrored: bool = False) -> Contention:
        """One of the refits in place of the fit; the fit itself when there are none.

        mirrored: the refit's reflection at the fit; where that would be below what it may be (nothing, a base
        of 1), as far of it as all of it may be: what falls in one part rises in another.
        """
        if not self.refits:
            return self
        refit = np.array(self.refits[int(rng.integers(len(self.refits)))])
        if mirrored:
            fit = np.array([self.base, *self.slowdowns.values(), self.token_wait_s])
            off = fit - refit
            room = fit - np.minimum(fit, [1.0, *np.zeros(len(fit) - 1)])
            falls = off < 0.0
            refit = fit + off * np.min(room[falls] / -off[falls], initial=1.0)
        base, *slowdowns, token_wait_s = refit.tolist()
        named = dict(zip(self.slowdowns, slowdowns, strict=True))
        return replace(self, base=base, token_wait_s=token_wait_s, slowdowns=named)


def neighbours(name: str, replicas: Mapping[str, int]) -> list[str]:
    """Whose replicas slow one of this expert's: all other experts, and its own where it has several."""
    return [other for other in replicas if other != name] + [name] * (replicas[name] > 1)


@dataclass(frozen=True)
class Recorded:
    """Steps of one replica under common load; arrays over its steps, shares: one array per neighbour.

    traffic, waited_s: see `common_load.CommonLoad`. stretches: factors of stolen time, NaN
    where nobody told.
    """

    batches: Sequence[Batch]
    measured_s: FloatArray
    ends_s: FloatArray
    shares: Sequence[FloatArray]
    traffic: FloatArray
    waited_s: FloatArray
    stretches: FloatArray

    @classmethod
    def of(
        cls,
        log: StepLog,
        around: Sequence[Sequence[StepLog]],
        slow: FloatArray | None = None,
        own: FrontEnd | None = None,
    ) -> Recorded:
        """around: the logs of each neighbour's replicas; the replica's own log among them is left out.

        own: what the expert's front end takes, None where nobody counted it.
        """
        periods, ends = log.periods_s(), log.ends_s()
        starts, others = ends - periods, [[one for one in logs if one is not log] for logs in around]
        shares = [np.sum([busy_share(starts, ends, one) for one in logs], axis=0) for logs in others]
        passed = [handed_out(starts, ends, one, HAND_OUT_TOKENS) for logs in others for one in logs]
        batches = [step.batch() for step in log.steps]
        rows = np.array([batch.sampled_seqs for batch in batches], dtype=float)
        traffic = np.sum(passed, axis=0) + rows * np.sum(shares, axis=0) / max(1, len(passed))
        slowed = 1.0 if slow is None else slow
        waited_s = waited_for_others_s(log, own) / slowed
        return cls(batches, periods / slowed, ends, shares, traffic, waited_s, told_stretch(log))


def fit_contention(
    name: str,
    logs: Mapping[str, Sequence[StepLog]],
    alone: StepTime,
    slow: Sequence[FloatArray] | None = None,
    seed: int = 0,
    rounds_s: Sequence[float] = (),
    sensitivity: Sensitivity | None = None,
    steady: bool = False,
    own: FrontEnd | None = None,
) -> Contention:
    """Contention of one expert, from steps of all its replicas under common load; too few steps give none.

    logs: of every expert's replicas. alone: the step time of `name`. slow: factor of the host's speed on
    each step of its replicas, shape (steps,) each; None is 1. seed: of the refits. rounds_s: when the rounds
    of common load began, on the logs' clock; none make one round of all. sensitivity: of the expert's steps;
    None: all feel a neighbour alike. steady: nothing else disturbs the host (see `common_load`).
    own: what the expert's front end takes of its core, as its calibration says.
    """
    names = neighbours(name, {other: len(its) for other, its in logs.items()})
    if sum(len(log.steps) for log in logs[name]) < MIN_STEPS:
        return Contention(slowdowns=dict.fromkeys(names, 0.0), hand_out_tokens=HAND_OUT_TOKENS)
    around = [logs[other] for other in names]
    rows = [
        Recorded.of(log, around, None if slow is None else slow[index], own)
        for index, log in enumerate(logs[name])
    ]
    steps, batches = _common_load(rows, len(names), alone, sensitivity or Sensitivity(), rounds_s)
    calm = np.flatnonzero(calmest(np.concatenate([row.stretches for row in rows]), steps.rounds))
    steps, batches = steps.only(calm), [batches[index] for index in calm]
    ratio = steps.measured_s / steps.told_s
    keep = ratio < OUTLIER_RATIO * np.median(ratio)
    kept = steps.only(keep)
    fit = kept.fit_steady() if steady else kept.fit_rounds(kept.round_trust())
    rounds = kept.over_modelled(replace(fit, factors=np.ones_like(fit.factors)))
    return Contention(
        dict(zip(names, fit.slowdowns.tolist(), strict=True)),
        kept.refits(fit, steady, np.random.default_rng(seed)),
        measure_scatter(steps.measured_s, steps.modelled_s(fit), batches, keep),
        fit.base,
        rounds.round(4).tolist(),
        fit.token_wait_s,
        HAND_OUT_TOKENS,
    )


def _common_load(
    rows: Sequence[Recorded],
    neighbours: int,
    alone: StepTime,
    sensitivity: Sensitivity,
    rounds_s: Sequence[float],
) -> tuple[CommonLoad, list[Batch]]:
    """The steps of all replicas for the fit, and their batches."""
    batches = [batch for row in rows for batch in row.batches]
    measured_s, ends_s, traffic, waited_s = (
        np.concatenate([getattr(row, key) for row in rows])
        for key in ("measured_s", "ends_s", "traffic", "waited_s")
    )
    told_s = np.array([alone.step_s(batch) for batch in batches])
    shares = np.zeros((len(told_s), neighbours))
    for index in range(neighbours):
        shares[:, index] = np.concatenate([row.shares[index] for row in rows])
    felt = sensitivity.exponents(one_row_share(alone, told_s))
    rounds = np.searchsorted(np.array(rounds_s[1:]), ends_s)
    count = max(1, len(rounds_s))
    felt_shares = felt[:, None] * shares
    return CommonLoad(told_s, measured_s, felt_shares, rounds, ends_s, count, traffic, waited_s), batches


class ContendedStepTime:
    """A step time that grows while neighbours run; satisfies `ersim.types.StepTime`.

    Use with a system that takes every step as an event of its own (fast_forward off), since a
    neighbour may come and go within a stretch of steps.
    """

    def __init__(
        self,
        alone: StepTime,
        contention: Contention,
        neighbours: Sequence[str],
        speed: SpeedTrace | None = None,
        scatter: ScatterPlayer | None = None,
        own: str | None = None,
        sensitivity: Sensitivity | None = None,
    ) -> None:
        """neighbours: names as in the contention's slowdowns. own: the expert's name, where it is one.

        sensitivity: as in the fit of the contention.
        """
        self._felt = sensitivity or Sensitivity()
        self._alone = alone
        self._scatter = scatter
        self._known = contention
        self._slowdowns = [contention.slowdowns.get(name, 0.0) for name in neighbours]
        self._itself = [int(name == own) for name in neighbours]
        self._speed = speed
        self._one_row_s = alone.step_s(ONE_ROW)
        self._neighbours: Sequence[Sequence[ReplicaState]] = ()
        self._theirs: Sequence[ContendedStepTime] = ()
        self._handed_per_s = 0.0
        self._clock: Callable[[], float] = float

    def watch(
        self,
        neighbours: Sequence[Sequence[ReplicaState]],
        clock: Callable[[], float],
        theirs: Sequence[ContendedStepTime] = (),
    ) -> None:
        """Tell it the replicas of each neighbour, in the order given at first, and the run's clock.

        theirs: the neighbours' step times in the same order. Raises ValueError where they are missing and
        steps wait for tokens.
        """
        if self._known.token_wait_s and len(theirs) != len(neighbours):
            raise ValueError(f"theirs must be {len(neighbours)} step times, got {len(theirs)}")
        self._neighbours = neighbours
        self._theirs = theirs
        self._clock = clock

    @property
    def handed_per_s(self) -> float:
        """What the step begun last hands out, as tokens over its seconds alone; of whichever replica."""
        return self._handed_per_s

    def _slowdown(self) -> float:
        """What those that run just now add to the time alone, as far as it is felt."""
        slowed = 0.0
        for slowdown, itself, replicas in zip(self._slowdowns, self._itself, self._neighbours, strict=False):
            running = -itself  # of its own replicas one is the one that steps
            for replica in replicas:
                if replica.running:
                    running += 1
            slowed += slowdown * max(running, 0)
        return slowed

    def _traffic(self, alone_s: float, rows: int) -> float:
        """Tokens that share a core with a step of so many rows: its neighbours' meanwhile, and its own."""
        tokens, running, count = 0.0, 0, 0
        for itself, theirs, replicas in zip(self._itself, self._theirs, self._neighbours, strict=True):
            busy = max(0, sum(bool(replica.running) for replica in replicas) - itself)
            tokens += busy * theirs.handed_per_s * alone_s
            running += busy
            count += len(replicas) - itself
        return tokens + rows * running / max(1, count)

    def _mean_s(self, alone_s: float, slowdown: float, rows: int) -> float:
        """What neighbours and the host's present speed make of a step that takes `alone_s` seconds."""
        share = self._one_row_s / max(alone_s, TINY_S)
        seconds = self._known.base * alone_s * (1.0 + self._felt.exponent(share) * slowdown)
        if self._known.token_wait_s:
            seconds += self._known.token_wait_s * self._traffic(alone_s, rows)
        handed = rows + self._known.hand_out_tokens * (rows > 0)
        self._handed_per_s = handed / max(alone_s, TINY_S)  # after its siblings' were read
        return seconds if self._speed is None else seconds * self._speed.slowed(self._clock(), share)

    def step_s(self, batch: Batch) -> float:
        """Seconds of one step that starts now."""
        seconds = self._mean_s(self._alone.step_s(batch), self._slowdown(), batch.sampled_seqs)
        return seconds if self._scatter is None else seconds * self._scatter.factor(batch)

    def decode_run_s(self, decode_seqs: int, context_tokens: int, context_max: int, steps: int) -> FloatArray:
        """Seconds of consecutive decode steps, all at the present contention and speed."""
        alone = self._alone.decode_run_s(decode_seqs, context_tokens, context_max, steps)
        slowdown = self._slowdown()
        seconds = np.array([self._mean_s(alone_s, slowdown, decode_seqs) for alone_s in alone.tolist()])
        return seconds if self._scatter is None else seconds * self._scatter.decode_factors(steps)
