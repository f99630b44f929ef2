"""What the speed probe takes: the usual times of one profile, and how far those of other moments are above.

The probe (`recording_scheduler.SpeedProbe`) runs in the caches that the step before it left. In the
profiles of experiments/measured/cpu/live_cpu (`provenance.speed_probe` of both calibrations) a former one
took 3 % less after decode steps of two rows than near them, and 1 and 5 % more after prefill, while the steps
took what they always take. So what it takes is split into the host's speed at that moment and a factor by
the kind of the step before. The factors are fitted to the profile of one expert alone and hold for all of its
servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError
from ersim.steptime import Calibration
from testbed.probe_works import FORMER, TODAY
from testbed.step_log import StepLog

FloatArray = npt.NDArray[np.float64]
KEY = "speed_probe"  # in a calibration's provenance
REACH_S = 0.5  # probes this near to a step speak for it; a single one says little
NEAR_S = 1.0  # probes this near to each other met the same host
OWN_ROWS = 4  # decode steps of so many rows are a kind each
PREFILL, MORE = "prefill", "more"
TURNS = 6
USUAL_COUNT = 10  # as many probes say that a kind is like all others
DIGITS = 4


def kind_of(decode_seqs: int, prefill_tokens: int) -> str:
    """The kind of a step, as far as the probe after it can tell: prefill, 1 to 4 decode rows, or more."""
    if prefill_tokens:
        return PREFILL
    return str(decode_seqs) if decode_seqs <= OWN_ROWS else MORE


def kinds_of(log: StepLog) -> npt.NDArray[np.str_]:
    """The kind of each step of a log, shape (steps,)."""
    kinds = [kind_of(step.decode_seqs, sum(row.tokens for row in step.rows)) for step in log.steps]
    return np.array(kinds, dtype=str)


@dataclass(frozen=True)
class Probes:
    """Consecutive steps and the probes after them, shapes (steps,).

    ends_s: of the steps; periods_s: their lengths; took_s: what the probe after each took, NaN where there
    was none; kinds: see `kind_of`.
    """

    ends_s: FloatArray
    periods_s: FloatArray
    took_s: FloatArray
    kinds: npt.NDArray[np.str_]

    @classmethod
    def of(cls, log: StepLog) -> Probes:
        """Those of a log."""
        took = np.array([np.nan if step.probe_s is None else step.probe_s for step in log.steps], dtype=float)
        return cls(log.ends_s(), log.periods_s(), took, kinds_of(log))

    def levels_s(self, after: Mapping[str, float]) -> FloatArray:
        """Median probe around each step, each as after a usual one, seconds; NaN where none was near."""
        result = np.full(len(self.took_s), np.nan)
        probed = np.flatnonzero(~np.isnan(self.took_s))
        if not len(probed):
            return result
        usual_s = self.took_s[probed] / _each(after, self.kinds[probed])
        moments = self.ends_s[probed]
        first = np.searchsorted(moments, self.ends_s - self.periods_s - REACH_S)
        last = np.searchsorted(moments, self.ends_s + REACH_S, side="right")
        for index, (low, high) in enumerate(zip(first, last, strict=True)):
            if high > low:
                result[index] = np.median(usual_s[low:high])
        return result


@dataclass(frozen=True)
class UsualProbe:
    """What the probe takes at slowness 1: seconds, and the factor on it after each kind of step.

    work: which work it does (`probe_works`).
    """

    seconds: float
    after: Mapping[str, float]
    work: int = FORMER

    @classmethod
    def fit(cls, probes: Probes, work: int = FORMER) -> UsualProbe | None:
        """That of a profile, whose median moment has slowness 1; None where nothing was probed."""
        probed = np.flatnonzero(~np.isnan(probes.took_s))
        if not len(probed):
            return None
        took_s, kinds = probes.took_s[probed], probes.kinds[probed]
        after = _factors(probes.ends_s[probed], np.log(took_s), kinds)
        return cls(float(np.median(took_s / _each(after, kinds))), after, work)

    @classmethod
    def of(cls, calibration: Calibration) -> UsualProbe | None:
        """What a live calibration recorded; None where nothing was probed.

        Raises DataError for a calibration that says what no probe can have taken.
        """
        stored = calibration.provenance.get(KEY)
        if stored is None:
            return None
        try:
            found = cls(**stored)
            known = found.work == FORMER or found.work in TODAY
            sound = known and all(map(_is_time, (found.seconds, *found.after.values())))
        except (TypeError, AttributeError):
            sound = False
        if not sound:
            raise DataError(
                f"calibration {calibration.name}: provenance.{KEY} must be seconds and factors by kind of "
                f"step, numbers > 0, and a known work, got {stored!r}; profile again"
            )
        return found


def _is_time(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0.0 < value < float("inf")  # type: ignore[operator]


def _each(after: Mapping[str, float], kinds: npt.NDArray[np.str_]) -> FloatArray:
    return np.array([after.get(kind, 1.0) for kind in kinds.tolist()])


def _factors(moments_s: FloatArray, logs: FloatArray, kinds: npt.NDArray[np.str_]) -> dict[str, float]:
    """By kind, how far its probes are from all those near them; few of a kind are held near 1.

    logs: of the probe times. The host's level and the factors are fitted in turn.
    """
    first = np.searchsorted(moments_s, moments_s - NEAR_S)
    last = np.searchsorted(moments_s, moments_s + NEAR_S, side="right")
    names, which = np.unique(kinds, return_inverse=True)
    counts = np.bincount(which)
    effects = np.zeros(len(names))
    for _ in range(TURNS):
        plain = logs - effects[which]
        level = np.array([np.median(plain[low:high]) for low, high in zip(first, last, strict=True)])
        medians = np.array([np.median((logs - level)[which == kind]) for kind in range(len(names))])
        effects = medians * counts / (counts + USUAL_COUNT)
    return dict(zip(names.tolist(), np.exp(effects).round(DIGITS).tolist(), strict=True))


def probed_work(meta: Mapping[str, Any]) -> int | None:
    """Which work a server's probe does, as the head of its step log says; None where nothing is probed."""
    found: int | None = meta.get("speed_probe", FORMER)
    return found


def slowness(probes: Probes, usual: UsualProbe | None) -> FloatArray:
    """Slowness of the host during each step, shape (steps,); ones where it was not probed."""
    if usual is None:
        return np.ones(len(probes.took_s))
    levels_s = probes.levels_s(usual.after)
    found: FloatArray = np.where(np.isnan(levels_s), 1.0, levels_s / usual.seconds)
    return found
