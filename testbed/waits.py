"""Where a request's time goes outside engine steps, and how unevenly.

Gateway, front end and client are processes that wait for a core like any other: in the measured run that
comes with the project the median way takes 10 ms, and one in a hundred nearly twice as long. The
simulator's gateway gets the medians; what a recorded request took beyond them, one that was sent among as
many others, is drawn for each simulated one and added to what its client sees. It moves no arrival at an
engine: that would matter only to steps that are about to start.

Requests of moments at which the hypervisor took cores away are left out (`core_time.calmest`): whoever wakes
up then waits for a core of the machine's first. In one profile requests took 10 ms into the engine, not 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from testbed.core_time import calmest, told_stretch
from testbed.load import LoadResult
from testbed.step_log import StepLog, request_tag

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
WAYS = ("to", "routing", "base", "in", "out", "back")
"""Client to gateway, policy, rest of the gateway's work, gateway to engine, engine to gateway, to client."""
INBOUND = (0, 1, 2, 3)
OUTBOUND = (4, 5)
GATEWAY = (0, 1, 2, 5)  # what the client's and the gateway's clocks show, see `testbed.measured`
DIGITS = 6
NEAR_S = 0.1  # steps that ended so near to a request's way tell what it met
ALIKE = 30  # recorded requests, at least, that one is drawn from: the nearest by how many were under way


@dataclass(frozen=True)
class Ways:
    """Recorded requests. seconds: on each of the `WAYS`, shape (requests, 6), NaN where it cannot be told.

    under_way: requests that had been sent and not ended when each was sent, itself included.
    """

    seconds: FloatArray
    under_way: IntArray


def requests_under_way(sent_s: FloatArray, ended_s: FloatArray) -> IntArray:
    """How many had been sent and not ended at the moment each was sent, itself included; inf: never ended."""
    begun = np.searchsorted(np.sort(sent_s), sent_s, side="right")
    over = np.searchsorted(np.sort(ended_s), sent_s, side="right")
    return begun - over


def recorded_ways(
    loads: Sequence[LoadResult],
    access: Mapping[str, Mapping[str, Any]],
    logs: Mapping[str, Sequence[StepLog]],
) -> Ways:
    """The ways of requests that ended in several runs, where gateway and recorder saw them; the calmest.

    access: the gateway's log by tag. logs: of every expert's replicas. The way into an engine shows only
    while no step runs: a running one lets nobody in.
    """
    servers = {(name, index): log for name, its in logs.items() for index, log in enumerate(its)}
    added_s = {
        request_tag(r.request_id): r.added_s for log in servers.values() for r in log.requests.values()
    }
    engines = {
        server: (log.ends_s(), np.array([step.schedule_s for step in log.steps]))
        for server, log in servers.items()
    }
    steps = [(log.ends_s(), told_stretch(log)) for log in servers.values()]
    rows, counts, stretches, rounds = [], [], [], []
    for number, load in enumerate(loads):
        for record, under_way in zip(load.records, _under_way(load), strict=True):
            gate = access.get(record.tag)
            engine = engines.get((record.expert or "", record.replica))
            if gate is None or engine is None or record.first_s is None or gate["first_in_s"] is None:
                continue
            to_s = gate["received_s"] - record.send_s
            inbound_s = gate["submitted_s"] - gate["received_s"] - gate["queued_s"]
            base_s = inbound_s - gate["routing_s"]
            back_s = record.first_s - gate["first_in_s"]
            engine_s = _engine_ways_s(gate, added_s.get(record.tag), *engine)
            rows.append((to_s, gate["routing_s"], base_s, *engine_s, back_s))
            counts.append(under_way)
            ways_s = (record.send_s, gate["submitted_s"]), (gate["first_in_s"], record.first_s)
            stretches.append(_most_stretched(steps, ways_s))
            rounds.append(number)
    seconds = np.array(rows, dtype=np.float64).reshape(-1, len(WAYS))
    calm = calmest(np.array(stretches, dtype=np.float64), np.array(rounds, dtype=np.int64))
    return Ways(seconds[calm], np.array(counts, dtype=np.int64)[calm])


def _most_stretched(
    steps: Sequence[tuple[FloatArray, FloatArray]], ways_s: Sequence[tuple[float, float]]
) -> float:
    """Largest factor of stolen time on steps that ended while a request was on its way; 1 where none did.

    steps: ends and factors, by server. ways_s: from, until; what passed in the engine is not looked at.
    """
    largest = 1.0
    for ends_s, factors in steps:
        for from_s, until_s in ways_s:
            first, last = np.searchsorted(ends_s, (from_s - NEAR_S, until_s + NEAR_S))
            largest = max(largest, float(np.nan_to_num(factors[first:last], nan=1.0).max(initial=1.0)))
    return largest


