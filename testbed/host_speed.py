"""How fast the host ran, moment by moment, and step times cleared of it.

Virtual CPUs share caches, memory and often the core itself with other tenants: the same step was seen
to take 28 and 44 ms within seconds, with the engine's thread on its core 99.7 % of the time. The
recorder therefore times a fixed piece of work between steps (`recording_scheduler.SpeedProbe`).
Slowness is that time over the time it took while profiling; what a step makes of it is its
`sensitivity`. Calibrations hold step times at slowness 1, and a live run is simulated at the slowness
of its own moments: the probe knows nothing of the requests, so that what is predicted stays a
prediction. (It runs in the caches that the step before it left, and takes longer after prefill than after
decode steps of the same second; predictions were not better without those probes, so all count.) GPUs need
no probe: slowness is 1 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from testbed.sensitivity import Sensitivity
from testbed.step_log import StepLog

FloatArray = npt.NDArray[np.float64]
REACH_S = 0.5  # probes this near to a step speak for it; a single one says little
BIN_S = 0.5


def reference_probe_s(log: StepLog) -> float | None:
    """Median probe time of a log, seconds; None when nothing was probed."""
    probes = [step.probe_s for step in log.steps if step.probe_s is not None]
    return float(np.median(probes)) if probes else None


def probes_s(log: StepLog) -> FloatArray:
    """Median probe time around each step, seconds, shape (steps,); NaN where none was near."""
    result = np.full(len(log.steps), np.nan)
    probed = [(step.updated_s, step.probe_s) for step in log.steps if step.probe_s is not None]
    if not probed:
        return result
    moments, probes = np.array(probed).T
    ends = np.array([step.updated_s for step in log.steps])
    first = np.searchsorted(moments, ends - log.periods_s() - REACH_S)
    last = np.searchsorted(moments, ends + REACH_S, side="right")
    for index, (low, high) in enumerate(zip(first, last, strict=True)):
        if high > low:
            result[index] = np.median(probes[low:high])
    return result


def slowness(log: StepLog, reference_s: float | None) -> FloatArray:
    """Slowness of the host during each step, shape (steps,); ones where it was not probed.

    reference_s: what the probe takes at slowness 1, seconds.
    """
    return slowness_of(probes_s(log), reference_s)


def slowness_of(probes: FloatArray, reference_s: float | None) -> FloatArray:
    """Probe times (seconds, NaN where there is none) over what they are at slowness 1."""
    if reference_s is None:
        return np.ones(len(probes))
    found: FloatArray = np.where(np.isnan(probes), 1.0, probes / reference_s)
    return found


@dataclass(frozen=True)
class SpeedTrace:
    """How fast one expert's servers ran, on a run's clock.

    bins: slowness of the host in bins of `BIN_S` seconds. factor, doubt, wander: slowness of the
    servers' start, its relative standard error, and how far single runs are from it (see `standing`).
    sensitivity: what steps make of the host's slowness. share: as in `standing.Standing`.
    """

    bins: Sequence[float]
    factor: float = 1.0
    doubt: float = 0.0
    wander: float = 0.0
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    share: float = 1.0

    def with_steps(self, end_s: FloatArray, slow: FloatArray) -> SpeedTrace:
        """The same with the median slowness of the steps that ended in each bin; others lie in between.

        What follows the last step is as slow as the run's median bin.
        """
        if len(end_s) == 0:
            return replace(self, bins=(1.0,))
        index = np.maximum(end_s / BIN_S, 0).astype(int)
        known = np.unique(index)
        medians = [float(np.median(slow[index == one])) for one in known]
        bins = np.interp(np.arange(known[-1] + 1), known, medians).tolist()
        return replace(self, bins=(*bins, float(np.median(bins))))

    def drawn(self, start: np.random.Generator, run: np.random.Generator) -> SpeedTrace:
        """As fast as it may have been: doubt of start and exponents is all runs' alike, the wander is not.

        The steps of the checks keep their lengths when exponents move; those that feel more or less do not.
        """
        felt = self.sensitivity.drawn(start)
        factor = self.factor ** (self.sensitivity.exponent(self.share) / felt.exponent(self.share))
        off = self.doubt * start.standard_normal() + self.wander * run.standard_normal()
        return replace(self, factor=factor * float(np.exp(off)), sensitivity=felt)

    def at(self, now_s: float) -> float:
        """Slowness of the host at a moment of the run; the last bin goes on for ever."""
        index = int(now_s / BIN_S)
        return self.bins[index] if index < len(self.bins) else self.bins[-1]

    def slowed(self, now_s: float, share: float) -> float:
        """Factor on a step that starts at a moment; share: of a step of one row, see `sensitivity`."""
        return self.sensitivity.slowed(self.factor * self.at(now_s), share)

    @property
    def is_one(self) -> bool:
        """Whether everything ran at its calibrated speed throughout, for certain."""
        certain = self.doubt == self.wander == 0.0 and not len(self.sensitivity.covariance)
        return certain and self.factor == 1.0 and all(one == 1.0 for one in self.bins)

    @property
    def median(self) -> float:
        """Typical slowness of the run, of host and start together."""
        return self.factor * float(np.median(self.bins))
