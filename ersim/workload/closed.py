"""Closed-loop users: each has one request in flight at most, and thinks before the next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ersim.config import WorkloadConfig
from ersim.types import Request
from ersim.util.vectors import i64, vec
from ersim.workload.base import Workload
from ersim.workload.draws import Draws, Sampler
from ersim.workload.prompts import PromptSet
from ersim.workload.sessions import RequestMaker, Session

BLOCK_REQUESTS = 4096
"""Requests drawn at once when there are fewer users than that: enough to make numpy's overhead vanish."""


class _Block:
    """Draws of some rounds of all users, as plain numbers; choice_u and what follows only for sessions.

    first: id of its first request. entered: how many users have come to it.
    """

    __slots__ = (
        "choice_u",
        "continues",
        "drawn_output_tokens",
        "entered",
        "first",
        "output_tokens",
        "prompt_index",
        "prompt_tokens",
        "think_s",
    )

    def __init__(self, draws: Draws | None, first: int, sessions: bool) -> None:
        self.first = first
        self.entered = 0
        self.prompt_index: vec[i64] = vec[i64](draws.prompt_index.tolist() if draws else [])
        self.prompt_tokens: vec[i64] = vec[i64](draws.prompt_tokens.tolist() if draws else [])
        self.output_tokens: vec[i64] = vec[i64](draws.output_tokens.tolist() if draws else [])
        self.think_s: vec[float] = vec[float](draws.think_s.tolist() if draws else [])
        more = draws if sessions else None
        self.choice_u: list[float] = more.choice_u.tolist() if more else []
        self.drawn_output_tokens: list[int] = more.drawn_output_tokens.tolist() if more else []
        self.continues: list[bool] = more.continues.tolist() if more else []


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
        self._size: i64 = self._block_rounds * users
        self._blocks: dict[int, _Block] = {}  # those that some user has not come to yet
        self._block: list[_Block] = [_Block(None, -1, False)] * users
        self._at: vec[i64] = vec[i64]([int(self._size)] * users)  # each user's next request in its block

    def start_s(self, user: int) -> float:
        return self._ramp_s * user / self.users

    def think_s(self, user: int) -> float:
        if not self._thinks:
            return 0.0
        at = self._at[user]
        if at >= self._size:
            self._enter(user)
            at = self._at[user]
        return self._block[user].think_s[at]

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
            block.continues[at],
        )
        return request

    def _enter(self, user: int) -> None:
        """Bring the user to the next block, drawn if nobody was there; off the list once all have come."""
        number = self._block[user].first // int(self._size) + 1
        block = self._blocks.get(number) or self._draw(number)
        block.entered += 1
        if block.entered == self.users:
            del self._blocks[number]
        self._block[user] = block
        self._at[user] = user

    def _draw(self, number: int) -> _Block:
        rounds = np.arange(number * self._block_rounds, (number + 1) * self._block_rounds)
        draws = self._sampler.draw(np.arange(self.users)[None, :], rounds[:, None])
        block = _Block(draws, number * int(self._size), self._sessions is not None)
        self._blocks[number] = block
        return block
