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
    """Draws of some rounds of all users, as memoryviews (a numpy scalar costs three times as much).

    first: id of its first request. entered: how many users have come to it.
    """

    prompt_index: memoryview
    prompt_tokens: memoryview
    output_tokens: memoryview
    choice_u: memoryview
    drawn_output_tokens: memoryview
    continues: memoryview
    think_s: memoryview
    first: int
    entered: int


_NOTHING = memoryview(b"")
_NO_BLOCK = _Block(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, -1, 0)


class ClosedWorkload(Workload):
    """`users` users who ask, wait for the answer, think and ask again.

    Round r of user u is the same request whatever the others do, in whatever order users ask, and
    however many there are (but for its id, round * users + user). Draws are made for all users a block
    of rounds at a time and dropped when all users have passed it: memory follows the distance between
    the fastest and the slowest user, not the length of the run. A request with its pause takes about 1.4 µs
    where constructing a `Request` alone takes 0.4; `tests/workload/bench_workload.py` measures it.
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
        self._bare = self._maker.bare and config.turns == 1
        self._sessions: list[Session | None] | None = [None] * users if config.turns > 1 else None
        self._ramp_s = config.ramp_s
        self._thinks = config.think_s > 0
        self._block_rounds = max(1, block_requests // users)
        self._size = self._block_rounds * users
        self._blocks: dict[int, _Block] = {}  # those that some user has not come to yet
        self._block: list[_Block] = [_NO_BLOCK] * users
        self._at = [self._size] * users  # place of each user's next request in its block

    def start_s(self, user: int) -> float:
        return self._ramp_s * user / self.users

    def think_s(self, user: int) -> float:
        if not self._thinks:
            return 0.0
        if self._at[user] >= self._size:
            self._enter(user)
        return self._block[user].think_s[self._at[user]]

    def next_request(self, user: int) -> Request:
        if self._at[user] >= self._size:
            self._enter(user)
        block, at = self._block[user], self._at[user]
        self._at[user] = at + self.users
        request_id = block.first + at
        index, prompt, output = block.prompt_index[at], block.prompt_tokens[at], block.output_tokens[at]
        if self._bare:  # what `opening` makes then, without the call: a quarter of the time
            return Request(request_id, user, index, prompt, output, output, 0, request_id)
        if self._sessions is None:
            return self._maker.opening(request_id, user, index, prompt, output)
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

    def _enter(self, user: int) -> None:
        """Bring the user to the next block, drawn if nobody was there; off the list once all have come."""
        number = self._block[user].first // self._size + 1
        block = self._blocks.get(number) or self._draw(number)
        block.entered += 1
        if block.entered == self.users:
            del self._blocks[number]
        self._block[user] = block
        self._at[user] = user

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
            first=number * self._size,
            entered=0,
        )
        self._blocks[number] = block
        return block
