"""The figures of one run, under the names and units of `vllm bench serve`'s result file.

The same function serves simulated and measured runs. Latencies are milliseconds, throughputs per
second, TTFT counts from the moment the client sends, TPOT = (E2E - TTFT) / (output tokens - 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ersim.results.percentiles import latency_statistics
from ersim.results.records import COMPLETED, FAILED, REJECTED, Gaps, RequestTable
from ersim.results.warmup import Window

if TYPE_CHECKING:
    import pandas as pd

FloatArray = npt.NDArray[np.float64]
Rows = TypeVar("Rows", "pd.DataFrame", RequestTable)
"""Requests of a measured run (a data frame) or of a simulated one."""


def in_window(frame: Rows, window: Window) -> Rows:
    """Requests that ended inside the window (start excluded, end included)."""
    ended = np.asarray(frame["last_token_s"])
    return frame[(ended > window.start_s) & (ended <= window.end_s)]


def latencies_s(done: Rows) -> tuple[FloatArray, FloatArray, FloatArray]:
    """TTFT, TPOT (only of requests with more than one token) and E2E latency of completed requests."""
    send = np.asarray(done["send_s"], dtype=np.float64)
    first = np.asarray(done["first_token_s"], dtype=np.float64)
    last = np.asarray(done["last_token_s"], dtype=np.float64)
    tokens = np.asarray(done["output_tokens"], dtype=np.int64)
    several = tokens > 1
    tpot = (last[several] - first[several]) / (tokens[several] - 1)
    return first - send, tpot, last - send


def _throughput(done: Rows, gaps: Gaps, window: Window, good: int) -> dict[str, float | None]:
    """Rates over the window; output tokens are counted when they arrive, not when their request ends."""
    duration = window.duration_s
    if duration <= 0:
        names = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput")
        return dict.fromkeys(names)
    inside = (gaps.end_s > window.start_s) & (gaps.end_s <= window.end_s)
    emitted = int(gaps.tokens[inside].sum()) if len(gaps.end_s) else int(done["output_tokens"].sum())
    prompt = int(done["prompt_tokens"].sum())
    return {
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration,
        "output_throughput": emitted / duration,
        "total_token_throughput": (emitted + prompt) / duration,
    }


def _good(done: Rows, ttft_s: float, tpot_s: float) -> int:
    """Number of completed requests that met both objectives (TPOT only where there is one)."""
    ttft, _, e2e = latencies_s(done)
    tokens = np.maximum(np.asarray(done["output_tokens"]) - 1, 1)
    tpot = (e2e - ttft) / tokens
    return int(np.count_nonzero((ttft <= ttft_s) & (tpot <= tpot_s)))


def summarise(
    frame: Rows, gaps: Gaps, window: Window, *, ttft_objective_s: float, tpot_objective_s: float
) -> dict[str, Any]:
    """Counts, rates and latency statistics of the requests that ended inside `window`."""
    inside = in_window(frame, window)
    done = inside[np.asarray(inside["status"]) == COMPLETED]
    good = _good(done, ttft_objective_s, tpot_objective_s)
    ttft, tpot, e2e = latencies_s(done)
    seen = (gaps.end_s > window.start_s) & (gaps.end_s <= window.end_s) & (gaps.count > 0)
    prompt_tokens = int(done["prompt_tokens"].sum())
    statuses = np.asarray(frame["status"])
    return {
        "duration": window.duration_s,
        "warmup_s": window.start_s,
        "steady": window.steady,
        "completed": len(done),
        "completed_in_all": int((statuses == COMPLETED).sum()),
        "failed": int((statuses == FAILED).sum()),
        "rejected": int((statuses == REJECTED).sum()),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": int(done["output_tokens"].sum()),
        **_throughput(done, gaps, window, good),
        "goodput_share": good / len(done) if len(done) else None,
        **latency_statistics("ttft", ttft),
        **latency_statistics("tpot", tpot),
        **latency_statistics("itl", gaps.gap_s[seen], gaps.count[seen]),
        **latency_statistics("e2el", e2e),
        **latency_statistics("gateway", np.asarray(done["gateway_s"], dtype=np.float64)),
        **latency_statistics("routing", np.asarray(done["routing_s"], dtype=np.float64)),
        "preemptions": int(inside["preemptions"].sum()),
        "prefix_hit_rate": float(done["cached_tokens"].sum() / prompt_tokens) if prompt_tokens else None,
    }


def breakdown(frame: Rows, window: Window, by: str) -> dict[str, dict[str, Any]]:
    """Share, rate and latency per value of the column `by` (expert or domain), in order of first sight."""
    inside = in_window(frame, window)
    done = inside[np.asarray(inside["status"]) == COMPLETED]
    result: dict[str, dict[str, Any]] = {}
    names = np.asarray(done[by])
    for name in dict.fromkeys(names.tolist()):
        group = done[names == name]
        ttft, tpot, e2e = latencies_s(group)
        result[str(name)] = {
            "completed": len(group),
            "share": len(group) / len(done),
            "request_throughput": len(group) / window.duration_s if window.duration_s > 0 else None,
            "mean_prompt_tokens": float(group["prompt_tokens"].mean()),
            "mean_output_tokens": float(group["output_tokens"].mean()),
            "preemptions": int(group["preemptions"].sum()),
            **_short(latency_statistics("ttft", ttft)),
            **_short(latency_statistics("tpot", tpot)),
            **_short(latency_statistics("e2el", e2e)),
        }
    return result


def _short(statistics: dict[str, float | None]) -> dict[str, float | None]:
    """Keep the mean, median and p99 of a block of statistics."""
    return {key: value for key, value in statistics.items() if key.startswith(("mean_", "median_", "p99_"))}
