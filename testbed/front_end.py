"""What an expert's own front end takes of the core that both are bound to, while the expert is alone.

It writes what a step handed out while the next one runs, and the engine's thread waits for that: 7 to 14 %
of the thread's CPU time in decode steps of two small experts, 5 to 8 % in steps with prefill
(docs/testbed.md). A calibration holds it as the expert's own time, by the kind of step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError
from ersim.steptime import Calibration

FloatArray = npt.NDArray[np.float64]
KEY = "front_end"  # in a calibration's provenance
LARGEST = 0.25  # more is other work, which no profile is to hold
USUAL_COUNT = 10  # as many steps say that a kind is like all others
DIGITS = 4


@dataclass(frozen=True)
class FrontEnd:
    """Seconds that a step waits for its front end, over CPU seconds of its thread.

    usual: of all steps; by_kind: of each kind (`speed_probe.kind_of`).
    """

    usual: float
    by_kind: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def fit(cls, waited_s: FloatArray, cpu_s: FloatArray, kinds: npt.NDArray[np.str_]) -> FrontEnd | None:
        """Medians of the steps of an expert alone, shapes (steps,); None where no step is known.

        waited_s, cpu_s: NaN where they were not recorded. A kind of few steps is held near all.
        """
        known = ~np.isnan(waited_s) & (cpu_s > 0.0)
        if not known.any():
            return None
        share = np.divide(waited_s, cpu_s, out=np.zeros(len(cpu_s)), where=known)
        usual, by_kind = float(np.median(share[known])), {}
        for kind in np.unique(kinds[known]).tolist():
            its = share[known & (kinds == kind)]
            mean = (len(its) * float(np.median(its)) + USUAL_COUNT * usual) / (len(its) + USUAL_COUNT)
            by_kind[kind] = _bounded(mean)
        return cls(_bounded(usual), by_kind)

    @classmethod
    def of(cls, calibration: Calibration) -> FrontEnd | None:
        """What a live calibration recorded; None where nobody counted it.

        Raises DataError for a calibration that says what no front end can have taken.
        """
        stored: Any = calibration.provenance.get(KEY)
        if stored is None:
            return None
        try:
            found = cls(**stored)
            sound = all(map(_is_share, (found.usual, *found.by_kind.values())))
        except (TypeError, AttributeError):
            sound = False
        if not sound:
            raise DataError(
                f"calibration {calibration.name}: provenance.{KEY} must be shares by kind of step, numbers "
                f"from 0 to {LARGEST:g}, got {stored!r}; profile again"
            )
        return found

    def shares(self, kinds: npt.NDArray[np.str_]) -> FloatArray:
        """Share of each step, shape (steps,)."""
        return np.array([self.by_kind.get(kind, self.usual) for kind in kinds.tolist()], dtype=float)


def _bounded(share: float) -> float:
    return round(min(LARGEST, max(0.0, share)), DIGITS)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= LARGEST
