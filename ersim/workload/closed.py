"""Closed-loop users: each has one request in flight at most, and thinks before the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ersim.config import WorkloadConfig
from ersim.types import Request
from ersim.workload.base import Workload
from ersim.workload.draws import Sampler
from ersim.workload.prompts import PromptSet
from ersim.workload.sessions import RequestMaker, Session

BLOCK_REQUESTS = 4096
"""Requests drawn at once when there are fewer users than that: enough to make numpy's overhead vanish."""


@dataclass(slots=True)
class _Block:
    """Draws of some rounds of all users, as memoryviews (a numpy scalar costs three times as much)."""

    prompt_index: memoryview
    prompt_tokens: memoryview
    output_tokens: memoryview
    choice_u: memoryview
    drawn_output_tokens: memoryview
    continues: memoryview
    think_s: memoryview
    left: int


class ClosedWorkload(Workload):
    """`users` users who ask, wait for the answer, think and ask again.

    Round r of user u is the same request whatever the others do, in whatever order users ask, and
    however many there are (but for its id, round * users + user). Draws are made for all users a block
    of rounds at a time and dropped when all users have passed it: memory follows the distance between
    the fastest and the slowest user, not the length of the run.
    """

    closed = True

    def __init__(
        self,
        config: WorkloadConfig,
        prompts: PromptSet,
        users: int,
        seed: int,
        ask: Sequence[int] | None = None,
        block_requests: int = BLOCK_REQUESTS,
    ) -> None:
        self.users = users
        self._sampler = Sampler(config, prompts, seed, ask)
        self._maker = RequestMaker(config, self._sampler)
        self._opening = self._maker.opening
        self._sessions: list[Session | None] | None = [None] * users if config.turns > 1 else None
        self._ramp_s = config.ramp_s
        self._thinks = config.think_s > 0
        self._block_rounds = max(1, block_requests // users)
        self._block_size = self._block_rounds * users
        self._next = list(range(users))  # id of each user's next request
        self._blocks: dict[int, _Block] = {}

    def start_s(self, user: int) -> float:
        return self._ramp_s * user / self.users

    def think_s(self, user: int) -> float:
        if not self._thinks:
            return 0.0
        number, at = divmod(self._next[user], self._block_size)
        block = self._blocks.get(number) or self._draw(number)
        return block.think_s[at]

    def next_request(self, user: int) -> Request:
        request_id = self._next[user]
        self._next[user] = request_id + self.users
        number, at = divmod(request_id, self._block_size)
        block = self._blocks.get(number) or self._draw(number)
        block.left -= 1
        if not block.left:
            del self._blocks[number]
        index, prompt, output = block.prompt_index[at], block.prompt_tokens[at], block.output_tokens[at]
        if self._sessions is None:
            return self._opening(request_id, user, index, prompt, output)
        request, self._sessions[user] = self._maker.turn(
            self._sessions[user],
            request_id,
            user,
            index,
            prompt,
            output,
            block.choice_u[at],
            block.drawn_output_tokens[at],
            bool(block.continues[at]),
        )
        return request

    def _draw(self, number: int) -> _Block:
        rounds = np.arange(number * self._block_rounds, (number + 1) * self._block_rounds)
        draws = self._sampler.draw(np.arange(self.users)[None, :], rounds[:, None])
        block = _Block(
            draws.prompt_index.data,
            draws.prompt_tokens.data,
            draws.output_tokens.data,
            draws.choice_u.data,
            draws.drawn_output_tokens.data,
            draws.continues.data,
            draws.think_s.data,
            left=self._block_size,
        )
        self._blocks[number] = block
        return block
