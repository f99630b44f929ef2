"""The decode bulk: rows that are past their prefill and cost nothing until something happens to them.

Such a row advances by one token in every step until it ends, so once it joins at step j everything
about it follows from the step counter k:

    computed before step k      offset + k
    tokens delivered            generated at the join + steps updated since
    last step                   joined + answer tokens missing - 1, filed in `_endings`
    needs a block in step k     iff (offset + k) % block_size == 0: counted in `_needing[k % block_size]`

so the sum of contexts is `_offsets + k * _decodes`, and the number of blocks that a step needs is the
one of block_size counters. A row leaves the bulk when it ends, is preempted or aborted, or has to wait
for budget; then the formulas give its explicit state back. Whoever needs a look in every step
(prefills, rows that waited, rows whose answer somebody else may be reading from the prefix cache) is
WALKED instead.

Two times that the formulas must respect, checked against vLLM by the oracle: a block enters the
prefix cache when it is scheduled, but asynchronously only when its last token is known; and the
token of the join itself is emitted by the step that completes the prefill.
"""

from __future__ import annotations

from operator import attrgetter
from typing import cast

from ersim.engine.config import EngineConfig
from ersim.engine.prefix import BlockPool
from ersim.engine.request import DECODING, GHOST, WALKED, EngineRequest
from ersim.engine.step import Step
from ersim.util.heaps import Heap, make_heap
from ersim.util.vectors import i64, vec

by_admission = attrgetter("admission")


class DecodeBulk:
    """State of the running batch, and the moves of a row into the bulk and out of it."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self._async = config.async_scheduling
        self._size = config.block_size
        self._running: dict[EngineRequest, None] = {}
        self._walked: list[EngineRequest] = []
        self._flight: list[Step] = []  # two at most
        self._scheduled_steps = 0
        self._updated_steps = 0
        self._decodes = 0
        self._offsets = 0
        self._needing: vec[i64] = vec[i64]([0] * config.block_size)
        self._endings: dict[int, list[EngineRequest]] = {}
        self._ending_steps: Heap = make_heap()  # those of `_endings`, and some that are over
        self._longest: Heap = make_heap()  # by -offset; rows that left the bulk are dropped when they show up

    def computed_of(self, request: EngineRequest) -> int:
        """Tokens computed of a row in the bulk."""
        return request.offset + self._scheduled_steps

    def generated_of(self, request: EngineRequest) -> int:
        """Tokens delivered of a row in the bulk."""
        since = self._updated_steps - request.joined
        return request.generated + since if since > 0 else request.generated

    def _join_bulk(self, request: EngineRequest, joined: int) -> None:
        """Let a row that emits in the step just scheduled (index `_scheduled_steps` - 1) run by itself."""
        request.state = DECODING
        request.joined = joined
        request.offset = offset = request.computed - self._scheduled_steps
        self._decodes += 1
        self._offsets += offset
        self._needing[-offset % self._size] += 1
        request.finish_step = last = joined + request.length - request.generated - 1
        ending = self._endings.get(last)
        if ending is None:
            self._endings[last] = [request]
            self._ending_steps.push(float(last), request.admission, request)
        else:
            ending.append(request)
        longest = self._longest
        longest.push(float(-offset), request.admission, request)
        if longest.size > 4 * self._decodes + 64:
            self._longest = self._current_offsets()
        if request.answer is not None:
            request.answer.writer = request

    def _drop_from_bulk(self, request: EngineRequest) -> None:
        """Take a row out of the sums; its finish step still lists it."""
        offset = request.offset
        request.computed = offset + self._scheduled_steps
        self._decodes -= 1
        self._offsets -= offset
        self._needing[-offset % self._size] -= 1
        if request.answer is not None:
            request.answer.writer = None

    def _leave_bulk(self, request: EngineRequest) -> None:
        """Make a row's state explicit again; it is WALKED then, but in no list."""
        self._drop_from_bulk(request)
        self._endings[request.finish_step].remove(request)
        k, updated, joined = self._scheduled_steps, self._updated_steps, request.joined
        flight = k - (updated if updated > joined else joined)
        request.generated += k - flight - joined
        if self._async:
            request.placeholders = flight
            request.hashed_tokens = request.computed - (joined != k - 1)
        else:
            request.hashed_tokens = request.computed
        request.state = WALKED
        request.prefilling = False

    def _demote(self, request: EngineRequest) -> None:
        """Take a row out of the bulk and look at it in every step."""
        self._list_in_flight(request)
        self._leave_bulk(request)
        self._walked.append(request)
        self._walked.sort(key=by_admission)
        if request.path:
            self.pool.cache(request, request.hashed_tokens)

    def _list_in_flight(self, request: EngineRequest) -> None:
        """Let the steps in flight count the tokens of a row that leaves the bulk one by one."""
        for step in self._steps_in_flight(request):
            if step.rows is None:
                step.rows = []
            step.rows.append(request)

    def _steps_in_flight(self, request: EngineRequest) -> list[Step]:
        """Steps in flight that will deliver a token to a row of the bulk."""
        return [step for step in self._flight if request.joined <= step.index <= request.finish_step]

    def _set_ghosts_aside(self, last: int) -> int:
        """Rows whose last token is in flight: those that end by length are not scheduled again.

        They keep their blocks and their place in the batch until the output arrives. Returns how
        many end by a stop token, which vLLM cannot foresee: those run once more in vain.
        """
        wasted = 0
        for request in self._endings[last]:
            if request.state == DECODING:
                if request.stop == "stop":
                    wasted += 1
                else:
                    self._drop_from_bulk(request)
                    request.state = GHOST
        return wasted

    def _longest_context(self, k: int) -> int:
        """The largest context of a bulk row before step k."""
        longest = self._longest
        while True:
            request = cast("EngineRequest", longest.first())
            offset = request.offset
            if request.state == DECODING and longest.key() == float(-offset):
                return k + offset
            longest.pop()

    def _current_offsets(self) -> Heap:
        """`_longest` without what is over."""
        longest = make_heap()
        for request in self._running:
            if request.state == DECODING:
                longest.push(float(-request.offset), request.admission, request)
        return longest