def _under_way(load: LoadResult) -> list[int]:
    """By record of a load; who failed was under way until then (`Client.send` notes when)."""
    known = [*load.records, *load.under_way]
    sent_s = np.array([record.send_s for record in known])
    ended_s = [record.send_s if record.last_s is None else record.last_s for record in load.records]
    never = [np.inf] * len(load.under_way)
    counts: list[int] = requests_under_way(sent_s, np.array(ended_s + never)).tolist()
    return counts[: len(load.records)]


def _engine_ways_s(
    gate: Mapping[str, Any], added_s: float | None, ends_s: FloatArray, starts_s: FloatArray
) -> tuple[float, float]:
    """Gateway to engine and back, seconds; added_s: when the engine took the request, None: not recorded."""
    way_in_s = way_out_s = np.nan
    step = int(np.searchsorted(ends_s, gate["first_in_s"])) - 1
    if step >= 0:
        way_out_s = gate["first_in_s"] - ends_s[step]
    if added_s is not None:
        before = int(np.searchsorted(starts_s, added_s)) - 1
        if before < 0 or ends_s[before] < gate["submitted_s"]:
            way_in_s = added_s - gate["submitted_s"]
    return way_in_s, way_out_s


def gateway_medians(ways: Ways) -> dict[str, float]:
    """Medians in the terms of the simulator's gateway, seconds.

    It has one network time each way on either side; a way out and a way back that differ are split
    evenly, which leaves their sum, and so every latency, right.
    """
    median = dict(zip(WAYS, _medians(ways.seconds), strict=True))
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


def extra_waits(ways: Ways) -> list[list[float]]:
    """By request [requests under way, inbound, outbound, gateway]: seconds beyond the medians.

    An unknown way counts as median.
    """
    beyond_s = np.nan_to_num(ways.seconds - np.array(_medians(ways.seconds)))
    sums_s = [beyond_s[:, list(group)].sum(axis=1) for group in (INBOUND, OUTBOUND, GATEWAY)]
    waits: list[list[float]] = np.column_stack([ways.under_way, *sums_s]).round(DIGITS).tolist()
    return waits


def resampled(waits: Sequence[Sequence[float]], rng: np.random.Generator) -> Sequence[Sequence[float]]:
    """As many waits, drawn with replacement: what another recording of the same load might have shown."""
    return [waits[index] for index in rng.integers(len(waits), size=len(waits))] if waits else waits


def add_waits(
    requests: pd.DataFrame, waits: Sequence[Sequence[float]], rng: np.random.Generator
) -> pd.DataFrame:
    """Requests with a recorded request's waits added to each; as they are when none were recorded.

    The recorded one was sent among as many others (see `ALIKE`). Inbound waits delay first and last token,
    outbound ones the first (the last of an answer of one).
    """
    if not len(waits):
        return requests
    known = np.array(waits)
    ended_s = requests["last_token_s"].fillna(requests["send_s"]).to_numpy()
    under_way = requests_under_way(requests["send_s"].to_numpy(), ended_s)
    inbound, outbound, gateway = known[_drawn_alike(under_way, known[:, 0], rng), 1:].T
    single = (requests["output_tokens"] <= 1).to_numpy()
    first = requests["first_token_s"] + inbound + outbound
    last = np.where(single, first, np.maximum(requests["last_token_s"] + inbound, first))
    gateway_s = np.maximum(requests["gateway_s"] + gateway, 0.0)
    return requests.assign(first_token_s=first, last_token_s=last, gateway_s=gateway_s)


def _drawn_alike(wanted: IntArray, recorded: FloatArray, rng: np.random.Generator) -> IntArray:
    """By request the index of a recorded one with about as many under way, shape as wanted."""
    drawn = np.empty(len(wanted), dtype=np.int64)
    for count in np.unique(wanted):
        apart = np.abs(recorded - count)
        nearest = np.flatnonzero(apart <= np.sort(apart)[min(ALIKE, len(apart)) - 1])
        asking = wanted == count
        drawn[asking] = rng.choice(nearest, size=int(asking.sum()))
    return drawn


def _medians(ways: FloatArray) -> list[float]:
    return [
        float(np.median(known)) if len(known := column[~np.isnan(column)]) else 0.0
        for column in ways.reshape(-1, len(WAYS)).T
    ]
