"""Repeats of one load as one sample, and the requests a prediction is judged on.

A closed loop sends the same requests live and simulated, but the few that end just inside the window
differ, and with some fifty answers of random length a few more or less move their median by a tenth.
Latencies are therefore those of the same requests: all that were answered live inside the window.
Rates and token gaps are those of the same seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ersim.config import ObjectiveConfig
from ersim.results import COMPLETED, Gaps, Window, breakdown, summarise

IdArray = npt.NDArray[np.int64]
Run = tuple[pd.DataFrame, Gaps]
"""Requests and token gaps of one repeat, on the repeat's own clock."""
OF_REQUESTS = ("_ttft_ms", "_tpot_ms", "_e2el_ms", "_gateway_ms", "_routing_ms")
ALWAYS = Window(-math.inf, math.inf, True)


@dataclass(frozen=True)
class Sample:
    """Several repeats, one after the other on one clock, cut to their windows."""

    requests: pd.DataFrame
    gaps: Gaps
    window: Window


def pool(runs: Sequence[Run], window: Window) -> Sample:
    """What ended inside `window` in each repeat; the second repeat's window follows the first's."""
    length_s = window.end_s - window.start_s
    frames, gaps = [], []
    for number, (frame, gap) in enumerate(runs):
        shift_s = number * length_s - window.start_s
        ended = _inside(frame["last_token_s"].to_numpy(), window)
        moments = {
            name: frame[name] + shift_s for name in ("send_s", "submit_s", "first_token_s", "last_token_s")
        }
        frames.append(frame.assign(**moments)[ended])
        seen = _inside(gap.end_s, window)
        cut = {item.name: getattr(gap, item.name)[seen] for item in dataclasses.fields(Gaps)}
        gaps.append(Gaps(**{**cut, "end_s": cut["end_s"] + shift_s}))
    whole = Window(0.0, len(runs) * length_s, window.steady)
    return Sample(pd.concat(frames, ignore_index=True), Gaps.concatenate(gaps), whole)


def answered(run: Run, window: Window) -> IdArray:
    """Ids of the requests that were completed inside the window."""
    frame = run[0]
    done = _inside(frame["last_token_s"].to_numpy(), window) & (frame["status"] == COMPLETED).to_numpy()
    ids: IdArray = frame["request_id"].to_numpy()[done].astype(np.int64)
    return ids


def pooled_figures(
    runs: Sequence[Run], window: Window, judged: Sequence[IdArray], objective: ObjectiveConfig
) -> dict[str, Any]:
    """Rates and gaps over the windows of all repeats, latencies of the judged requests (ids by repeat)."""
    sample = pool(runs, window)
    goals = {"ttft_objective_s": objective.ttft_s, "tpot_objective_s": objective.tpot_s}
    figures = summarise(sample.requests, sample.gaps, sample.window, **goals)
    frames = [frame[frame["request_id"].isin(ids)] for (frame, _), ids in zip(runs, judged, strict=True)]
    same = summarise(pd.concat(frames, ignore_index=True), Gaps.concatenate([]), ALWAYS, **goals)
    figures.update({name: value for name, value in same.items() if name.endswith(OF_REQUESTS)})
    figures["judged_requests"] = sum(len(frame) for frame in frames)  # fewer than asked: some did not end
    figures["per_expert"] = breakdown(sample.requests, sample.window, "expert")
    return figures


def _inside(moments_s: npt.NDArray[np.float64], window: Window) -> npt.NDArray[np.bool_]:
    """Start excluded, end included, as in `ersim.results.in_window`; NaN is outside."""
    inside: npt.NDArray[np.bool_] = (moments_s > window.start_s) & (moments_s <= window.end_s)
    return inside
