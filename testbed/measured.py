"""A live run in the simulator's own terms: the same columns, the same gaps, the same summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ersim.config import ObjectiveConfig
from ersim.results import COMPLETED, REQUEST_COLUMNS, Gaps, Window, breakdown, summarise
from ersim.types import Prompt
from testbed.load import LoadResult, RequestRecord
from testbed.power import PowerLog
from testbed.step_log import StepLog, request_tag

NAN = float("nan")


def _engine_view(logs: Mapping[str, StepLog]) -> dict[str, tuple[int, int]]:
    """(cached tokens, preemptions) by request tag, from the recorders of all replicas."""
    view: dict[str, tuple[int, int]] = {}
    for log in logs.values():
        hits: dict[int, int] = {}
        for step in log.steps:
            for index, tokens in step.hits:
                hits.setdefault(index, tokens)
        for index, request in log.requests.items():
            view[request_tag(request.request_id)] = (hits.get(index, 0), request.preemptions or 0)
    return view


def _row(
    record: RequestRecord,
    start_s: float,
    gate: Mapping[str, Any] | None,
    engine: tuple[int, int],
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """One request; gateway time is everything between client and expert, both ways."""
    request, submit_s, gateway_s, routing_s = record.request, record.send_s, 0.0, 0.0
    if gate is not None and gate["submitted_s"] is not None:
        submit_s = gate["submitted_s"]
        gateway_s = submit_s - record.send_s
        routing_s = gate["routing_s"]
        if record.first_s is not None and gate["first_in_s"] is not None:
            gateway_s += record.first_s - gate["first_in_s"]
    return {
        "request_id": request.request_id,
        "user": request.user,
        "session": request.session,
        "turn": request.turn,
        "prompt_index": request.prompt_index,
        "domain": prompts[request.prompt_index].domain if prompts else "",
        "expert": record.expert or "",
        "replica": record.replica,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": record.output_tokens,
        "cached_tokens": engine[0],
        "preemptions": engine[1],
        "send_s": record.send_s - start_s,
        "gateway_s": gateway_s,
        "routing_s": routing_s,
        "submit_s": submit_s - start_s,
        "first_token_s": NAN if record.first_s is None else record.first_s - start_s,
        "last_token_s": NAN if record.last_s is None else record.last_s - start_s,
        "status": record.status,
        "error": record.error,
    }


def requests_frame(
    load: LoadResult,
    access: Mapping[str, Mapping[str, Any]],
    logs: Mapping[str, StepLog],
    prompts: Sequence[Prompt],
) -> pd.DataFrame:
    """One row per request that ended, the columns of `ersim.results`, seconds since the run's start."""
    engine = _engine_view(logs)
    rows = [
        _row(record, load.start_s, access.get(record.tag), engine.get(record.tag, (0, 0)), prompts)
        for record in load.records
    ]
    return pd.DataFrame(rows, columns=list(REQUEST_COLUMNS))


def token_gaps(load: LoadResult) -> Gaps:
    """True inter-token gaps: of k tokens in one piece the first waited, k - 1 came at once."""
    ends, gaps, counts, tokens = [], [], [], []

    def add(end_s: float, gap_s: float, count: int, arrived: int) -> None:
        ends.append(end_s - load.start_s)
        gaps.append(gap_s)
        counts.append(count)
        tokens.append(arrived)

    for record in [*load.records, *load.under_way]:
        previous: float | None = None
        for now, arrived in zip(record.chunk_s, record.chunk_tokens, strict=True):
            if previous is None:
                add(now, 0.0, arrived - 1, arrived)
            else:
                add(now, now - previous, 1, arrived)
                if arrived > 1:
                    add(now, 0.0, arrived - 1, 0)
            previous = now
    return Gaps(np.array(ends), np.array(gaps), np.array(counts, np.int64), np.array(tokens, np.int64))


def measured_summary(
    frame: pd.DataFrame, gaps: Gaps, window: Window, objective: ObjectiveConfig, power: PowerLog | None
) -> dict[str, Any]:
    """The figures of a live run under the names that a simulation's summary has."""
    summary = summarise(
        frame, gaps, window, ttft_objective_s=objective.ttft_s, tpot_objective_s=objective.tpot_s
    )
    summary["per_expert"] = breakdown(frame, window, "expert")
    summary["per_domain"] = breakdown(frame, window, "domain")
    tokens = int(frame.loc[frame["status"] == COMPLETED, "output_tokens"].sum())
    summary["power"] = power_figures([power] if power is not None else [], tokens)
    return summary


def power_figures(logs: Sequence[PowerLog], output_tokens: int) -> dict[str, Any]:
    """Power and energy of one or more stretches in which so many tokens were answered.

    mean_w and peak_memory_bytes: of all sampled GPUs together. joules: see `PowerLog.joules`, of all
    stretches. why: what there are no samples of, None when nothing is missing.
    """
    sampled = [log for log in logs if log.rows]
    if not sampled:
        return {"measured": False, "why": logs[0].absent if logs else "not asked for"}
    frames = [log.frame().groupby("gpu") for log in sampled]
    joules = sum(log.joules() for log in sampled)
    return {
        "measured": True,
        "why": next((log.absent for log in logs if log.absent), None),
        "mean_w": float(np.mean([g["power_w"].mean().sum() for g in frames])),
        "joules": joules,
        "joules_per_output_token": joules / output_tokens if output_tokens else None,
        "peak_memory_bytes": int(max(g["memory_bytes"].max().sum() for g in frames)),
    }
