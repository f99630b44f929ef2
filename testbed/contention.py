"""How much experts on one machine slow each other, and step times that know it.

Two servers on one host share caches, memory bandwidth and whatever cores their front ends, the
gateway and the client run on. A calibration is made with the others idle: its front ends then have a
core of their own. Here what busy neighbours add is fitted to steps recorded under common load:

    period / slowed = alone * (base + sum over others of slowdown[other] * share of the step they ran)
                      + share * (row_s * sampled rows + request_s * prefill chunks)

Others are all replicas of other experts and the other ones of its own, each for itself: two that run
all the time count twice. Steps of all of the expert's replicas make the fit. row_s is the front ends',
the gateway's and the client's work for one token, as far as it pushes the engine off its core; request_s
the same for a new request. slowed is what the host's speed makes of the step (`sensitivity`).

The doubt of the fit is that of its moments: the same fit to blocks of a few seconds, drawn with
replacement. What single steps do beyond the fit is kept as it came (`step_scatter`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from ersim.types import Batch, ReplicaState, StepTime
from testbed.host_speed import SpeedTrace
from testbed.sensitivity import ONE_ROW
from testbed.step_log import StepLog
from testbed.step_scatter import ScatterPlayer, StepScatter, measure_scatter

FloatArray = npt.NDArray[np.float64]
OUTLIER_RATIO = 5.0
MIN_STEPS = 50
BLOCK_S = 4.0  # longer than what disturbs consecutive steps, short enough for a dozen blocks
REFITS = 40


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


@dataclass(frozen=True)
class Contention:
    """What common load adds to one expert's steps, see this module's head; seconds and factors.

    slowdowns: by the expert whose replica runs, its own name standing for its other replicas.
    refits: the same fit to resampled blocks, each [base, slowdowns in order, row_s, request_s].
    scatter: of single steps under common load.
    """

    base: float = 1.0
    slowdowns: Mapping[str, float] = field(default_factory=dict)
    row_s: float = 0.0
    request_s: float = 0.0
    refits: Sequence[Sequence[float]] = ()
    scatter: StepScatter = field(default_factory=StepScatter)

    def drawn(self, rng: np.random.Generator) -> Contention:
        """One of the refits in place of the fit; the fit itself when there are none."""
        if not self.refits:
            return self
        base, *slowdowns, row_s, request_s = self.refits[int(rng.integers(len(self.refits)))]
        named = dict(zip(self.slowdowns, slowdowns, strict=True))
        return replace(self, base=base, slowdowns=named, row_s=row_s, request_s=request_s)


def neighbours(name: str, replicas: Mapping[str, int]) -> list[str]:
    """Whose replicas slow one of this expert's: all other experts, and its own where it has several."""
    return [other for other in replicas if other != name] + [name] * (replicas[name] > 1)


@dataclass(frozen=True)
class Recorded:
    """Steps of one replica under common load; arrays over its steps, shares: one array per neighbour."""

    batches: Sequence[Batch]
    measured_s: FloatArray
    ends_s: FloatArray
    shares: Sequence[FloatArray]

    @classmethod
    def of(
        cls, log: StepLog, around: Sequence[Sequence[StepLog]], slow: FloatArray | None = None
    ) -> Recorded:
        """around: the logs of each neighbour's replicas; the replica's own log among them is left out."""
        periods, ends = log.periods_s(), log.ends_s()
        shares = [
            np.sum([busy_share(ends - periods, ends, one) for one in logs if one is not log], axis=0)
            for logs in around
        ]
        measured = periods / (1.0 if slow is None else slow)
        return cls([step.batch() for step in log.steps], measured, ends, shares)


def fit_contention(
    name: str,
    logs: Mapping[str, Sequence[StepLog]],
    alone: StepTime,
    slow: Sequence[FloatArray] | None = None,
    seed: int = 0,
) -> Contention:
    """Contention of one expert, from steps of all its replicas under common load; too few steps give none.

    logs: of every expert's replicas. alone: the step time of `name`. slow: factor of the host's speed on
    each step of its replicas, shape (steps,) each; None is 1. seed: of the refits.
    """
    names = neighbours(name, {other: len(its) for other, its in logs.items()})
    if sum(len(log.steps) for log in logs[name]) < MIN_STEPS:
        return Contention(slowdowns=dict.fromkeys(names, 0.0))
    around = [logs[other] for other in names]
    rows = [
        Recorded.of(log, around, None if slow is None else slow[index])
        for index, log in enumerate(logs[name])
    ]
    batches = [batch for row in rows for batch in row.batches]
    measured, ends = (np.concatenate([getattr(row, key) for row in rows]) for key in ("measured_s", "ends_s"))
    shares = [np.concatenate([row.shares[index] for row in rows]) for index in range(len(names))]
    told = np.array([alone.step_s(batch) for batch in batches])
    matrix = _terms(told, shares, batches)
    keep = measured < OUTLIER_RATIO * np.median(measured / told) * told
    weight = np.where(keep, 1.0 / np.sqrt(told), 0.0)  # between single steps (1/told) and sums (1)
    weighted, wanted = matrix * weight[:, None], measured * weight
    solution = nnls(weighted, wanted)[0]
    base, *slowdowns, row_s, request_s = solution.tolist()
    return Contention(
        base,
        dict(zip(names, slowdowns, strict=True)),
        row_s,
        request_s,
        _refits(weighted, wanted, ends, np.random.default_rng(seed)),
        measure_scatter(measured, matrix @ solution, batches, keep),
    )


