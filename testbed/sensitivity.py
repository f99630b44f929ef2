"""How much a step suffers when the host slows down: not all steps by what the probe shows.

A probe (`host_speed`) and a step share a core, not a workload. A decode step of one row does little but
read the weights, and whoever shares the memory slows it more than the probe, which is part arithmetic;
a step of many rows computes, and is slowed less. In three profiles of two experts, logarithms of step
times over medians of two seconds grew by 1.1 to 2.2 times the probe's at one row (median 1.4), by 0.9 to
1.6 times at three and more (median 1.1). So a step that takes `step_s` takes, at a slowness of the host,

    step_s * slowness ** (plain + reads * min(1, one_row_s / step_s))

where one_row_s / step_s is the share that a step of one row would take too. Both exponents are fitted to
the profile of the expert alone, and held near what those three said, with their spread: a quiet profile
says little about them, and none says much about `reads`. What stays in doubt is drawn with each replication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from ersim.errors import DataError
from ersim.steptime import Calibration
from ersim.types import Batch, StepTime

FloatArray = npt.NDArray[np.float64]
PRIOR = (0.9, 0.5)  # plain, reads: of three profiles, see above
PRIOR_STD = 0.3
BLOCK_STD = 0.07  # of the logarithm of step times, beyond what the probe explains: the same profiles
BLOCK_S = 4.0  # steps of one block are disturbed alike and count once
TURNS = 20
OUTLIER_RATIO = 5.0
LEAST_EXPONENT = 0.3  # a step that felt next to nothing would tell nothing of a server's start
KEY = "host_sensitivity"  # in a calibration's provenance
ONE_ROW = Batch(1, 1, 32, 32, (), 1)


@dataclass(frozen=True)
class Sensitivity:
    """The exponents of this module's head; as it is, every step suffers by what the probe shows.

    covariance: of plain and reads, as the fit leaves them, shape (2, 2); none: they are certain.
    """

    plain: float = 1.0
    reads: float = 0.0
    covariance: Sequence[Sequence[float]] = ()

    def exponent(self, share: float) -> float:
        """How a step feels whoever slows it; share: one_row_s / step_s, cut at 1 here."""
        return max(LEAST_EXPONENT, self.plain + self.reads * min(1.0, share))

    def exponents(self, share: FloatArray) -> FloatArray:
        """The same for many steps, shape (steps,)."""
        each: FloatArray = np.maximum(LEAST_EXPONENT, self.plain + self.reads * np.minimum(1.0, share))
        return each

    def is_sound(self) -> bool:
        """Whether exponents are numbers >= 0, and the covariance one or none."""
        covariance = np.array(self.covariance)
        figures = np.array([self.plain, self.reads, *covariance.ravel()])
        if figures.dtype.kind not in "if" or not np.isfinite(figures).all():
            return False
        if covariance.shape not in ((0,), (2, 2)) or min(self.plain, self.reads) < 0.0:
            return False
        return not covariance.size or bool(np.linalg.eigvalsh(covariance).min() >= -1e-9)

    def drawn(self, rng: np.random.Generator) -> Sensitivity:
        """Exponents as they may be just as well; not below 0."""
        if not len(self.covariance):
            return self
        plain, reads = rng.multivariate_normal((self.plain, self.reads), np.array(self.covariance))
        return Sensitivity(max(0.0, float(plain)), max(0.0, float(reads)))

    def slowed(self, slowness: float, share: float) -> float:
        """Factor on a step at a slowness of the host."""
        return float(slowness ** self.exponent(share))

    def slowed_each(self, slowness: FloatArray, share: FloatArray) -> FloatArray:
        """The same for many steps, shape (steps,)."""
        factors: FloatArray = slowness ** self.exponents(share)
        return factors

    @classmethod
    def of(cls, calibration: Calibration) -> Sensitivity:
        """What a live calibration recorded; every step alike where it recorded none."""
        stored: Mapping[str, Any] = calibration.provenance.get(KEY) or {}
        try:
            found = cls(**stored)
            if not found.is_sound():
                raise ValueError(f"exponents must be >= 0, with a covariance of 2 x 2 or none, got {stored}")
            return found
        except (TypeError, ValueError) as error:
            raise DataError(f"calibration {calibration.name}: {KEY}: {error}; profile again") from error


def one_row_share(alone: StepTime, told_s: FloatArray) -> FloatArray:
    """Share of each step that a step of one row takes too, at most 1, shape (steps,)."""
    share: FloatArray = np.minimum(1.0, alone.step_s(ONE_ROW) / told_s)
    return share


def fit_sensitivity(
    measured_s: FloatArray, told_s: FloatArray, share: FloatArray, slow: FloatArray
) -> Sensitivity:
    """The exponents from steps of one expert alone; every step alike (1, 0) where nothing was probed.

    told_s: what its calibration says at slowness 1; share: see `one_row_share`; slow: slowness of the
    host; shapes (steps,) each, in recorded order.
    """
    keep = measured_s < OUTLIER_RATIO * told_s
    if not keep.any() or np.all(slow == 1.0):
        return Sensitivity()
    x, y = np.log(slow[keep]), np.log(measured_s[keep] / told_s[keep])
    matrix = np.stack([np.ones(len(x)), x, share[keep] * x], axis=1)
    blocks = max(1.0, float(measured_s[keep].sum()) / BLOCK_S)
    weight = np.sqrt(min(1.0, blocks / len(x)))
    prior = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) / PRIOR_STD
    found = np.array([0.0, *PRIOR])
    for _ in range(TURNS):  # a step far off counts less, as under the loss sqrt(1 + z^2)
        z = (y - matrix @ found) / BLOCK_STD
        rows = weight * (1.0 + z**2) ** -0.25 / BLOCK_STD
        together = np.concatenate([matrix * rows[:, None], prior])
        wanted = np.concatenate([y * rows, np.array(PRIOR) / PRIOR_STD])
        found = lsq_linear(together, wanted, bounds=([-np.inf, 0.0, 0.0], np.inf)).x
    covariance = np.linalg.inv(together.T @ together)[1:, 1:].round(6).tolist()
    return Sensitivity(round(float(found[1]), 4), round(float(found[2]), 4), covariance)
