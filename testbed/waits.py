"""Where a request's time goes outside engine steps, and how unevenly.

Gateway, front end and client are processes that wait for a core like any other: on a busy machine the
median way takes two milliseconds and one in a hundred takes fifty. The simulator's gateway gets the
medians; what each recorded request took beyond them is drawn for each simulated one and added to what
its client sees. It moves no arrival at an engine: that would matter only to steps that are about to start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from testbed.load import RequestRecord
from testbed.profiling import request_tag
from testbed.step_log import StepLog

FloatArray = npt.NDArray[np.float64]
WAYS = ("to", "routing", "base", "in", "out", "back")
"""Client to gateway, policy, rest of the gateway's work, gateway to engine, engine to gateway, to client."""
INBOUND = (0, 1, 2, 3)
OUTBOUND = (4, 5)
GATEWAY = (0, 1, 2, 5)  # what the client's and the gateway's clocks show, see `testbed.measured`
DIGITS = 6


def ways_s(
    records: Sequence[RequestRecord],
    access: Mapping[str, Mapping[str, Any]],
    logs: Mapping[str, Sequence[StepLog]],
) -> FloatArray:
    """Seconds on each of the `WAYS` by request, shape (requests, 6); NaN where it cannot be told.

    logs: of every expert's replicas. The way into an engine shows only while no step runs: a running one
    lets nobody in.
    """
    servers = {(name, index): log for name, its in logs.items() for index, log in enumerate(its)}
    added = {request_tag(r.request_id): r for log in servers.values() for r in log.requests.values()}
    engines = {
        server: (log.ends_s(), np.array([step.schedule_s for step in log.steps]))
        for server, log in servers.items()
    }
    rows = []
    for record in records:
        gate = access.get(record.tag)
        if gate is None or record.first_s is None or gate["first_in_s"] is None:
            continue
        engine = engines.get((record.expert or "", record.replica))
        if engine is None:
            continue
        ends, starts = engine
        inbound = gate["submitted_s"] - gate["received_s"] - gate["queued_s"]
        way_in = way_out = np.nan
        step = int(np.searchsorted(ends, gate["first_in_s"])) - 1
        if step >= 0:
            way_out = gate["first_in_s"] - ends[step]
        request = added.get(record.tag)
        if request is not None:
            before = int(np.searchsorted(starts, request.added_s)) - 1
            if before < 0 or ends[before] < gate["submitted_s"]:
                way_in = request.added_s - gate["submitted_s"]
        rows.append(
            (
                gate["received_s"] - record.send_s,
                gate["routing_s"],
                inbound - gate["routing_s"],
                way_in,
                way_out,
                record.first_s - gate["first_in_s"],
            )
        )
    return np.array(rows, dtype=np.float64).reshape(-1, len(WAYS))


def gateway_medians(ways: FloatArray) -> dict[str, float]:
    """Medians in the terms of the simulator's gateway, seconds.

    It has one network time each way on either side; a way out and a way back that differ are split
    evenly, which leaves their sum, and so every latency, right.
    """
    median = dict(zip(WAYS, _medians(ways), strict=True))
    return {
        "network_s": (median["to"] + median["back"]) / 2,
        "base_s": max(0.0, median["base"]),
        "routing_s": median["routing"],
        "backend_network_s": (median["in"] + median["out"]) / 2,
        "to_gateway_s": median["to"],
        "from_gateway_s": median["back"],
        "to_engine_s": median["in"],
        "from_engine_s": median["out"],
    }


def extra_waits(ways: FloatArray) -> list[list[float]]:
    """By request [inbound, outbound, gateway] seconds beyond the medians; an unknown way counts as median."""
    beyond = np.nan_to_num(ways - np.array(_medians(ways)))
    sums = np.stack([beyond[:, list(group)].sum(axis=1) for group in (INBOUND, OUTBOUND, GATEWAY)], axis=1)
    waits: list[list[float]] = sums.round(DIGITS).tolist()
    return waits


def add_waits(
    requests: pd.DataFrame, waits: Sequence[Sequence[float]], rng: np.random.Generator
) -> pd.DataFrame:
    """Requests with one recorded request's waits added to each; as they are when none were recorded.

    Inbound waits delay first and last token, outbound ones the first (the last of an answer of one).
    """
    if not len(waits):
        return requests
    drawn = np.array(waits)[rng.integers(len(waits), size=len(requests))]
    inbound, outbound, gateway = drawn.T
    single = (requests["output_tokens"] <= 1).to_numpy()
    first = requests["first_token_s"] + inbound + outbound
    last = np.where(single, first, np.maximum(requests["last_token_s"] + inbound, first))
    gateway_s = np.maximum(requests["gateway_s"] + gateway, 0.0)
    return requests.assign(first_token_s=first, last_token_s=last, gateway_s=gateway_s)


def _medians(ways: FloatArray) -> list[float]:
    return [
        float(np.median(known)) if len(known := column[~np.isnan(column)]) else 0.0
        for column in ways.reshape(-1, len(WAYS)).T
    ]
