"""How fast the host ran during a run, moment by moment, as a simulation follows it.

Virtual CPUs share caches, memory and often the core itself with other tenants: the same step was seen
to take 28 and 44 ms within seconds, with the engine's thread on its core 99.7 % of the time. The
recorder therefore times a fixed piece of work between steps (`recording_scheduler.SpeedProbe`).
Slowness is that time over the time it took while profiling (`speed_probe`); what a step makes of it is its
`sensitivity`. Calibrations hold step times at slowness 1, and a live run is simulated at the slowness
of its own moments: the probe knows nothing of the requests, so that what is predicted stays a
prediction. Time that the hypervisor gave to others (`core_time`) stretches all steps alike. GPUs need
neither: slowness is 1 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from testbed.sensitivity import Sensitivity

FloatArray = npt.NDArray[np.float64]
BIN_S = 0.5


@dataclass(frozen=True)
class SpeedTrace:
    """How fast one expert's servers ran, on a run's clock.

    bins, stretches: slowness of the host, and factor of stolen time, in bins of `BIN_S` seconds. factor,
    doubt, wander: slowness of the servers' start, its relative standard error, and how far single runs are
    from it (see `standing`). sensitivity: what steps make of the host's slowness. share: as in
    `standing.Standing`.
    """

    bins: Sequence[float]
    factor: float = 1.0
    doubt: float = 0.0
    wander: float = 0.0
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    share: float = 1.0
    stretches: Sequence[float] = (1.0,)

    def with_steps(self, end_s: FloatArray, slow: FloatArray, stretch: FloatArray) -> SpeedTrace:
        """The same with the slowness and stretch of a run's steps, shapes (steps,); end_s: on its clock."""
        return replace(self, bins=_binned(end_s, slow), stretches=_binned(end_s, stretch))

    def drawn(
        self, start: np.random.Generator, run: np.random.Generator, mirrored: bool = False
    ) -> SpeedTrace:
        """As fast as it may have been: doubt of start and exponents is all runs' alike, the wander is not.

        The steps of the checks keep their lengths when exponents move; those that feel more or less do not.
        mirrored: the draw's reflection at the mean.
        """
        felt = self.sensitivity.drawn(start, mirrored)
        factor = self.factor ** (self.sensitivity.exponent(self.share) / felt.exponent(self.share))
        off = self.doubt * start.standard_normal() + self.wander * run.standard_normal()
        return replace(self, factor=factor * float(np.exp(-off if mirrored else off)), sensitivity=felt)

    def at(self, now_s: float) -> float:
        """Slowness of the host at a moment of the run; the last bin goes on for ever."""
        return _at(self.bins, now_s)

    def slowed(self, now_s: float, share: float) -> float:
        """Factor on a step that starts at a moment; share: of a step of one row, see `sensitivity`."""
        return self.sensitivity.slowed(self.factor * self.at(now_s), share) * _at(self.stretches, now_s)

    @property
    def is_one(self) -> bool:
        """Whether everything ran at its calibrated speed throughout, for certain."""
        certain = self.doubt == self.wander == 0.0 and not len(self.sensitivity.covariance)
        return certain and self.factor == 1.0 and all(one == 1.0 for one in (*self.bins, *self.stretches))

    @property
    def median(self) -> float:
        """Typical slowness of the run: of host and start, and what stolen time adds."""
        return self.factor * float(np.median(self.bins)) * float(np.median(self.stretches))


def _binned(end_s: FloatArray, values: FloatArray) -> Sequence[float]:
    """Medians of the steps that ended in each bin; bins without lie in between.

    What follows the last step is as the median bin.
    """
    if len(end_s) == 0:
        return (1.0,)
    index = np.maximum(end_s / BIN_S, 0).astype(int)
    known = np.unique(index)
    medians = [float(np.median(values[index == one])) for one in known]
    bins = np.interp(np.arange(known[-1] + 1), known, medians).tolist()
    return (*bins, float(np.median(bins)))


def _at(bins: Sequence[float], now_s: float) -> float:
    """Value of the bin at a moment; the last one goes on for ever."""
    index = int(now_s / BIN_S)
    return bins[index] if index < len(bins) else bins[-1]
