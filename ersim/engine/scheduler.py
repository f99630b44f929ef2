"""vLLM's V1 scheduler as pure state, with work per step that does not grow with the batch.

The algorithm, as vLLM has it (text-only, one KV cache group, no speculation). Each call of
`schedule` has a budget of tokens. First the running requests, in the order in which they were
admitted, get what they can take: one token when decoding, a chunk of their prompt otherwise. Who
needs a KV block when none is free preempts the last (or least important) running request, which
loses all blocks and goes back to the head of the queue. Then, if nobody was preempted, the queue's
head is admitted as long as budget, max_num_seqs and free blocks last; cached blocks of its prefix
are taken over. `update` delivers one token to every row that has computed all it knows, ends those
that are done and frees their blocks. Asynchronous scheduling runs `schedule` one step ahead; a row
that ends by a stop token is then scheduled once in vain.

Decoding rows live in the bulk (bulk.py) and are not looked at; a step costs the walked rows, the
admissions and the endings that happen in it. Rare conditions cost more: a preemption and
scarce budget look at the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from ersim.engine.bulk import DecodeBulk, by_admission
from ersim.engine.config import EngineConfig
from ersim.engine.errors import RejectedRequest
from ersim.engine.queue import FcfsQueue, PriorityQueue, WaitingQueue
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
from ersim.util.vectors import i64

Row = tuple[EngineRequest, int]
"""A walked row and the tokens that it is given in a step."""


class Scheduler(DecodeBulk):
    """`add`, `abort`, `schedule` and `update`, as vLLM's engine core calls them."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._max_seqs = config.max_num_seqs
        self._max_tokens = config.max_num_batched_tokens
        self._caching = config.enable_prefix_caching
        self._chunked = config.enable_chunked_prefill
        self._reserve_full = config.scheduler_reserve_full_isl
        self._watermark_blocks = int(config.watermark * config.num_blocks)
        self._max_model_len = config.max_model_len
        self._long_prefill = config.long_prefill_token_threshold
        self._by_priority = config.policy == "priority"
        self._queue: WaitingQueue = PriorityQueue() if self._by_priority else FcfsQueue()
        self._arrivals = 0
        self._admissions = 0
        self._blocked: EngineRequest | None = None
        self._blocked_free = 0
        self._blocked_decodes = 0
        self._given: list[Row] | None = None
        self._admitted: list[EngineRequest] | None = None

    # ---- requests come and go -------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Put a request at its place in the queue.

        Raises RejectedRequest where vLLM's server answers HTTP 400: an empty prompt, a prompt that
        leaves no room in max_model_len, or less than one token to generate.
        """
        prompt, output, limit = request.prompt_tokens, request.output_tokens, request.max_tokens
        room = self._max_model_len - prompt
        if prompt < 1 or room < 1 or limit < 1 or output < 1:
            raise self._rejection(request)
        if request.state != NEW:
            raise bad_value("request", "one that no engine has seen", request)
        if limit > room:
            limit = room
        if output < limit:
            request.length, request.stop = output, "stop"
        else:
            request.length, request.stop = limit, "length"
        request.engine = self
        request.arrival = self._arrivals
        self._arrivals += 1
        request.state = WAITING
        if self._caching and (request.segments is not None or request.block_keys is not None):
            self._resolve(request)
        if self._queue.size <= 1:
            self._blocked = None  # the threshold does not bind a request that is alone
        self._queue.append(request)

    def _rejection(self, request: EngineRequest) -> RejectedRequest:
        if request.prompt_tokens < 1:
            return RejectedRequest(request, "empty_prompt", "the prompt is empty")
        if request.prompt_tokens >= self.config.max_model_len:
            detail = (
                f"its prompt of {request.prompt_tokens} tokens leaves no room in max_model_len "
                f"({self.config.max_model_len})"
            )
            return RejectedRequest(request, "prompt_too_long", detail)
        return RejectedRequest(request, "no_output", "it must generate at least one token")

    def _resolve(self, request: EngineRequest) -> None:
        """Find the request's place in the content trie; whoever writes there is walked from now on."""
        self.pool.resolve(request)
        for node, _, _ in request.path or ():
            if node.writer is not None:
                self._demote(node.writer)

    def abort(self, request: EngineRequest) -> None:
        """Forget a request wherever it is; tokens of it that are in flight are not delivered."""
        state = request.state
        if state in (NEW, FINISHED):
            return
        if state in (DECODING, GHOST):
            self._list_in_flight(request)
            self._make_explicit(request)
        for step in self._flight:
            if step.rows and request in step.rows:
                step.rows.remove(request)
                step.tokens_out -= 1
            if request in step.first:
                step.first = [other for other in step.first if other is not request]
        if state in (WAITING, PREEMPTED):
            self._queue.remove(request)
            self.pool.leave(request)
        else:
            if state == WALKED:
                self._walked.remove(request)
            del self._running[request]
            self.pool.release(request, request.computed, request.hashed_tokens, gone=True)
        self._blocked = None
        request.state = FINISHED
        request.finish_reason = "abort"

    def _make_explicit(self, request: EngineRequest) -> None:
        """Take a DECODING or GHOST row off the books of the bulk."""
        if request.state == DECODING:
            self._leave_bulk(request)
            return
        self._endings[request.finish_step].remove(request)
        request.generated = request.length - 1
        request.hashed_tokens = request.computed - (request.joined != request.finish_step)

    # ---- schedule: the running rows -------------------------------------------------------------

    def schedule(self) -> Step:
        """Choose what the next step runs; a step that runs something is in flight until `update`."""
        k = self._scheduled_steps
        pool = self.pool
        wasted = 0
        if self._async and k - 1 in self._endings:
            wasted = self._set_ghosts_aside(k - 1)
        need = int(self._needing[k % self._size])
        given: list[Row] | None = None
        preempted: Sequence[EngineRequest] = NOBODY
        if self._walked or need > pool.free or (self._async and self._decodes and not self._flight):
            given, preempted = self._schedule_running(k)
            if wasted:
                wasted = sum(row.state == DECODING for row in self._endings[k - 1])
        elif need:
            pool.free -= need
            pool.unhashed -= need
        decodes = self._decodes
        longest = self._longest_context(k) if decodes else 0
        step = Step(k, decodes, self._offsets + k * decodes, longest, decodes - wasted)
        self._scheduled_steps = k + 1
        self._given, self._admitted = given, None
        if given:
            self._account(step, given)
        if self._queue.size and len(self._running) < self._max_seqs and not preempted:
            self._admit(step)
        if preempted:
            step.preempted = preempted
        if step.tokens:
            self._flight.append(step)
        else:
            self._scheduled_steps = k
            step.index = -1
        return step

    def _schedule_running(self, k: int) -> tuple[list[Row], Sequence[EngineRequest]]:
        """Phase one when it needs a look: walked rows, too little budget, or too few blocks.

        Returns the walked rows with their tokens, and who was preempted.
        """
        if self._async and self._decodes and not self._flight:
            for request in [row for row in self._running if row.state == DECODING]:
                self._demote(request)  # the pipeline ran dry: no row has a token in flight
        size, pool = self._size, self.pool
        budget = self._max_tokens - self._decodes
        threshold = self._threshold()
        given: list[Row] = []
        need = int(self._needing[k % size])
        for request in self._walked:
            tokens = self._wanted(request, threshold)
            if tokens <= 0:
                continue
            if tokens > budget:
                # Somebody gets less than wanted, so order matters, unless it is the last of all.
                if budget <= 0 or request is not next(reversed(self._running)):
                    return self._walk_all(threshold)
                tokens = budget
            budget -= tokens
            computed = request.computed
            need += -(-(computed + tokens) // size) + (-computed // size)
            given.append((request, tokens))
        if need > pool.free:
            if self._by_priority:
                return self._walk_all(threshold)
            return self._walk_needy(k, given)
        pool.take(need)
        for request, tokens in given:
            self._note_hashed(request, tokens)
        return given, NOBODY

    def _threshold(self) -> int:
        """long_prefill_token_threshold, which does not bind a request that is alone."""
        threshold = self._long_prefill
        return threshold if threshold and len(self._running) + self._queue.size > 1 else 0

    def _wanted(self, request: EngineRequest, threshold: int) -> int:
        """Tokens that a walked row would take from an endless budget."""
        computed, in_flight = request.computed, request.placeholders
        prompt = request.prompt_tokens
        if in_flight and computed + 2 - in_flight >= prompt + request.max_tokens:
            return 0  # the token in flight is its last one
        tokens = prompt + request.generated + in_flight - computed
        if 0 < threshold < tokens:
            tokens = threshold
        room = self._max_model_len - computed - 1
        return tokens if tokens < room else room

    def _note_hashed(self, request: EngineRequest, tokens: int) -> None:
        """A walked row was given blocks for `tokens` more: those it knows all tokens of can be found."""
        known = request.prompt_tokens + request.generated
        hashed = request.computed + tokens
        if hashed > known:
            hashed = known
        if hashed > request.hashed_tokens:
            request.hashed_tokens = hashed
            if request.path:
                self.pool.cache(request, hashed)

    def _walk_needy(self, k: int, walked: list[Row]) -> tuple[list[Row], Sequence[EngineRequest]]:
        """Too few blocks under FCFS: serve those who need one in order, preempting from the end."""
        size, pool = self._size, self.pool
        needy = self._rows_at_a_boundary(k)
        if walked:
            needy += walked
            needy.sort(key=lambda row: row[0].admission)
        preempted: list[EngineRequest] = []
        given: list[Row] = []
        for request, tokens in needy:
            if request.state == PREEMPTED:
                break  # and so is everybody behind
            in_bulk = request.state == DECODING
            computed = request.computed
            need = 1 if in_bulk else -(-(computed + tokens) // size) + (-computed // size)
            while need > pool.free:
                victim = next(reversed(self._running))
                self._preempt(victim, 0)
                preempted.append(victim)
                if victim is request:
                    return given, preempted
            pool.take(need)
            if not in_bulk:
                self._note_hashed(request, tokens)
                given.append((request, tokens))
        return given, preempted

    def _rows_at_a_boundary(self, k: i64) -> list[Row]:
        """The rows of the bulk that need a block in step k, in the order of admission, as `_running` is."""
        size: i64 = self._size
        needy: list[Row] = []
        for request in self._running:
            if request.state == DECODING:
                offset: i64 = request.offset
                if (offset + k) % size == 0:
                    needy.append((request, 1))
        return needy

    def _walk_all(self, threshold: int) -> tuple[list[Row], Sequence[EngineRequest]]:
        """Phase one row by row, as vLLM has it: for scarce budget, and for scarce blocks by priority."""
        size, pool = self._size, self.pool
        budget = self._max_tokens
        given: dict[EngineRequest, int] = {}
        preempted: list[EngineRequest] = []
        over = False
        for request in list(self._running):
            state = request.state
            if state in (PREEMPTED, GHOST):
                continue
            if over or budget <= 0:
                if state == DECODING:
                    self._demote(request)
                continue
            if state == DECODING:
                tokens, computed = 1, request.offset + self._scheduled_steps
            else:
                tokens, computed = min(self._wanted(request, threshold), budget), request.computed
                if tokens <= 0:
                    continue
            need = -(-(computed + tokens) // size) + (-computed // size)
            while need > pool.free and not over:
                victim = self._victim()
                returned = given.pop(victim, 0)
                budget += returned
                self._preempt(victim, returned)
                preempted.append(victim)
                over = victim is request
            if over:
                continue
            pool.take(need)
            if state == WALKED:
                self._note_hashed(request, tokens)
            given[request] = tokens
            budget -= tokens
        return [row for row in given.items() if row[0].state == WALKED], preempted

    def _victim(self) -> EngineRequest:
        """Whom vLLM preempts: the last admitted, or the least important and latest."""
        if self._by_priority:
            return max(self._running, key=lambda row: (row.priority, row.arrival))
        return next(reversed(self._running))

    def _preempt(self, request: EngineRequest, tokens: int) -> None:
        """Take all blocks from a running request that was already given `tokens` in this call."""
        if request.state == WALKED:
            self._walked.remove(request)
        else:
            self._list_in_flight(request)
            self._make_explicit(request)
        hashed = request.hashed_tokens
        if tokens:
            known = request.prompt_tokens + request.generated
            hashed = max(hashed, min(request.computed + tokens, known))
        self.pool.release(request, request.computed + tokens, hashed, gone=False)
        del self._running[request]
        request.state = PREEMPTED
        request.computed = 0
        request.placeholders = 0
        request.preemptions += 1
        self._blocked = None
        self._queue.push_front(request)

    # ---- schedule: the queue --------------------------------------------------------------------

    def _admit(self, step: Step) -> None:
        """Phase two: take requests from the queue's head into the batch."""
        pool, queue, running, size = self.pool, self._queue, self._running, self._size
        request = queue.head()
        if request is self._blocked and not self._may_unblock():
            return
        threshold = self._threshold()
        budget = self._max_tokens - step.tokens
        admitted: list[EngineRequest] = []
        chunks: list[tuple[int, int]] = []
        while budget > 0:
            known = request.prompt_tokens + request.generated
            available = pool.free
            if request.path:
                hits, hit_blocks, evictable = pool.lookup(request.path, (known - 1) // size)
                available -= evictable
                computed = hit_blocks * size
            else:
                hit_blocks = computed = 0
            tokens = known - computed
            if 0 < threshold < tokens:
                tokens = threshold
            if tokens > budget:
                if not self._chunked:
                    break
                tokens = budget
            if running:
                available -= self._watermark_blocks
            need = -(-(computed + tokens) // size) - hit_blocks
            if need > available or (self._reserve_full and -(-known // size) - hit_blocks > available):
                self._block_on(request)
                break
            queue.pop_head()
            if hit_blocks:
                pool.acquire(request, hits)
                request.hashed_blocks = hit_blocks
            if not request.preemptions:
                request.cached_tokens = computed
            pool.free -= need
            pool.unhashed -= need
            running[request] = None
            request.admission = self._admissions
            self._admissions += 1
            chunks.append((tokens, computed))
            admitted.append(request)
            budget -= tokens
            computed += tokens
            request.computed = request.hashed_tokens = computed
            if request.path:
                pool.cache(request, computed)
            if computed < known:
                request.state = WALKED
                request.prefilling = True
                self._walked.append(request)
            else:
                self._emit_first(step, request)
            if not queue.size or len(running) >= self._max_seqs:
                break
            request = queue.head()
        if admitted:
            step.tokens = self._max_tokens - budget
            step.prefills = [*step.prefills, *chunks] if step.prefills else chunks
            self._tell_admitted(step, admitted)

    def _emit_first(self, step: Step, request: EngineRequest) -> None:
        """A request was admitted and prefilled in one step: it emits, and decodes from the next step on."""
        step.sampled_seqs += 1
        step.tokens_out += 1
        if not request.generated:
            if step.first:
                step.first.append(request)  # type: ignore[attr-defined]
            else:
                step.first = [request]
        if request.answer is None or request.answer.users == 1:
            self._join_bulk(request, step.index)
            return
        request.state = WALKED
        request.prefilling = False
        request.placeholders = int(self._async)
        self._walked.append(request)
        if step.rows is None:
            step.rows = []
        step.rows.append(request)

    def _tell_admitted(self, step: Step, admitted: list[EngineRequest]) -> None:
        self._admitted = step.admitted = admitted
        for request in admitted:
            if request.preemptions:
                step.resumed = [request for request in admitted if request.preemptions]
                step.admitted = [request for request in admitted if not request.preemptions]
                break

    def _block_on(self, request: EngineRequest) -> None:
        """Remember why the head did not get in."""
        self._blocked = request
        self._blocked_free = self.pool.free
        self._blocked_decodes = self._decodes

    def _may_unblock(self) -> bool:
        """Whether anything happened since `_block_on` that could let the same head in.

        Free blocks shrink while nobody leaves, and blocks of its prefix only turn from cached to
        lost; walked rows may add to its prefix.
        """
        return (
            self.pool.free > self._blocked_free
            or self._decodes != self._blocked_decodes
            or bool(self._walked)
            or bool(self._given)
        )

    def _account(self, step: Step, given: list[Row]) -> None:
        """Advance the walked rows of a step, and let those that decode from now on run by themselves."""
        prefills: list[tuple[int, int]] = []
        first: list[EngineRequest] = []
        joined = False
        for request, tokens in given:
            computed, in_flight = request.computed, request.placeholders
            step.tokens += tokens
            if request.prefilling:
                prefills.append((tokens, computed))
            else:
                step.decode_seqs += 1
                step.decode_context_tokens += computed
                if computed > step.decode_context_max:
                    step.decode_context_max = computed
            request.computed = computed = computed + tokens
            expected = request.generated + in_flight
            if computed < request.prompt_tokens + expected:
                continue
            request.prefilling = False
            step.sampled_seqs += 1
            if not expected:
                first.append(request)
            if expected < request.length:
                step.tokens_out += 1
                if request.answer is None or request.answer.users == 1:
                    if in_flight:
                        self._flight[-1].rows.remove(request)  # type: ignore[union-attr]
                    self._join_bulk(request, step.index - in_flight)
                    joined = True
                    continue
                if step.rows is None:
                    step.rows = []
                step.rows.append(request)
            if self._async:
                request.placeholders = in_flight + 1
        step.prefills = prefills
        if first:
            step.first = first
        if joined:
            self._walked = [request for request in self._walked if request.state == WALKED]

    # ---- update ---------------------------------------------------------------------------------

    def update(self, step: Step) -> None:
        """Apply the outputs of the oldest step in flight: count tokens, end requests, free blocks."""
        k = step.index
        if k < 0:
            return
        if not self._flight or self._flight[0] is not step:
            raise bad_value("step", "the oldest one in flight", k)
        self._flight.pop(0)
        self._updated_steps = k + 1
        finished = self._count_tokens(step.rows) if step.rows else None
        if k in self._endings:
            ending = self._endings.pop(k)
            steps = self._ending_steps
            while steps.size and steps.key() <= k:
                steps.pop()
            finished = finished + ending if finished else ending
        if finished:
            if len(finished) > 1:
                finished.sort(key=by_admission)
            for request in finished:
                self._finish(request)
            step.finished = finished
            self._blocked = None

    def _count_tokens(self, rows: list[EngineRequest]) -> list[EngineRequest]:
        """Give one token to each row outside the bulk (also to preempted ones); return who is done."""
        finished = []
        rows.sort(key=by_admission)
        for request in rows:
            request.generated += 1
            if self._async and request.state == WALKED:
                request.placeholders -= 1
                hashed = request.computed - request.placeholders
                if hashed > request.hashed_tokens:
                    request.hashed_tokens = hashed
                    if request.path:
                        self.pool.cache(request, hashed)
            if request.generated >= request.length:
                finished.append(request)
        return finished

    def _finish(self, request: EngineRequest) -> None:
        state = request.state
        if state == PREEMPTED:
            self._queue.remove(request)
            self.pool.leave(request)
        else:
            if state == DECODING:
                self._drop_from_bulk(request)
            elif state == WALKED:
                self._walked.remove(request)
            del self._running[request]
            hashed = request.prompt_tokens + request.length - 1
            if request.path is None:
                self.pool.release_private(request.computed, hashed)
            else:
                self.pool.release(request, request.computed, hashed, gone=True)
        request.generated = request.length
        request.finish_reason = request.stop
        request.state = FINISHED
