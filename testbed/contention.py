"""How much experts on one machine slow each other, and step times that know it.

Two servers on one host share caches, memory bandwidth and whatever cores their front ends, the
gateway and the client run on. A calibration is made with the others idle; here the slow-down of
each expert's steps by each busy neighbour is fitted to steps recorded under common load:

    measured / predicted alone = 1 + sum over others of slowdown[other] * (share of the step they ran)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from ersim.types import Batch, ReplicaState, StepTime
from testbed.step_log import StepLog

FloatArray = npt.NDArray[np.float64]
OUTLIER_RATIO = 5.0
MIN_STEPS = 50


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


def fit_slowdowns(
    log: StepLog, alone: StepTime, others: Mapping[str, StepLog]
) -> tuple[float, dict[str, float]]:
    """Base factor and slow-down by neighbour of one expert, from steps under common load.

    The base factor is what common load costs even while no neighbour executes a step (front ends,
    gateway, client). Too few steps give (1, zeros).
    """
    names = list(others)
    periods, ends = log.periods_s(), log.ends_s()
    if len(periods) < MIN_STEPS:
        return 1.0, dict.fromkeys(names, 0.0)
    told = np.array([alone.step_s(step.batch()) for step in log.steps])
    ratio = periods / told
    keep = ratio < OUTLIER_RATIO * np.median(ratio)
    columns = [np.ones(len(ratio))] + [busy_share(ends - periods, ends, others[name]) for name in names]
    matrix = np.stack(columns, axis=1)[keep]
    weight = np.sqrt(told[keep])  # what counts is the time predicted, not the number of steps
    solution, _ = nnls(matrix * weight[:, None], ratio[keep] * weight)
    return float(solution[0]), {name: float(value) for name, value in zip(names, solution[1:], strict=True)}


class ContendedStepTime:
    """A step time that grows while neighbours run; satisfies `ersim.types.StepTime`.

    Use with a system that takes every step as an event of its own (fast_forward off), since a
    neighbour may come and go within a stretch of steps.
    """

    def __init__(self, alone: StepTime, base: float, slowdowns: Sequence[float]) -> None:
        self._alone = alone
        self._base = base
        self._slowdowns = slowdowns
        self._neighbours: Sequence[Sequence[ReplicaState]] = ()

    def watch(self, neighbours: Sequence[Sequence[ReplicaState]]) -> None:
        """Tell it the replicas of each neighbour, in the order of `slowdowns`."""
        self._neighbours = neighbours

    def factor(self) -> float:
        """What steps cost now, relative to a quiet machine."""
        factor = self._base
        for slowdown, replicas in zip(self._slowdowns, self._neighbours, strict=False):
            for replica in replicas:
                if replica.running:
                    factor += slowdown
        return factor

    def step_s(self, batch: Batch) -> float:
        """Seconds of one step that starts now."""
        return self._alone.step_s(batch) * self.factor()

    def decode_run_s(self, decode_seqs: int, context_tokens: int, context_max: int, steps: int) -> FloatArray:
        """Seconds of consecutive decode steps, all at the present contention."""
        return self._alone.decode_run_s(decode_seqs, context_tokens, context_max, steps) * self.factor()
