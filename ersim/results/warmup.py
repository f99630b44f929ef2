"""Where a run stops warming up: MSER-5 on the latencies in the order in which requests ended.

Source: White, Cobb, Spratt, "A comparison of five steady-state truncation heuristics for
simulation" (WSC 2000): cut the number of leading batches (of five) that minimises the squared
standard error of what remains. A cut in the second half means that no steady state was seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BATCH = 5
MIN_SAMPLES = 50


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a run that figures are taken from: (start_s, end_s], and whether it is steady."""

    start_s: float
    end_s: float
    steady: bool

    @property
    def duration_s(self) -> float:
        """Length of the window in seconds."""
        return self.end_s - self.start_s


def mser_cut(series: npt.NDArray[np.float64]) -> int | None:
    """Number of leading samples to drop; None when the series never settles.

    Shape (n,). Fewer than 50 samples are too few to judge: None.
    """
    batches = len(series) // BATCH
    if len(series) < MIN_SAMPLES:
        return None
    means = series[: batches * BATCH].reshape(batches, BATCH).mean(axis=1)
    kept = np.arange(batches, 0, -1)
    tail_sum = np.cumsum(means[::-1])[::-1]
    tail_square = np.cumsum((means**2)[::-1])[::-1]
    squared_error = (tail_square - tail_sum**2 / kept) / kept**2
    searched = batches - max(BATCH, batches // 20)  # the last few batches always look quiet
    best = int(np.argmin(squared_error[:searched]))
    return best * BATCH if best <= batches // 2 else None


def steady_window(
    ended_s: npt.NDArray[np.float64], latency_s: npt.NDArray[np.float64], begin_s: float
) -> Window:
    """The steady part of a closed-loop or open-loop run.

    `ended_s` (n,) are the times at which requests ended, `latency_s` (n,) their E2E latencies,
    `begin_s` the run's start. When no steady state is seen the last half of the run is used and
    the window says that it is not steady.
    """
    if len(ended_s) == 0:
        return Window(begin_s, begin_s, False)
    order = np.argsort(ended_s, kind="stable")
    ends = ended_s[order]
    cut = mser_cut(latency_s[order])
    if cut is None:
        half = begin_s + 0.5 * (float(ends[-1]) - begin_s)
        return Window(half if len(ends) >= MIN_SAMPLES else begin_s, float(ends[-1]), False)
    return Window(float(ends[cut - 1]) if cut else begin_s, float(ends[-1]), True)
