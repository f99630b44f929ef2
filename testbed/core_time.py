"""What of a step's time its thread had a core, and what was taken from it.

While an expert is profiled or checked nothing of ours wants its core: what its thread did not get was taken,
by the hypervisor for other machines (`stolen_time`; Linux keeps it out of a thread's CPU time where the
hypervisor tells) or by other processes. Where the engine's own thread does all the work (one CPU thread, no
other rank) its CPU time says step by step what it would have taken undisturbed; elsewhere the machine's
stolen share of the last second does, roughly. In a run neighbours and front ends take cores too, which is
what is predicted: there only stolen time counts, as a factor beside the host's slowness.

With it and `speed_probe` held-out error on medians of like steps was 2.0 to 4.1 % in the first five runs of
the table in docs/testbed.md, in those before 3.0 to 8.5 %.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from testbed.step_log import StepLog

FloatArray = npt.NDArray[np.float64]
LEAST_SHARE = 0.05  # less was a stall, and no share at all would make a step of no time
MOST_OWN = 0.02
"""Of a step's time that an expert's own front end takes from its core, alone. Bound servers lose 4 to 6 %
while they decode; counting it all made predictions at 1 and 2 users worse (docs/testbed.md), so it is not."""


def stretch(log: StepLog) -> FloatArray:
    """Factor of stolen time on each step, shape (steps,); ones where it was not recorded."""
    stolen = np.array([step.stolen_share or 0.0 for step in log.steps], dtype=float)
    factors: FloatArray = 1.0 / (1.0 - stolen)
    return factors


def undisturbed_s(log: StepLog) -> FloatArray:
    """Seconds that each step of a server alone would have taken on a core that nobody took, shape (steps,).

    What its own front end takes of the core is the expert's: what the threads lacked in all beyond what was
    stolen in all, `MOST_OWN` at most.
    """
    periods_s = log.periods_s()
    by_machine_s: FloatArray = periods_s / stretch(log)
    if not log.meta.get("one_thread") or not len(periods_s):
        return by_machine_s
    cpu_s = _cpu_s(log)
    known = ~np.isnan(cpu_s)
    own_s = np.clip(cpu_s[known], LEAST_SHARE * periods_s[known], periods_s[known])
    factor = min(1.0 + MOST_OWN, by_machine_s[known].sum() / own_s.sum()) if known.any() else 1.0
    by_machine_s[known] = factor * own_s
    return by_machine_s


def _cpu_s(log: StepLog) -> FloatArray:
    """CPU seconds of each step's thread in its period, shape (steps,); NaN where they were not recorded.

    From the end of the step before where that one followed at once, as the period is.
    """
    result = np.full(len(log.steps), np.nan)
    before_number, before_s = None, None
    for index, step in enumerate(log.steps):
        follows = before_number == step.number - 1
        start_s = before_s if follows else step.cpu_start_s
        if start_s is not None and step.cpu_s is not None:
            result[index] = step.cpu_s - start_s
        before_number, before_s = step.number, step.cpu_s
    return result
