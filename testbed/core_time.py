"""What of a step's time its thread had a core, and what was taken from it.

A core is taken by the hypervisor for other machines, or by other processes of this one. Where the engine's
own thread does all the work (one CPU thread, no other rank) both are known of each step: its CPU time
is without either, and what it waited for is the other processes' (`core_wait`), on a clock that stolen time
stretches. What is not waiting, over the CPU time, is that stretch. Elsewhere the machine's stolen share of
the last second says so, roughly (`stolen_time`): where little runs it is much more than steps feel, since it
counts processors that wait to be woken.

While an expert is profiled or checked only its own front end wants its core, and all else comes off. In a run
gateway, client and neighbours take cores too, which is what is predicted: there only stolen time counts, as
a factor beside the host's slowness.

With it and `speed_probe` held-out error on medians of like steps was 2.0 to 5.8 % in the first nine runs of
the table in docs/testbed.md, in those before 3.0 to 8.5 %.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from testbed.front_end import FrontEnd
from testbed.speed_probe import kinds_of
from testbed.step_log import StepLog
from testbed.stolen_time import LARGEST

FloatArray = npt.NDArray[np.float64]
REACH_S = 0.5
TINY_S = 1e-9
LEAST_SHARE = 0.05  # less was a stall, and no share at all would make a step of no time
CALM = 1.05
"""Steps stretched no further are as others are: in four profiles of common load 92 to 100 % of their time."""
MOST_OWN = 0.02  # of a step's time that its own front end takes from its core, where nobody counts waiting


def stretch(log: StepLog) -> FloatArray:
    """Factor of stolen time on each step, shape (steps,); ones where it was not recorded.

    As the steps within `REACH_S` of each felt it together, where their thread tells: it comes in pieces that
    hit one step and not the next. Of a step that ran for `cpu` and would have waited for `w`, all of it on a
    clock that stolen time stretches by f, the CPU time is `cpu` and the wait counted `f * w`: f is what is
    not waiting over the CPU time. What a thread slept would count too (on a quiet host 0.1 % of the time at
    16 users); a kernel that leaves stolen time in CPU time (no CONFIG_PARAVIRT_TIME_ACCOUNTING) shows none.
    """
    stolen = np.array([step.stolen_share or 0.0 for step in log.steps], dtype=float)
    told = told_stretch(log)
    factors: FloatArray = np.where(np.isnan(told), 1.0 / (1.0 - stolen), told)
    return factors


def told_stretch(log: StepLog) -> FloatArray:
    """Factor of stolen time on each step whose own thread tells it, shape (steps,); NaN elsewhere.

    See `stretch`; what the machine says instead is too rough a guess to leave a measurement out for.
    """
    factors = np.full(len(log.steps), np.nan)
    cpu_s, had_s = _grown(log, "cpu"), log.periods_s() - _grown(log, "waited")
    known = _tells(log) & ~np.isnan(cpu_s) & ~np.isnan(had_s)
    if known.any():
        ends_s = log.ends_s()[known]
        cpu, had = (np.concatenate(([0.0], np.cumsum(each[known]))) for each in (cpu_s, had_s))
        first = np.searchsorted(ends_s, ends_s - REACH_S)
        last = np.searchsorted(ends_s, ends_s + REACH_S, side="right")
        least_s = np.maximum(had[last] - had[first], TINY_S)
        share = 1.0 - (cpu[last] - cpu[first]) / least_s
        factors[known] = 1.0 / (1.0 - np.clip(share, 0.0, LARGEST))
    return factors


def calmest(stretches: FloatArray, rounds: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which moments were `CALM`; the calmer half of a round in which fewer than half were. Shape as given.

    stretches: factors of stolen time, NaN where nobody told: calm, then. rounds: index of each moment's
    round of common load; none disappears. What is replayed or drawn as it was recorded would otherwise hold
    what the hypervisor did in the minutes of a profile.
    """
    told, calm = np.nan_to_num(stretches, nan=1.0), np.zeros(len(stretches), dtype=bool)
    for one in np.unique(rounds):
        inside = rounds == one
        calm[inside] = told[inside] <= max(CALM, float(np.median(told[inside])))
    return calm


def stolen_share(logs: Iterable[StepLog]) -> float:
    """Share of the steps' time that the hypervisor gave to other machines; 0 where no thread tells."""
    took_s = had_s = 0.0
    for log in logs:
        factors, periods_s = told_stretch(log), log.periods_s()
        known = ~np.isnan(factors)
        took_s += float(periods_s[known].sum())
        had_s += float((periods_s[known] / factors[known]).sum())
    return 1.0 - had_s / took_s if took_s > 0.0 else 0.0


def _tells(log: StepLog) -> bool:
    """Whether the engine's thread does all of a step's work, and steps follow one another."""
    return bool(log.meta.get("one_thread")) and not log.meta["async_scheduling"]


def undisturbed_s(log: StepLog, own: FrontEnd | None = None) -> FloatArray:
    """Seconds that each step of a server alone would have taken on a core that nobody took, shape (steps,).

    What its own front end takes of the core is the expert's. own: that, as its profile said; where no profile
    could, it is what the threads lacked in all beyond what was stolen in all, `MOST_OWN` at most.
    """
    periods_s = log.periods_s()
    by_machine_s: FloatArray = periods_s / stretch(log)
    if not log.meta.get("one_thread") or not len(periods_s):
        return by_machine_s
    cpu_s = _grown(log, "cpu")
    known = ~np.isnan(cpu_s)
    own_s = np.clip(cpu_s[known], LEAST_SHARE * periods_s[known], periods_s[known])
    if own is not None:
        by_machine_s[known] = (1.0 + own.shares(kinds_of(log)[known])) * own_s
    elif known.any():
        by_machine_s[known] = min(1.0 + MOST_OWN, by_machine_s[known].sum() / own_s.sum()) * own_s
    return by_machine_s


def front_end_of(log: StepLog) -> FrontEnd | None:
    """What the front end of a server alone took of its core; None where its thread does not tell."""
    if not _tells(log):
        return None
    return FrontEnd.fit(_grown(log, "waited") / stretch(log), _grown(log, "cpu"), kinds_of(log))


def waited_for_others_s(log: StepLog, own: FrontEnd | None) -> FloatArray:
    """Seconds of each step that its thread waited for others than its own front end, shape (steps,).

    As the clock counts them, stolen time included. NaN where that is not known; below 0 where the front end
    took less than it used to, alone.
    """
    if own is None or not _tells(log):
        return np.full(len(log.steps), np.nan)
    return _grown(log, "waited") - own.shares(kinds_of(log)) * _grown(log, "cpu") * stretch(log)


def _grown(log: StepLog, count: str) -> FloatArray:
    """Seconds in each step's period by a count of its thread, shape (steps,); NaN where not recorded.

    count: `cpu` or `waited`. From the end of the step before where that one followed at once, as the
    period is.
    """
    result = np.full(len(log.steps), np.nan)
    before_number, before_s = None, None
    for index, step in enumerate(log.steps):
        follows = before_number == step.number - 1
        end_s: float | None = getattr(step, f"{count}_s")
        start_s: float | None = before_s if follows else getattr(step, f"{count}_start_s")
        if start_s is not None and end_s is not None:
            result[index] = end_s - start_s
        before_number, before_s = step.number, end_s
    return result
