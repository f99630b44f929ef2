"""The engine that the simulator turns: a scheduler, its pipeline, and long strides through steady decode."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ersim.engine.config import EngineConfig
from ersim.engine.errors import LivelockError
from ersim.engine.request import DECODING, EngineRequest
from ersim.engine.scheduler import Scheduler
from ersim.engine.step import Step
from ersim.errors import bad_value
from ersim.types import Batch


class Engine(Scheduler):
    """One replica's scheduler and KV cache.

    Either call `schedule` and `update` yourself, as vLLM's engine core does, or let `start` and
    `complete` do it in vLLM's order, for synchronous and asynchronous scheduling alike.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._depth = 2 if config.async_scheduling else 1
        self._carried: list[EngineRequest] = []

    # ---- what others may read -------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests in the running batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return self._queue.size

    @property
    def blocks_used(self) -> int:
        """KV blocks that running requests hold."""
        return self.pool.total - self.pool.free

    @property
    def blocks_total(self) -> int:
        """KV blocks that can be used at all."""
        return self.pool.total

    @property
    def has_work(self) -> bool:
        """Whether any request is in the engine or any step in flight."""
        return bool(self._running or self._flight or self._queue.size)

    # ---- the pipeline ---------------------------------------------------------------------------

    def start(self) -> Step | None:
        """Fill the pipeline and return the step that executes from now on.

        None when there is nothing to do. Raises LivelockError when there is, but can never run.
        """
        flight, queue = self._flight, self._queue
        while len(flight) < self._depth and (self._running or queue.size):
            step = self.schedule()
            if step.index >= 0:
                if self._carried:
                    step.preempted = [*self._carried, *step.preempted]
                    self._carried = []
                continue
            self._carried += step.preempted
            if flight or not step.preempted or self._outgrown(queue.head()):
                break
        if flight:
            return flight[0]
        if self._running or queue.size:
            raise self._livelock()
        return None

    def complete(self) -> Step:
        """The executing step has ended: apply its outputs and return it."""
        if not self._flight:
            raise bad_value("complete", "called while a step executes", "none in flight")
        step = self._flight[0]
        self.update(step)
        return step

    def _outgrown(self, request: EngineRequest) -> bool:
        """Whether a request is larger than the whole KV cache."""
        return request.prompt_tokens + request.generated > self.pool.total * self._size

    def _livelock(self) -> LivelockError:
        request = self._queue.head() if self._queue.size else next(iter(self._running))
        known = request.prompt_tokens + request.generated
        return LivelockError(
            request,
            -(-known // self._size),
            self.pool.total,
            f"its {known} tokens ({request.prompt_tokens} of prompt) do not fit and nothing else runs",
        )

    # ---- long strides ---------------------------------------------------------------------------

    def steady_steps(self) -> int:
        """How many of the next start/complete pairs are pure decode of the rows that run now.

        In those nothing is admitted, ends or fails to get a block, so `advance` may take any number
        of them at once. Ask between `complete` and `start`; 0 when the next step may differ.
        """
        decodes = self._decodes
        if not decodes or self._walked or len(self._flight) != self._depth - 1:
            return 0
        if self._flight:
            step = self._flight[0]
            if step.tokens_out != decodes or step.decode_seqs != decodes or step.rows or step.first:
                return 0
        if (
            self._queue.size
            and len(self._running) < self._max_seqs
            and (self._queue.head() is not self._blocked or self._may_unblock())
        ):
            return 0
        ends, endings = self._ending_steps, self._endings
        last = int(ends.key())
        while not endings.get(last):
            endings.pop(last, None)
            ends.pop()
            last = int(ends.key())
        steps = last - self._updated_steps
        if (steps // self._size + 1) * decodes <= self.pool.free:
            return steps
        return self._steps_until_short(steps)

    def _steps_until_short(self, steps: int) -> int:
        """How many of the next `steps` steps get all their blocks."""
        size, free = self._size, self.pool.free
        rounds = min(free // self._decodes, steps // size)
        free -= rounds * self._decodes
        taken = rounds * size
        k = self._scheduled_steps + taken
        while taken < steps:
            free -= self._needing[k % size]
            if free < 0:
                break
            k += 1
            taken += 1
        return taken

    def steady_batch(self) -> Batch:
        """The first batch of the steady stretch; each later one has one token more per row."""
        if self._flight:
            return self._flight[0].batch
        k, decodes = self._scheduled_steps, self._decodes
        context = self._offsets + k * decodes
        return Batch(decodes, decodes, context, self._longest_context(k), (), decodes)

    def steady_blocks(self, steps: int) -> npt.NDArray[np.int64]:
        """blocks_used after each of the next `steps` steady steps, shape (steps,); ask before `advance`."""
        size, k = self._size, self._scheduled_steps
        counts = np.array([self._needing[phase] for phase in range(size)], dtype=np.int64)
        return self.blocks_used + np.cumsum(counts[(k + np.arange(steps)) % size])

    def advance(self, steps: int) -> None:
        """Take `steps` steady steps at once; at most what `steady_steps` returned."""
        if steps <= 0:
            return
        size, decodes, k = self._size, self._decodes, self._scheduled_steps
        rounds, rest = divmod(steps, size)
        need = rounds * decodes
        for step in range(k, k + rest):
            need += self._needing[step % size]
        self.pool.take(need)
        self._scheduled_steps = k + steps
        self._updated_steps += steps
        if self._flight:
            old = self._flight[0]
            context = old.decode_context_tokens + steps * decodes
            longest = old.decode_context_max + steps
            self._flight[0] = Step(k + steps - 1, decodes, context, longest, decodes)

    # ---- for comparison with another engine -----------------------------------------------------

    def scheduled_rows(self, step: Step) -> list[tuple[EngineRequest, int]]:
        """Who runs in a step with how many tokens; ask right after `schedule` returned it. O(batch)."""
        if step.index < 0:
            return []
        rows = {
            request: 1
            for request in self._running
            if request.state == DECODING and request.joined < step.index
        }
        rows.update(self._given or ())
        admitted = self._admitted or ()
        chunks = step.prefills[len(step.prefills) - len(admitted) :]
        rows.update(zip(admitted, [tokens for tokens, _ in chunks], strict=True))
        return list(rows.items())

    def running_requests(self) -> list[EngineRequest]:
        """The running batch in vLLM's order. O(batch)."""
        return list(self._running)

    def waiting_requests(self) -> list[EngineRequest]:
        """The queue in the order in which it would be served. O(queue)."""
        return self._queue.in_order()
