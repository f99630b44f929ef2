"""What no model explains of single steps, replayed as it came.

Under common load steps scatter more than the noise of a single profile, and not one by one: the host
is disturbed for some hundred steps and then is not. Steps drawn independently average that away, so
that medians and tails of a run come out too sure. Here the recorded factors (measured over modelled)
are played back in their own order from a random moment on, those of steps with prefill apart from
those without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ersim.types import Batch

FloatArray = npt.NDArray[np.float64]
MIN_FACTORS = 50
LARGEST = 5.0
DIGITS = 3


@dataclass(frozen=True)
class StepScatter:
    """Factors on single steps in recorded order; empty where too few were recorded."""

    decode: Sequence[float] = ()
    prefill: Sequence[float] = ()

    def player(self, rng: np.random.Generator, half_on: bool = False) -> ScatterPlayer:
        """The factors from a random place on, round and round; half_on: from half a recording after it."""
        return ScatterPlayer(*(_from_somewhere(each, rng, half_on) for each in (self.decode, self.prefill)))


class ScatterPlayer:
    """Hands out one factor per step."""

    def __init__(self, decode: Iterator[float], prefill: Iterator[float]) -> None:
        self._decode = decode
        self._prefill = prefill

    def factor(self, batch: Batch) -> float:
        """What this step takes, over what the model says."""
        return next(self._prefill if batch.prefills else self._decode)

    def decode_factors(self, steps: int) -> FloatArray:
        """The factors of consecutive decode steps, shape (steps,)."""
        return np.array([next(self._decode) for _ in range(steps)])


def measure_scatter(
    measured_s: FloatArray, modelled_s: FloatArray, batches: Sequence[Batch], fitted: npt.NDArray[np.bool_]
) -> StepScatter:
    """The factors of recorded steps, in order, with mean 1 (weighted by time) over the fitted ones.

    fitted: the steps that the model was fitted to; the others, stalls of several times a step, are
    part of the scatter (at most `LARGEST`) and make its mean larger than 1. Shapes: (steps,) each.
    """
    prefill = np.array([bool(batch.prefills) for batch in batches])
    return StepScatter(
        *(_factors(measured_s[kind], modelled_s[kind], fitted[kind]) for kind in (~prefill, prefill))
    )


def _factors(measured_s: FloatArray, modelled_s: FloatArray, fitted: npt.NDArray[np.bool_]) -> list[float]:
    if np.count_nonzero(fitted) < MIN_FACTORS:
        return []
    scale = modelled_s[fitted].sum() / measured_s[fitted].sum()
    factors: list[float] = np.minimum(scale * measured_s / modelled_s, LARGEST).round(DIGITS).tolist()
    return factors


def _from_somewhere(factors: Sequence[float], rng: np.random.Generator, half_on: bool) -> Iterator[float]:
    if not factors:
        while True:
            yield 1.0
    at = (int(rng.integers(len(factors))) + half_on * (len(factors) // 2)) % len(factors)
    while True:
        yield factors[at]
        at = (at + 1) % len(factors)