def _terms(told: FloatArray, shares: Sequence[FloatArray], batches: Sequence[Batch]) -> FloatArray:
    """The fit's columns, shape (steps, 3 + neighbours)."""
    busy = np.clip(np.sum(shares, axis=0), 0.0, 1.0) if shares else np.zeros(len(told))
    rows = np.array([batch.sampled_seqs for batch in batches])
    chunks = np.array([len(batch.prefills) for batch in batches])
    return np.stack([told, *(told * share for share in shares), busy * rows, busy * chunks], axis=1)


def _refits(
    matrix: FloatArray, wanted: FloatArray, ends_s: FloatArray, rng: np.random.Generator
) -> list[list[float]]:
    """Fits to blocks of `BLOCK_S` seconds drawn with replacement; none below three blocks."""
    block = ((ends_s - ends_s.min()) / BLOCK_S).astype(int)
    members = [np.flatnonzero(block == one) for one in np.unique(block)]
    if len(members) < 3:
        return []
    found = []
    for _ in range(REFITS):
        chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        found.append([float(f"{value:.6g}") for value in nnls(matrix[chosen], wanted[chosen])[0]])
    return found


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
    ) -> None:
        """neighbours: names as in the contention's slowdowns. own: the expert's name, where it is one."""
        self._alone = alone
        self._scatter = scatter
        self._known = contention
        self._slowdowns = [contention.slowdowns.get(name, 0.0) for name in neighbours]
        self._itself = [int(name == own) for name in neighbours]
        self._speed = speed
        self._one_row_s = alone.step_s(ONE_ROW)
        self._neighbours: Sequence[Sequence[ReplicaState]] = ()
        self._clock: Callable[[], float] = float

    def watch(self, neighbours: Sequence[Sequence[ReplicaState]], clock: Callable[[], float]) -> None:
        """Tell it the replicas of each neighbour, in the order given at first, and the run's clock."""
        self._neighbours = neighbours
        self._clock = clock

    def _now(self) -> tuple[float, bool]:
        """(factor on the time alone, whether a neighbour runs)."""
        factor, busy = self._known.base, False
        for slowdown, itself, replicas in zip(self._slowdowns, self._itself, self._neighbours, strict=False):
            running = -itself  # of its own replicas one is the one that steps
            for replica in replicas:
                if replica.running:
                    running += 1
            if running > 0:
                factor += slowdown * running
                busy = True
        return factor, busy

    def _slowed(self, alone_s: float) -> float:
        """What the host's present speed makes of a step that takes `alone_s` seconds otherwise."""
        return 1.0 if self._speed is None else self._speed.slowed(self._clock(), self._one_row_s / alone_s)

    def step_s(self, batch: Batch) -> float:
        """Seconds of one step that starts now."""
        factor, busy = self._now()
        alone_s = self._alone.step_s(batch)
        seconds = alone_s * factor
        if busy:
            seconds += self._known.row_s * batch.sampled_seqs + self._known.request_s * len(batch.prefills)
        if self._scatter is not None:
            seconds *= self._scatter.factor(batch)
        return seconds * self._slowed(alone_s)

    def decode_run_s(self, decode_seqs: int, context_tokens: int, context_max: int, steps: int) -> FloatArray:
        """Seconds of consecutive decode steps, all at the present contention and speed."""
        factor, busy = self._now()
        alone = self._alone.decode_run_s(decode_seqs, context_tokens, context_max, steps)
        seconds = alone * factor + (self._known.row_s * decode_seqs if busy else 0.0)
        if self._scatter is not None:
            seconds = seconds * self._scatter.decode_factors(steps)
        return np.array([self._slowed(one) for one in alone.tolist()]) * seconds
