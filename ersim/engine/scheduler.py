"""vLLM's V1 scheduler as pure state, with work per step that does not grow with the batch.

The algorithm, as vLLM has it (text-only, one KV cache group, no speculation). Each call of
`schedule` has a budget of tokens. First the running requests, in the order in which they were
admitted, get what they can take: one token when decoding, a chunk of their prompt otherwise. Who
needs a KV block when none is free preempts the last (or least important) running request, which
loses all blocks and goes back to the head of the queue. Then, if nobody was preempted, the queue's
head is admitted as long as budget, max_num_seqs and free blocks last; cached blocks of its prefix
are taken over. `update` delivers one token to every row that has computed all it knows, ends those
that are done and frees their blocks. Asynchronous scheduling runs `schedule` one step ahead.

How a decoding row costs nothing. A row that is past its prefill advances by one token in every
step until it ends, so once it joins at step j everything about it follows from the step counter k:

    computed before step k      offset + k
    tokens delivered            generated at the join + steps updated since
    last step                   joined + answer tokens missing - 1, filed in `_endings`
    needs a block in step k     iff (offset + k) % block_size == 0: row is in `_phases[k % block_size]`

so the sum of contexts is `_offsets + k * decodes`, and the blocks that a step needs are the size of
one dictionary. A row leaves this bulk when it ends, is preempted or aborted, or has to wait for
budget; then the formulas give its explicit state. Everything else is WALKED row by row: prefills,
rows that waited, and rows whose answer somebody else may be reading from the prefix cache.

Times that the formulas must respect, all checked against vLLM by the oracle: a block enters the
prefix cache when it is scheduled (asynchronously: when its last token is known); an asynchronous
row that ends by length is not scheduled again but keeps its blocks until its output arrives (a
GHOST), one that ends by a stop token is scheduled once in vain.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from ersim.engine.config import EngineConfig
from ersim.engine.errors import LivelockError, RejectedRequest
from ersim.engine.prefix import BlockPool
from ersim.engine.queue import FcfsQueue, PriorityQueue
from ersim.engine.request import (
    DECODING,
    FINISHED,
    GHOST,
    NEW,
    PREEMPTED,
    WAITING,
    WALKED,
    EngineRequest,
)
from ersim.engine.step import NOBODY, Step
from ersim.errors import bad_value
from ersim.types import Batch

_by_admission = attrgetter("admission")


class Engine:
    """One replica's scheduler and KV cache.

    Either call `schedule` and `update` yourself, as vLLM's engine core does, or let `start` and
    `complete` do it in vLLM's order for synchronous and asynchronous scheduling alike.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self._async = config.async_scheduling
        self._depth = 2 if config.async_scheduling else 1
        self._priority = config.policy == "priority"
        self._block_size = config.block_size
        self._watermark_blocks = int(config.watermark * config.num_blocks)
        self._queue: FcfsQueue | PriorityQueue = PriorityQueue() if self._priority else FcfsQueue()
        self._running: dict[EngineRequest, None] = {}
        self._flight: deque[Step] = deque()
        self._arrivals = 0
        self._admissions = 0
        # the decode bulk
        self._scheduled_steps = 0
        self._updated_steps = 0
        self._decodes = 0
        self._offsets = 0
        self._phases: list[dict[EngineRequest, None]] = [{} for _ in range(config.block_size)]
        self._endings: dict[int, list[EngineRequest]] = {}
        self._ending_heap: list[int] = []
        self._longest: list[tuple[int, int, EngineRequest]] = []
        # everything else
        self._carried: list[EngineRequest] = []
        self._walked: list[EngineRequest] = []
        self._blocked: EngineRequest | None = None
        self._blocked_free = 0
        self._blocked_decodes = 0
        self._trace: list[tuple[EngineRequest, int]] = []

    # ---- what others may read -------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests in the running batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._queue)

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
        return bool(self._running or self._flight or len(self._queue))

    def computed_of(self, request: EngineRequest) -> int:
        """Tokens computed of a row in the decode bulk."""
        return request.offset + self._scheduled_steps

    def generated_of(self, request: EngineRequest) -> int:
        """Tokens delivered of a row in the decode bulk."""
        since = self._updated_steps - request.joined
        return request.generated + since if since > 0 else request.generated

    # ---- requests come and go -------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Put a request at its place in the queue.

        Raises RejectedRequest where vLLM's server answers HTTP 400: an empty prompt, a prompt that
        leaves no room in max_model_len, or less than one token to generate.
        """
        config = self.config
        prompt = request.prompt_tokens
        if prompt < 1:
            raise RejectedRequest(request, "empty_prompt", "the prompt is empty")
        if prompt >= config.max_model_len:
            raise RejectedRequest(
                request,
                "prompt_too_long",
                f"its prompt of {prompt} tokens leaves no room in max_model_len ({config.max_model_len})",
            )
        if request.max_tokens < 1 or request.output_tokens < 1:
            raise RejectedRequest(request, "no_output", "it must generate at least one token")
        if request.state != NEW:
            raise bad_value("request", "one that no engine has seen", request)
        limit = min(request.max_tokens, config.max_model_len - prompt)
        request.length, request.stop = (
            (request.output_tokens, "stop") if request.output_tokens < limit else (limit, "length")
        )
        request.engine = self
        request.arrival = self._arrivals
        self._arrivals += 1
        request.state = WAITING
        request.path = None
        if config.enable_prefix_caching:
            self._resolve(request)
        if len(self._queue) <= 1:
            self._blocked = (
                None  # the threshold does not bind a request alone: two may get in where one did not
            )
        self._queue.append(request)

    def _resolve(self, request: EngineRequest) -> None:
        """Find the request's place in the content trie; whoever writes there is walked from now on."""
        segments = request.segments
        if segments is not None and request.block_keys is None:
            total = sum([segment.tokens for segment in segments])
            if total != request.prompt_tokens:
                raise bad_value(
                    "request.segments", f"as long as the prompt ({request.prompt_tokens} tokens)", total
                )
        path = self.pool.resolve(request)
        if path is None:
            return
        request.path = path
        request.held = []
        request.tail = None
        request.hashed_blocks = 0
        for node, _, _ in path:
            if node.writer is not None:
                self._demote(node.writer)

    def abort(self, request: EngineRequest) -> None:
        """Forget a request wherever it is; tokens of it that are in flight are not delivered."""
        state = request.state
        if state in (NEW, FINISHED):
            return
        if state == DECODING:
            emitting = self._steps_in_flight(request)
            self._leave_bulk(request)
            for step in emitting:
                step.tokens_out -= 1
        for step in self._flight:
            if step.rows is not None and request in step.rows:
                step.rows.remove(request)
                step.tokens_out -= 1
            if request in step.first:
                step.first = [other for other in step.first if other is not request]
        if state in (WAITING, PREEMPTED):
            self._queue.remove(request)
            if request.path is not None:
                self.pool.leave(request.path)
        else:
            if state == WALKED:
                self._walked.remove(request)
            elif state == GHOST:
                self._endings[request.finish_step].remove(request)
                self._flight[0].tokens_out -= 1
            del self._running[request]
            self.pool.release(request, request.computed, request.hashed_tokens, gone=True)
        self._blocked = None
        request.state = FINISHED
        request.finish_reason = "abort"

    # ---- the decode bulk ------------------------------------------------------------------------

    def _join_bulk(self, request: EngineRequest, joined: int) -> None:
        """Let a row that emits in the step just scheduled (index `_scheduled_steps` - 1) run by itself."""
        k = self._scheduled_steps
        request.state = DECODING
        request.joined = joined
        request.offset = offset = request.computed - k
        self._decodes += 1
        self._offsets += offset
        self._phases[-offset % self._block_size][request] = None
        request.finish_step = last = joined + request.length - request.generated - 1
        ending = self._endings.get(last)
        if ending is None:
            self._endings[last] = [request]
            heapq.heappush(self._ending_heap, last)
        else:
            ending.append(request)
        longest = self._longest
        heapq.heappush(longest, (-offset, request.admission, request))
        if len(longest) > 4 * self._decodes + 64:
            self._longest = [entry for entry in longest if self._is_current(entry)]
            heapq.heapify(self._longest)
        path = request.path
        if path is not None:
            path[-1][0].writer = request

    def _leave_bulk(self, request: EngineRequest) -> None:
        """Make a row's state explicit again; its state is WALKED but it is in no list."""
        k, updated = self._scheduled_steps, self._updated_steps
        joined, offset = request.joined, request.offset
        request.computed = offset + k
        flight = k - (updated if updated > joined else joined)
        request.generated += k - flight - joined
        if self._async:
            request.placeholders = flight
            request.hashed_tokens = request.computed - (joined != k - 1)
        else:
            request.hashed_tokens = request.computed
        self._decodes -= 1
        self._offsets -= offset
        del self._phases[-offset % self._block_size][request]
        ending = self._endings.get(request.finish_step)
        if ending is not None and request in ending:
            ending.remove(request)
        request.state = WALKED
        request.prefilling = False
        if request.path is not None:
            request.path[-1][0].writer = None

    def _is_current(self, entry: tuple[int, int, EngineRequest]) -> bool:
        request = entry[2]
        return request.state == DECODING and request.offset == -entry[0] and request.admission == entry[1]

    def _steps_in_flight(self, request: EngineRequest) -> list[Step]:
        """Steps in flight that will deliver a token to a row in the decode bulk."""
        return [step for step in self._flight if request.joined <= step.index <= request.finish_step]

    def _demote(self, request: EngineRequest) -> None:
        """Take a row out of the bulk and look at it in every step."""
        emitting = self._steps_in_flight(request)
        self._leave_bulk(request)
        for step in emitting:
            if step.rows is None:
                step.rows = []
            step.rows.append(request)
        self._walked.append(request)
        self._walked.sort(key=_by_admission)
        if request.path is not None:
            self.pool.cache(request, request.hashed_tokens)

    # ---- schedule -------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Choose what the next step runs; the step is in flight until `update`."""
        k = self._scheduled_steps
        preempted: Sequence[EngineRequest] = NOBODY
        walked: list[tuple[EngineRequest, int]] = []
        wasted = 0
        if self._flight and self._async:
            wasted = self._set_ghosts_aside(k - 1)
        need = len(self._phases[k % self._block_size])
        if self._walked or need > self.pool.free or (self._async and self._decodes and not self._flight):
            walked, preempted = self._schedule_running(k)
            wasted = self._count_wasted(k - 1)
        elif need:
            self.pool.take(need)
        decodes = self._decodes
        context = self._offsets + k * decodes
        tokens = decodes
        for _, count in walked:
            tokens += count
        admitted: list[EngineRequest] | None = None
        if not preempted and len(self._queue) and len(self._running) < self.config.max_num_seqs:
            admitted = self._admit(self.config.max_num_batched_tokens - tokens, walked)
        self._trace = walked
        if not decodes and not walked:
            step = Step(-1, Batch(0, 0, 0, 0, NOBODY, 0), 0)  # type: ignore[arg-type]
            step.preempted = preempted
            return step
        longest = self._longest_context(k) if decodes else 0
        batch = Batch(decodes, decodes, context, longest, (), decodes)
        step = Step(k, batch, decodes - wasted)
        self._scheduled_steps = k + 1
        self._flight.append(step)
        if walked:
            self._account(step, walked)
        if preempted:
            step.preempted = preempted
        if admitted:
            fresh = [request for request in admitted if not request.preemptions]
            step.admitted = fresh
            if len(fresh) < len(admitted):
                step.resumed = [request for request in admitted if request.preemptions]
        return step

    def _longest_context(self, k: int) -> int:
        longest = self._longest
        while not self._is_current(longest[0]):
            heapq.heappop(longest)
        return k - longest[0][0]

    def _set_ghosts_aside(self, last: int) -> int:
        """Rows whose last token is in flight: those that end by length are not scheduled again.

        Returns how many end by a stop token, which vLLM cannot foresee, and run once more in vain.
        """
        ending = self._endings.get(last)
        if not ending:
            return 0
        wasted = 0
        for request in list(ending):
            if request.state != DECODING:
                continue
            if request.stop == "stop":
                wasted += 1
                continue
            self._leave_bulk(request)
            ending.append(request)
            request.state = GHOST
        return wasted

    def _count_wasted(self, last: int) -> int:
        if not (self._async and self._flight):
            return 0
        return sum(request.state == DECODING for request in self._endings.get(last, ()))

    def _schedule_running(self, k: int) -> tuple[list[tuple[EngineRequest, int]], Sequence[EngineRequest]]:
        """Phase one when it needs a look: walked rows, too little budget, or too few blocks.

        Returns the walked rows with their tokens, and who was preempted.
        """
        if self._async and self._decodes and not self._flight:
            for request in [row for row in self._running if row.state == DECODING]:
                self._demote(request)  # the pipeline ran dry: no row has a token in flight
        size = self._block_size
        budget = self.config.max_num_batched_tokens - self._decodes
        threshold = self._threshold()
        rows: list[tuple[EngineRequest, int]] = []
        need = len(self._phases[k % size])
        ordered = False
        for request in self._walked:
            tokens = self._wanted(request, threshold)
            if tokens <= 0:
                continue
            if tokens > budget:
                ordered = True  # somebody gets less than wanted: order matters
                if request is not self._walked[-1] or request is not next(reversed(self._running)):
                    break
                tokens = budget
                if tokens == 0:
                    break
                ordered = False
            budget -= tokens
            computed = request.computed
            need += -(-(computed + tokens) // size) + (-computed // size)
            rows.append((request, tokens))
        if ordered or (need > self.pool.free and self._priority):
            return self._walk_all(threshold)
        if need > self.pool.free:
            return self._walk_needy(k, rows)
        if need:
            self.pool.take(need)
        for request, tokens in rows:
            self._note_hashed(request, tokens)
        return rows, NOBODY

    def _threshold(self) -> int:
        """long_prefill_token_threshold, which does not bind a request that is alone."""
        return self.config.long_prefill_token_threshold if len(self._running) + len(self._queue) > 1 else 0

    def _wanted(self, request: EngineRequest, threshold: int) -> int:
        """Tokens that a walked row would take from an endless budget."""
        computed, in_flight = request.computed, request.placeholders
        prompt = request.prompt_tokens
        if in_flight and computed + 2 - in_flight >= prompt + request.max_tokens:
            return 0
        tokens = prompt + request.generated + in_flight - computed
        if 0 < threshold < tokens:
            tokens = threshold
        room = self.config.max_model_len - computed - 1
        return tokens if tokens < room else room

    def _note_hashed(self, request: EngineRequest, tokens: int) -> None:
        """A walked row was given blocks for `tokens` more: those it knows all tokens of can be found."""
        known = request.prompt_tokens + request.generated
        hashed = request.computed + tokens
        if hashed > known:
            hashed = known
        if hashed > request.hashed_tokens:
            request.hashed_tokens = hashed
            if request.path is not None:
                self.pool.cache(request, hashed)

    def _walk_needy(
        self, k: int, walked: list[tuple[EngineRequest, int]]
    ) -> tuple[list[tuple[EngineRequest, int]], Sequence[EngineRequest]]:
        """Too few blocks under FCFS: serve those who need one in order, preempting from the end."""
        size, pool = self._block_size, self.pool
        needy = [(request, 1) for request in self._phases[k % size]]
        needy += walked
        needy.sort(key=lambda row: row[0].admission)
        preempted: list[EngineRequest] = []
        served: list[tuple[EngineRequest, int]] = []
        for request, tokens in needy:
            if request.state == PREEMPTED:
                break
            in_bulk = request.state == DECODING
            computed = request.computed
            need = 1 if in_bulk else -(-(computed + tokens) // size) + (-computed // size)
            while need > pool.free and request.state != PREEMPTED:
                victim = next(reversed(self._running))
                self._preempt(victim, 0)
                preempted.append(victim)
            if request.state == PREEMPTED:
                break
            if need:
                pool.take(need)
            if not in_bulk:
                self._note_hashed(request, tokens)
                served.append((request, tokens))
        return served, preempted

    def _walk_all(self, threshold: int) -> tuple[list[tuple[EngineRequest, int]], Sequence[EngineRequest]]:
        """Phase one row by row, as vLLM has it: for scarce budget, and for scarce blocks by priority."""
        size, pool = self._block_size, self.pool
        budget = self.config.max_num_batched_tokens
        rows = list(self._running)
        given: dict[EngineRequest, int] = {}
        preempted: list[EngineRequest] = []
        stopped = False
        for request in rows:
            if request.state == PREEMPTED or request.state == GHOST:
                continue
            if budget <= 0 or stopped:
                if request.state == DECODING:
                    self._demote(request)
                continue
            if request.state == DECODING:
                tokens, computed = 1, request.offset + self._scheduled_steps
            else:
                tokens, computed = min(self._wanted(request, threshold), budget), request.computed
                if tokens <= 0:
                    continue
            need = -(-(computed + tokens) // size) + (-computed // size)
            while need > pool.free:
                victim = self._victim()
                returned = given.pop(victim, 0)
                budget += returned
                self._preempt(victim, returned)
                preempted.append(victim)
                if victim is request:
                    stopped = True
                    break
            if stopped:
                continue
            if need:
                pool.take(need)
            if request.state == WALKED:
                self._note_hashed(request, tokens)
            given[request] = tokens
            budget -= tokens
        return [row for row in given.items() if row[0].state == WALKED], preempted

    def _victim(self) -> EngineRequest:
        """Whom vLLM preempts: the last admitted, or the least important and latest."""
        if self._priority:
            return max(self._running, key=lambda row: (row.priority, row.arrival))
        return next(reversed(self._running))

    def _preempt(self, request: EngineRequest, tokens: int) -> None:
        """Take all blocks from a running request that was already given `tokens` in this call."""
        if request.state == DECODING:
            emitting = self._steps_in_flight(request)
            self._leave_bulk(request)
            for step in emitting:
                if step.rows is None:
                    step.rows = []
                step.rows.append(request)
        elif request.state == GHOST:
            self._endings[request.finish_step].remove(request)
            step = self._flight[0]
            if step.rows is None:
                step.rows = []
            step.rows.append(request)
        else:
            self._walked.remove(request)
        hashed = request.hashed_tokens
        if tokens:
            known = request.prompt_tokens + request.generated
            hashed = max(hashed, min(request.computed + tokens, known))
        self.pool.release(request, request.computed + tokens, hashed, gone=False)
        del self._running[request]
        request.state = PREEMPTED
        request.computed = 0
        request.placeholders = 0
        request.hashed_tokens = 0
        request.preemptions += 1
        self._blocked = None
        self._queue.push_front(request)

    def _admit(self, budget: int, walked: list[tuple[EngineRequest, int]]) -> list[EngineRequest] | None:
        """Phase two: take requests from the queue's head into the batch."""
        config, pool, queue = self.config, self.pool, self._queue
        size = self._block_size
        head = queue.head()
        if (
            head is self._blocked
            and pool.free <= self._blocked_free
            and self._decodes == self._blocked_decodes
            and not self._walked
        ):
            return None
        threshold = self._threshold()
        running = self._running
        admitted: list[EngineRequest] = []
        while budget > 0 and len(queue) and len(running) < config.max_num_seqs:
            request = queue.head()
            known = request.prompt_tokens + request.generated
            hits, hit_blocks, evictable = (
                pool.lookup(request.path, (known - 1) // size) if request.path is not None else ((), 0, 0)
            )
            computed = hit_blocks * size
            tokens = known - computed
            if 0 < threshold < tokens:
                tokens = threshold
            if tokens > budget:
                if not config.enable_chunked_prefill:
                    self._block_on(request)
                    break
                tokens = budget
            reserve = self._watermark_blocks if running else 0
            available = pool.free - evictable - reserve
            need = -(-(computed + tokens) // size) - hit_blocks
            whole = -(-known // size) - hit_blocks if config.scheduler_reserve_full_isl else need
            if need > available or whole > available:
                self._block_on(request)
                break
            queue.pop()
            if hit_blocks:
                pool.acquire(request, hits)  # type: ignore[arg-type]
                request.hashed_blocks = hit_blocks
            if not request.preemptions:
                request.cached_tokens = computed
            pool.take(need)
            running[request] = None
            request.admission = self._admissions
            self._admissions += 1
            request.computed = computed
            request.hashed_tokens = computed
            request.placeholders = 0
            request.prefilling = True
            request.state = WALKED
            self._note_hashed(request, tokens)
            walked.append((request, tokens))
            self._walked.append(request)
            admitted.append(request)
            budget -= tokens
        return admitted

    def _block_on(self, request: EngineRequest) -> None:
        """Remember why the head did not get in: until something is freed it need not be asked again."""
        self._blocked = request
        self._blocked_free = self.pool.free
        self._blocked_decodes = self._decodes

    def _account(self, step: Step, walked: list[tuple[EngineRequest, int]]) -> None:
        """Advance the walked rows of a step, and let those that decode from now on run by themselves."""
        batch = step.batch
        prefills: list[tuple[int, int]] = []
        first: list[EngineRequest] = []
        joined = False
        for request, tokens in walked:
            computed, in_flight = request.computed, request.placeholders
            batch.tokens += tokens
            if request.prefilling:
                prefills.append((tokens, computed))
            else:
                batch.decode_seqs += 1
                batch.decode_context_tokens += computed
                if computed > batch.decode_context_max:
                    batch.decode_context_max = computed
            request.computed = computed = computed + tokens
            expected = request.generated + in_flight
            if computed < request.prompt_tokens + expected:
                continue
            request.prefilling = False
            batch.sampled_seqs += 1
            if not expected:
                first.append(request)
            alone = request.path is None or request.path[-1][0].users == 1
            if expected < request.length:
                step.tokens_out += 1
                if alone:
                    if in_flight:
                        self._flight[-2].rows.remove(request)  # type: ignore[union-attr]
                    self._join_bulk(request, step.index - in_flight)
                    joined = True
                    continue
                if step.rows is None:
                    step.rows = []
                step.rows.append(request)
            if self._async:
                request.placeholders = in_flight + 1
        if prefills:
            batch.prefills = prefills
        if first:
            step.first = first
        if joined:
            self._walked = [request for request in self._walked if request.state == WALKED]

    # ---- update ---------------------------------------------------------------------------------

    def update(self, step: Step) -> None:
        """Apply the outputs of the oldest step in flight: count tokens, end requests, free blocks."""
        if step.index < 0:
            return
        if not self._flight or self._flight[0] is not step:
            raise bad_value("step", "the oldest one in flight", step.index)
        self._flight.popleft()
        k = step.index
        self._updated_steps = k + 1
        finished: list[EngineRequest] = []
        if step.rows:
            finished = self._count_tokens(step.rows)
        ending = self._endings.pop(k, None)
        heap = self._ending_heap
        while heap and heap[0] <= k:
            heapq.heappop(heap)
        if ending:
            finished = finished + ending if finished else ending
        if finished:
            if len(finished) > 1:
                finished.sort(key=_by_admission)
            for request in finished:
                self._finish(request)
            step.finished = finished
            self._blocked = None

    def _count_tokens(self, rows: list[EngineRequest]) -> list[EngineRequest]:
        """Give one token to each row outside the bulk (also to preempted ones); return who is done."""
        finished = []
        rows.sort(key=_by_admission)
        for request in rows:
            request.generated += 1
            if self._async and request.state == WALKED:
                request.placeholders -= 1
                hashed = request.computed - request.placeholders
                if hashed > request.hashed_tokens:
                    request.hashed_tokens = hashed
                    if request.path is not None:
                        self.pool.cache(request, hashed)
            if request.generated >= request.length:
                finished.append(request)
        return finished

    def _finish(self, request: EngineRequest) -> None:
        state = request.state
        request.state = FINISHED
        request.finish_reason = request.stop
        if state == PREEMPTED:
            self._queue.remove(request)
            if request.path is not None:
                self.pool.leave(request.path)
            return
        if state == DECODING:
            offset = request.offset
            request.computed = offset + self._scheduled_steps
            self._decodes -= 1
            self._offsets -= offset
            del self._phases[-offset % self._block_size][request]
            if request.path is not None:
                request.path[-1][0].writer = None
        elif state == WALKED:
            self._walked.remove(request)
        request.generated = request.length
        del self._running[request]
        self.pool.release(request, request.computed, request.prompt_tokens + request.length - 1, gone=True)

    # ---- the pipeline ---------------------------------------------------------------------------

    def start(self) -> Step | None:
        """Fill the pipeline and return the step that executes from now on.

        None when there is nothing to do. Raises LivelockError when there is, but can never run.
        """
        flight, queue = self._flight, self._queue
        while len(flight) < self._depth and (self._running or len(queue)):
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
        if self._running or len(self._queue):
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
        known = request.prompt_tokens + request.generated
        return known > self.pool.total * self._block_size

    def _livelock(self) -> LivelockError:
        request = self._queue.head() if len(self._queue) else next(iter(self._running))
        known = request.prompt_tokens + request.generated
        return LivelockError(
            request,
            -(-known // self._block_size),
            self.pool.total,
            f"its {known} tokens ({request.prompt_tokens} of prompt) do not fit and nothing else runs",
        )

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
            if step.tokens_out != decodes or step.batch.decode_seqs != decodes or step.rows or step.first:
                return 0
        if len(self._queue) and len(self._running) < self.config.max_num_seqs:
            if (
                self._queue.head() is not self._blocked
                or self.pool.free > self._blocked_free
                or decodes != self._blocked_decodes
            ):
                return 0
        heap, endings = self._ending_heap, self._endings
        while not endings.get(heap[0]):
            endings.pop(heapq.heappop(heap), None)
        steps = heap[0] - self._updated_steps
        free = self.pool.free
        if (steps // self._block_size + 1) * decodes <= free:
            return steps
        return self._steps_until_short(steps)

    def _steps_until_short(self, steps: int) -> int:
        """How many of the next `steps` steps get all their blocks."""
        size, free = self._block_size, self.pool.free
        rounds = min(free // self._decodes, steps // size)
        free -= rounds * self._decodes
        taken = rounds * size
        k = self._scheduled_steps + taken
        while taken < steps:
            free -= len(self._phases[k % size])
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
        return Batch(decodes, decodes, self._offsets + k * decodes, self._longest_context(k), (), decodes)

    def advance(self, steps: int) -> None:
        """Take `steps` steady steps at once; at most what `steady_steps` returned."""
        if steps <= 0:
            return
        size, decodes, k = self._block_size, self._decodes, self._scheduled_steps
        rounds, rest = divmod(steps, size)
        need = rounds * decodes
        for step in range(k, k + rest):
            need += len(self._phases[step % size])
        self.pool.take(need)
        self._scheduled_steps = k + steps
        self._updated_steps += steps
        if self._flight:
            old = self._flight[0].batch
            batch = Batch(
                decodes,
                decodes,
                old.decode_context_tokens + steps * decodes,
                old.decode_context_max + steps,
                (),
                decodes,
            )
            self._flight[0] = Step(k + steps - 1, batch, decodes)

    # ---- for comparison with another engine -----------------------------------------------------

    def scheduled_rows(self, step: Step) -> list[tuple[EngineRequest, int]]:
        """Who runs in a step with how many tokens; ask right after `schedule` returned it. O(batch)."""
        rows = {
            request: 1
            for request in self._running
            if request.state == DECODING and request.joined < step.index
        }
        rows.update(self._trace)
        return list(rows.items())

    def running_requests(self) -> list[EngineRequest]:
        """The running batch in vLLM's order. O(batch)."""
        return list(self._running)

    def waiting_requests(self) -> list[EngineRequest]:
        """The queue in the order in which it would be served. O(queue)."""
        return self._queue.in_order()
