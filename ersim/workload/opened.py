"""Open arrivals: requests come when they come, whoever still waits. Renewal processes and sessions."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np

from ersim.config import WorkloadConfig
from ersim.errors import bad_value
from ersim.types import Request
from ersim.workload.base import Workload
from ersim.workload.draws import Sampler
from ersim.workload.prompts import PromptSet
from ersim.workload.sessions import RequestMaker, Session

CHUNK_REQUESTS = 4096
ARRIVAL_STREAM = 2

READING_S_PER_TOKEN = 0.05
"""Seconds per answer token before an open-loop user's pause begins: 20 tokens/s, a common streaming pace.
An open stream cannot know when the simulated answer ends; this is its stand-in."""


def arrival_times(rate_rps: float, cv: float, seed: int, chunk: int = CHUNK_REQUESTS) -> Iterator[float]:
    """Endless arrival times in seconds of a renewal process with gamma gaps.

    Gaps have mean 1 / rate_rps and coefficient of variation cv; cv 1 is the Poisson process.
    """
    rng = np.random.default_rng([seed, ARRIVAL_STREAM])
    shape = 1.0 / cv**2
    now = 0.0
    while True:
        times = now + np.cumsum(rng.standard_gamma(shape, chunk)) / (shape * rate_rps)
        now = float(times[-1])
        yield from times.tolist()


class OpenWorkload(Workload):
    """Poisson or gamma arrivals at `rate_rps` requests per second, `requests` of them.

    With several turns a session, an arrival carries on the session whose user has been ready longest
    (answer read, pause over), and opens a new one when nobody is: the rate stays as asked for, and
    sessions have their mean number of turns.
    """

    closed = False

    def __init__(
        self,
        config: WorkloadConfig,
        prompts: PromptSet,
        users: int,
        seed: int,
        ask: Sequence[int] | None = None,
    ) -> None:
        if config.rate_rps is None:
            raise bad_value("workload.rate_rps", f"set for {config.arrivals} arrivals", None)
        self.requests = max(2000, 10 * users) if config.requests is None else config.requests
        self._rate_rps = config.rate_rps
        self._cv = 1.0 if config.arrivals == "poisson" else config.cv
        self._seed = seed
        self._sampler = Sampler(config, prompts, seed, ask)
        self._maker = RequestMaker(config, self._sampler)
        self._multi_turn = config.turns > 1

    def arrivals(self) -> Iterator[Request]:
        times = islice(arrival_times(self._rate_rps, self._cv, self._seed), self.requests)
        return self._turns(times) if self._multi_turn else self._openings(times)

    def _draws(self) -> Iterator[tuple[int, int, int, int, float, int, bool, float]]:
        """Request id and draws of one request after the other, drawn a chunk at a time."""
        for first in count(0, CHUNK_REQUESTS):
            rounds = np.arange(first, first + CHUNK_REQUESTS)
            draws = self._sampler.draw(np.zeros(1, np.int64), rounds)
            yield from zip(
                rounds.tolist(),
                draws.prompt_index.tolist(),
                draws.prompt_tokens.tolist(),
                draws.output_tokens.tolist(),
                draws.choice_u.tolist(),
                draws.drawn_output_tokens.tolist(),
                draws.continues.tolist(),
                draws.think_s.tolist(),
                strict=True,
            )

    def _openings(self, times: Iterator[float]) -> Iterator[Request]:
        for arrival_s, (request_id, index, prompt, output, *_) in zip(times, self._draws(), strict=False):
            request = self._maker.opening(request_id, request_id, index, prompt, output)
            request.arrival_s = arrival_s
            yield request

    def _turns(self, times: Iterator[float]) -> Iterator[Request]:
        ready: list[
            tuple[float, int, Session]
        ] = []  # heap of (ready from, request id of its last turn, session)
        for arrival_s, draw in zip(times, self._draws(), strict=False):
            request_id, index, prompt, output, choice_u, drawn_output, continues, think_s = draw
            session = heapq.heappop(ready)[2] if ready and ready[0][0] <= arrival_s else None
            request, session = self._maker.turn(
                session, request_id, None, index, prompt, output, choice_u, drawn_output, continues
            )
            if session is not None:
                pause_s = READING_S_PER_TOKEN * request.output_tokens + think_s
                heapq.heappush(ready, (arrival_s + pause_s, request_id, session))
            request.arrival_s = arrival_s
            yield request
