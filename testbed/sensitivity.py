"""How much a step suffers when the host slows down: not quite by what the probe shows.

A probe (`host_speed`) and a step share a core, not a workload. A step that takes `step_s` takes, at a
slowness of the host,

    step_s * slowness ** (plain + reads * min(1, one_row_s / step_s))

where one_row_s / step_s is the share that a step of one row would take too, which does little but read the
weights. In five measurements of two experts each (slowness 0.8 to 1.5), logarithms of CPU time over what
was modelled grew in blocks of 4 s by this many times the probe's:

                                     one row              five rows and more    with prefill
    profiles, an expert alone    0.97 to 1.50 (1.22)      0.91 to 1.46 (1.31)    1.19 to 1.84 (1.55)
    runs, all experts at work    0.91 to 1.27 (1.07)      0.76 to 1.43 (1.14)    0.86 to 1.52 (1.20)

(means in brackets). Where neighbours work the probe itself scatters, which makes such slopes flatter than
they are. Both exponents are fitted to the profile of the expert alone and held near the middle of the two,
since the minutes of a profile are few. What stays in doubt is drawn with each replication.
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
ONE_ROW_EXPONENT, ONE_ROW_STD = 1.15, 0.2  # of a step of one row: see above
MORE, MORE_STD = 0.35, 0.25  # that the exponent is larger where one row would be next to nothing of a step
BLOCK_STD = 0.05  # of the logarithm of step times beyond what the probe explains, in the same blocks
BLOCK_S = 4.0  # steps of one block are disturbed alike and count once
TURNS = 20
OUTLIER_RATIO = 5.0
LEAST_EXPONENT = 0.3  # a step that felt next to nothing would tell nothing of a server's start
DIGITS = 4
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
        """Whether both kinds of steps have exponents >= 0, and the covariance is one or none."""
        covariance = np.array(self.covariance)
        figures = np.array([self.plain, self.reads, *covariance.ravel()])
        if figures.dtype.kind not in "if" or not np.isfinite(figures).all():
            return False
        if covariance.shape not in ((0,), (2, 2)) or min(self.plain, self.plain + self.reads) < 0.0:
            return False
        return not covariance.size or bool(np.linalg.eigvalsh(covariance).min() >= -1e-9)

    def drawn(self, rng: np.random.Generator, mirrored: bool = False) -> Sensitivity:
        """Exponents as they may be just as well; not below 0. mirrored: the draw's reflection at the mean."""
        if not len(self.covariance):
            return self
        off = rng.multivariate_normal((0.0, 0.0), np.array(self.covariance)) * (-1.0 if mirrored else 1.0)
        drawn = max(0.0, self.plain + float(off[0]))
        return Sensitivity(drawn, max(-drawn, self.reads + float(off[1])))

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
    part = share[keep]  # the exponents of steps of shares 0 and 1, neither of which may be below 0
    matrix = np.stack([np.ones(len(x)), (1.0 - part) * x, part * x], axis=1)
    blocks = max(1.0, float(measured_s[keep].sum()) / BLOCK_S)
    weight = np.sqrt(min(1.0, blocks / len(x)))
    stds = np.array([ONE_ROW_STD, MORE_STD])
    prior = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, -1.0]]) / stds[:, None]
    held_to = np.array([ONE_ROW_EXPONENT, MORE]) / stds
    found = np.array([0.0, ONE_ROW_EXPONENT + MORE, ONE_ROW_EXPONENT])
    for _ in range(TURNS):  # a step far off counts less, as under the loss sqrt(1 + z^2)
        z = (y - matrix @ found) / BLOCK_STD
        rows = weight * (1.0 + z**2) ** -0.25 / BLOCK_STD
        together = np.concatenate([matrix * rows[:, None], prior])
        wanted = np.concatenate([y * rows, held_to])
        found = lsq_linear(together, wanted, bounds=([-np.inf, 0.0, 0.0], np.inf)).x
    apart = np.array([[1.0, 0.0], [-1.0, 1.0]])  # from both exponents to plain and reads
    covariance = apart @ np.linalg.inv(together.T @ together)[1:, 1:] @ apart.T
    plain, reads = (apart @ found[1:]).round(DIGITS).tolist()
    return Sensitivity(plain, max(reads, -plain), covariance.round(6).tolist())
