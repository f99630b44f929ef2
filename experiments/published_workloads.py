"""The requests of a published case: recorded ones, users who take turns at a pool, Poisson stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ersim.types import Request, Segment
from ersim.workload.base import Workload
from ersim.workload.replay import ReplayWorkload

TEMPLATE_TOKENS = 28  # the chat template's own: 575 tokens arrive where 547 are configured


class PooledUsers(Workload):
    """Users who take turns at one pool of requests, as load generators with a concurrency cap do.

    When the pool is empty a user who is done stays idle, so the run drains.
    """

    closed = True

    def __init__(self, users: int, prompts: Sequence[int], outputs: Sequence[int]) -> None:
        self._lengths = list(zip(prompts, outputs, strict=True))
        self._planned, self._sent = users, 0

    def next_request(self, user: int) -> Request:
        prompt, output = self._lengths[min(self._sent, len(self._lengths) - 1)]
        request = Request(self._sent, user, 0, prompt, output, output)
        self._sent += 1
        return request

    def think_s(self, user: int) -> float:
        self._planned += 1
        return 0.0 if self._planned <= len(self._lengths) else 1e12

    def start_s(self, user: int) -> float:
        return 0.0


def recorded_requests(plan: Mapping[str, Any]) -> Workload:
    """plan: frame (prompt_tokens, output_tokens, arrival_s, keys: ids of full blocks or None)."""
    frame: pd.DataFrame = plan["frame"].sort_values("arrival_s", kind="stable")
    requests = []
    for index, row in frame.iterrows():
        requests.append(
            Request(
                request_id=int(index),
                user=int(index),
                prompt_index=0,
                prompt_tokens=int(row.prompt_tokens),
                output_tokens=int(row.output_tokens),
                max_tokens=int(row.output_tokens),
                output_content_id=int(index),
                block_keys=row["keys"],
                arrival_s=float(row.arrival_s),
            )
        )
    return ReplayWorkload(requests)


def pooled_users(plan: Mapping[str, Any], users: int, rng: np.random.Generator) -> Workload:
    """plan: isl, osl, length_low (shortest length as a share of nominal), requests_per_user."""

    def draw(nominal: int) -> list[int]:
        low = max(1, int(plan["length_low"] * nominal))
        return [int(x) for x in rng.integers(low, nominal + 1, size=pooled_count(plan, users))]

    return PooledUsers(users, draw(plan["isl"]), draw(plan["osl"]))


def pooled_count(plan: Mapping[str, Any], users: int) -> int:
    """How many requests the pool holds."""
    return int(plan["requests_per_user"]) * users


def staged_requests(plan: Mapping[str, Any], rng: np.random.Generator) -> Workload:
    """Poisson stages back to back; requests repeat the distinct prompts behind one system prompt.

    plan: stages, one row each with rate_rps, duration_s, requests (0: as many as the rate brings),
    distinct (0: all different), system_tokens, question_tokens, output_tokens.
    """
    requests: list[Request] = []
    start_s = 0.0
    for number, stage in enumerate(plan["stages"]):
        count = int(stage["requests"]) or int(rng.poisson(stage["rate_rps"] * stage["duration_s"]))
        times = np.sort(rng.uniform(start_s, start_s + stage["duration_s"], size=count))
        start_s += stage["duration_s"]
        system, question = int(stage["system_tokens"]), int(stage["question_tokens"])
        head = (Segment(0, system),) if system else ()
        for time_s in times:
            index, distinct = len(requests), int(stage["distinct"])
            choice = int(rng.integers(distinct)) if distinct else index
            requests.append(
                Request(
                    request_id=index,
                    user=index,
                    prompt_index=0,
                    prompt_tokens=system + question,
                    output_tokens=int(stage["output_tokens"]),
                    max_tokens=int(stage["output_tokens"]),
                    session=number,
                    segments=(*head, Segment(1 + choice, question)),
                    arrival_s=float(time_s),
                )
            )
    return ReplayWorkload(requests)
