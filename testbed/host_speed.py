"""How fast the host ran, moment by moment, and step times cleared of it.

Virtual CPUs share caches, memory and often the core itself with other tenants: the same step was seen
to take 28 and 44 ms within seconds, with the engine's thread on its core 99.7 % of the time. The
recorder therefore times a fixed piece of work between steps (`recording_scheduler.SpeedProbe`).
Slowness is that time over the time it took while profiling, or while the server was last seen alone
(`standing`). Calibrations hold step times at slowness 1, and a live run is simulated at the slowness
of its own moments: the probe knows nothing of the requests, so that what is predicted stays a
prediction. GPUs need no probe: slowness is 1 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from testbed.step_log import StepLog

FloatArray = npt.NDArray[np.float64]
REACH_S = 0.1  # probes this near to a step speak for it; wider reaches explained less
BIN_S = 0.5


def reference_probe_s(log: StepLog) -> float | None:
    """Median probe time of a log, seconds; None when nothing was probed."""
    probes = [step.probe_s for step in log.steps if step.probe_s is not None]
    return float(np.median(probes)) if probes else None


def slowness(log: StepLog, reference_s: float | None) -> FloatArray:
    """Slowness of the host during each step, shape (steps,); ones where it was not probed.

    reference_s: what the probe takes at slowness 1, seconds.
    """
    probed = [(step.updated_s, step.probe_s) for step in log.steps if step.probe_s is not None]
    result = np.ones(len(log.steps))
    if reference_s is None or not probed:
        return result
    moments, probes = np.array(probed).T
    ends = np.array([step.updated_s for step in log.steps])
    first = np.searchsorted(moments, ends - log.periods_s() - REACH_S)
    last = np.searchsorted(moments, ends + REACH_S, side="right")
    for index, (low, high) in enumerate(zip(first, last, strict=True)):
        if high > low:
            result[index] = np.median(probes[low:high]) / reference_s
    return result


@dataclass(frozen=True)
class SpeedTrace:
    """Slowness of the host on a run's clock, in bins of `BIN_S` seconds; doubt: relative, of all at once."""

    bins: Sequence[float]
    doubt: float = 0.0

    @classmethod
    def of_steps(cls, end_s: FloatArray, slow: FloatArray, doubt: float = 0.0) -> SpeedTrace:
        """Median slowness of the steps that ended in each bin; bins without steps lie in between."""
        if len(end_s) == 0:
            return cls((1.0,), doubt)
        index = np.maximum(end_s / BIN_S, 0).astype(int)
        known = np.unique(index)
        medians = [float(np.median(slow[index == one])) for one in known]
        return cls(tuple(np.interp(np.arange(known[-1] + 1), known, medians).tolist()), doubt)

    def drawn(self, rng: np.random.Generator) -> SpeedTrace:
        """As fast as it may have been, given the doubt."""
        factor = float(np.exp(self.doubt * rng.standard_normal()))
        return SpeedTrace(tuple(factor * one for one in self.bins), self.doubt)

    def at(self, now_s: float) -> float:
        """Slowness at a moment of the run; the last bin goes on for ever."""
        index = int(now_s / BIN_S)
        return self.bins[index] if index < len(self.bins) else self.bins[-1]

    @property
    def is_one(self) -> bool:
        """Whether the host ran at slowness 1 throughout, for certain."""
        return self.doubt == 0.0 and all(one == 1.0 for one in self.bins)

    @property
    def median(self) -> float:
        """Typical slowness of the run."""
        return float(np.median(self.bins))
