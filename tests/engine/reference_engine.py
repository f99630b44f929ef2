"""The engine again, written the slow and obvious way: every step walks the whole batch.

One Python object per KV block and per running row, one loop over the rows in every step, block
content identified by interned chains of token identities. Nothing here is clever; the fast engine
must equal it step by step, and the oracle compares both with vLLM's own scheduler.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from ersim.engine import EngineConfig, EngineRequest, RejectedRequest
from ersim.engine.step import Step
from testbed.oracle.cases import RequestSpec

Key = int


@dataclass(eq=False)
class Block:
    """One physical KV block; hash_key is set while its content can be found in the prefix cache."""

    ref_count: int = 0
    hash_key: Key | None = None


class BlockPool:
    """Free blocks in eviction order (front first) and the map from content to blocks."""

    def __init__(self, num_blocks: int, caching: bool) -> None:
        self.caching = caching
        self.free: OrderedDict[Block, None] = OrderedDict((Block(), None) for _ in range(num_blocks - 1))
        self.cached: dict[Key, dict[Block, None]] = {}

    def find(self, key: Key) -> Block | None:
        blocks = self.cached.get(key)
        return next(iter(blocks)) if blocks else None

    def touch(self, blocks: list[Block]) -> None:
        for block in blocks:
            if block.ref_count == 0:
                del self.free[block]
            block.ref_count += 1

    def take(self, count: int) -> list[Block]:
        taken = []
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            if block.hash_key is not None:
                blocks = self.cached[block.hash_key]
                del blocks[block]
                if not blocks:
                    del self.cached[block.hash_key]
                block.hash_key = None
            block.ref_count = 1
            taken.append(block)
        return taken

    def put_hash(self, block: Block, key: Key) -> None:
        assert block.hash_key is None
        block.hash_key = key
        self.cached.setdefault(key, {})[block] = None

    def release(self, blocks: list[Block]) -> None:
        """Free a request's blocks, tail first; unhashed ones go to the front of the free list."""
        front = []
        for block in reversed(blocks):
            block.ref_count -= 1
            assert block.ref_count >= 0
            if block.ref_count == 0:
                if block.hash_key is None:
                    front.append(block)
                else:
                    self.free[block] = None
        for block in reversed(front):
            self.free[block] = None
            self.free.move_to_end(block, last=False)


@dataclass(eq=False)
class Row:
    """Scheduler state of one request, under vLLM's names where it has them."""

    request: EngineRequest
    arrival: int
    limit: int
    length: int
    stop: str
    status: str = "waiting"
    generated: int = 0
    computed: int = 0
    placeholders: int = 0
    in_flight: int = 0
    stale: int = 0
    is_prefill_chunk: bool = False
    blocks: list[Block] = field(default_factory=list)
    hashed_blocks: int = 0
    keys: list[Key] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.request.prompt_tokens + self.generated

    def order(self) -> tuple[int, int]:
        return (self.request.priority, self.arrival)


class ReferenceEngine:
    """vLLM's V1 scheduler for text-only models, one explicit row at a time."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.enable_prefix_caching)
        self.watermark_blocks = int(config.watermark * config.num_blocks)
        self.running_rows: list[Row] = []
        self.waiting_rows: Any = [] if config.policy == "priority" else deque()
        self.rows: dict[EngineRequest, Row] = {}
        self.arrivals = 0
        self.steps = 0
        self.interned: dict[tuple[Any, ...], Key] = {}

    # ---- requests -------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        config = self.config
        if request.prompt_tokens < 1:
            raise RejectedRequest(request, "empty_prompt", "the prompt is empty")
        if request.prompt_tokens >= config.max_model_len:
            raise RejectedRequest(request, "prompt_too_long", "the prompt fills max_model_len")
        if request.max_tokens < 1 or request.output_tokens < 1:
            raise RejectedRequest(request, "no_output", "max_tokens must be at least 1")
        limit = min(request.max_tokens, config.max_model_len - request.prompt_tokens)
        length = min(request.output_tokens, limit)
        stop = "stop" if request.output_tokens < limit else "length"
        row = Row(request, self.arrivals, limit, length, stop)
        self.arrivals += 1
        self.rows[request] = row
        self._push_waiting(row, front=False)

    def abort(self, request: EngineRequest) -> None:
        row = self.rows.get(request)
        if row is None:
            return
        if row.status == "running":
            self.running_rows.remove(row)
        else:
            self._remove_waiting(row)
        request.finish_reason = "abort"
        self._free(row)

    def _push_waiting(self, row: Row, front: bool) -> None:
        if self.config.policy == "priority":
            heapq.heappush(self.waiting_rows, (*row.order(), row))
        elif front:
            self.waiting_rows.appendleft(row)
        else:
            self.waiting_rows.append(row)

    def _peek_waiting(self) -> Row:
        head = self.waiting_rows[0]
        return head[2] if self.config.policy == "priority" else head

    def _pop_waiting(self) -> None:
        if self.config.policy == "priority":
            heapq.heappop(self.waiting_rows)
        else:
            self.waiting_rows.popleft()

    def _remove_waiting(self, row: Row) -> None:
        if self.config.policy == "priority":
            self.waiting_rows.remove((*row.order(), row))
            heapq.heapify(self.waiting_rows)
        else:
            self.waiting_rows.remove(row)

    def _free(self, row: Row) -> None:
        row.status = "finished"
        self.pool.release(row.blocks)
        row.blocks = []
        del self.rows[row.request]

    # ---- content --------------------------------------------------------------------------------

    def _token_runs(self, row: Row) -> list[tuple[Any, int]]:
        request = row.request
        if request.segments is None:
            runs: list[tuple[Any, int]] = [(("private prompt", row.arrival), request.prompt_tokens)]
        else:
            runs = [(segment.content_id, segment.tokens) for segment in request.segments]
        answer = request.output_content_id
        runs.append((("private answer", row.arrival) if answer is None else answer, 1 << 60))
        return runs

    def _block_content(self, row: Row, index: int) -> tuple[Any, ...]:
        keys = row.request.block_keys
        if keys is not None and index < len(keys):
            return ("key", keys[index])
        start, end = index * self.config.block_size, (index + 1) * self.config.block_size
        pieces, position = [], 0
        for content, tokens in self._token_runs(row):
            low, high = max(start, position), min(end, position + tokens)
            if low < high:
                pieces.append((content, low - position, high - low))
            position += tokens
            if position >= end:
                break
        return tuple(pieces)

    def _key(self, row: Row, index: int) -> Key:
        while len(row.keys) <= index:
            at = len(row.keys)
            parent = row.keys[-1] if at else -1
            chained = (parent, self._block_content(row, at))
            row.keys.append(self.interned.setdefault(chained, len(self.interned)))
        return row.keys[index]

    def _find_hit(self, row: Row) -> list[Block]:
        hit: list[Block] = []
        if self.pool.caching:
            for index in range((row.num_tokens - 1) // self.config.block_size):
                block = self.pool.find(self._key(row, index))
                if block is None:
                    break
                hit.append(block)
        return hit

    def _cache(self, row: Row, tokens: int) -> None:
        if self.pool.caching:
            for index in range(row.hashed_blocks, tokens // self.config.block_size):
                self.pool.put_hash(row.blocks[index], self._key(row, index))
                row.hashed_blocks = index + 1

    # ---- schedule -------------------------------------------------------------------------------

    def _allocate(self, row: Row, tokens: int, hit: list[Block], admitting: bool) -> bool:
        size = self.config.block_size
        computed = row.computed + len(hit) * size
        held = len(row.blocks) + len(hit)
        evictable = sum(block.ref_count == 0 for block in hit)
        reserve = self.watermark_blocks if admitting and self.running_rows else 0
        if admitting and self.config.scheduler_reserve_full_isl:
            whole = -(-min(row.num_tokens, self.config.max_model_len) // size)
            if max(whole - held, 0) + evictable + reserve > len(self.pool.free):
                return False
        slots = min(computed + tokens, self.config.max_model_len)
        need = max(-(-slots // size) - held, 0)
        if need + evictable + reserve > len(self.pool.free):
            return False
        if admitting:
            self.pool.touch(hit)
            row.blocks = list(hit)
            row.hashed_blocks = len(hit)
        row.blocks += self.pool.take(need)
        self._cache(row, min(computed + tokens, row.num_tokens))
        return True

    def schedule(self) -> Step:
        config = self.config
        scheduled: dict[Row, int] = {}
        preempted: list[Row] = []
        budget = config.max_num_batched_tokens
        threshold = config.long_prefill_token_threshold
        if len(self.running_rows) + len(self.waiting_rows) <= 1:
            threshold = 0
        index = 0
        while index < len(self.running_rows) and budget > 0:
            row = self.running_rows[index]
            if (
                row.placeholders > 0
                and row.computed + 2 - row.placeholders >= row.request.prompt_tokens + row.request.max_tokens
            ):
                index += 1
                continue
            tokens = row.num_tokens + row.placeholders - row.computed
            if 0 < threshold < tokens:
                tokens = threshold
            tokens = min(tokens, budget, config.max_model_len - row.computed - 1)
            if tokens == 0:
                index += 1
                continue
            gave_up = False
            while not self._allocate(row, tokens, [], admitting=False):
                if config.policy == "priority":
                    victim = max(self.running_rows, key=Row.order)
                    position = self.running_rows.index(victim)
                    del self.running_rows[position]
                    if position < index:
                        index -= 1
                    budget += scheduled.pop(victim, 0)
                else:
                    victim = self.running_rows.pop()
                self._preempt(victim)
                preempted.append(victim)
                if victim is row:
                    gave_up = True
                    break
            if gave_up:
                break
            scheduled[row] = tokens
            budget -= tokens
            index += 1
        decodes = {row for row in scheduled if not row.is_prefill_chunk}
        admitted: list[Row] = []
        resumed: list[Row] = []
        if not preempted:
            self._schedule_waiting(scheduled, budget, threshold, admitted, resumed)
        return self._finish_schedule(scheduled, decodes, admitted, resumed, preempted)

    def _schedule_waiting(
        self, scheduled: dict[Row, int], budget: int, threshold: int, admitted: list[Row], resumed: list[Row]
    ) -> None:
        config = self.config
        while budget > 0 and self.waiting_rows and len(self.running_rows) < config.max_num_seqs:
            row = self._peek_waiting()
            assert row.stale == 0
            hit = self._find_hit(row)
            computed = len(hit) * config.block_size
            tokens = row.num_tokens - computed
            if 0 < threshold < tokens:
                tokens = threshold
            if not config.enable_chunked_prefill and tokens > budget:
                break
            tokens = min(tokens, budget)
            if row.request.preemptions == 0:
                row.request.cached_tokens = computed
            if not self._allocate(row, tokens, hit, admitting=True):
                break
            self._pop_waiting()
            self.running_rows.append(row)
            (admitted if row.status == "waiting" else resumed).append(row)
            row.status = "running"
            row.computed = computed
            scheduled[row] = tokens
            budget -= tokens

    def _preempt(self, row: Row) -> None:
        self.pool.release(row.blocks)
        row.blocks = []
        row.hashed_blocks = 0
        row.status = "preempted"
        row.computed = 0
        row.stale = row.in_flight
        row.placeholders = 0
        row.request.preemptions += 1
        self._push_waiting(row, front=True)

    def _finish_schedule(
        self,
        scheduled: dict[Row, int],
        decodes: set[Row],
        admitted: list[Row],
        resumed: list[Row],
        preempted: list[Row],
    ) -> Step:
        first = []
        sampled = 0
        prefills = [(tokens, row.computed) for row, tokens in scheduled.items() if row not in decodes]
        contexts = [row.computed for row in scheduled if row in decodes]
        emitting: dict[Row, bool] = {}
        for row, tokens in scheduled.items():
            row.computed += tokens
            row.in_flight += tokens
            row.is_prefill_chunk = row.computed < row.num_tokens + row.placeholders
            emitting[row] = not row.is_prefill_chunk
            if not row.is_prefill_chunk:
                sampled += 1
                if row.generated + row.placeholders == 0:
                    first.append(row)
                if self.config.async_scheduling:
                    row.placeholders += 1
        index = self.steps if scheduled else -1
        step = Step(index, len(contexts), sum(contexts), max(contexts, default=0), 0)
        step.tokens, step.prefills, step.sampled_seqs = sum(scheduled.values()), prefills, sampled
        self.steps += bool(scheduled)
        step.admitted = [row.request for row in admitted]
        step.resumed = [row.request for row in resumed]
        step.preempted = [row.request for row in preempted]
        step.first = [row.request for row in first]
        step.rows = [(row, tokens, emitting[row]) for row, tokens in scheduled.items()]
        return step

    # ---- update ---------------------------------------------------------------------------------

    def update(self, step: Step) -> None:
        finished = []
        for row, tokens, emits in step.rows:  # type: ignore[attr-defined]
            row.in_flight -= tokens
            stale = row.stale > 0
            if stale:
                row.stale -= tokens
            if row.status == "finished" or not emits:
                continue
            was_running = row.status == "running"
            row.generated += 1
            step.tokens_out += 1
            if self.config.async_scheduling and not stale:
                row.placeholders -= 1
            if self.config.async_scheduling and was_running:
                self._cache(row, row.computed - row.placeholders)
            if row.generated >= row.length:
                row.request.finish_reason = row.stop
                finished.append(row.request)
                if was_running:
                    self.running_rows.remove(row)
                else:
                    self._remove_waiting(row)
                self._free(row)
        step.finished = finished
        step.first = [r for r in step.first if r.finish_reason != "abort"]

    # ---- what the comparison reads --------------------------------------------------------------

    @property
    def running(self) -> int:
        return len(self.running_rows)

    @property
    def waiting(self) -> int:
        return len(self.waiting_rows)

    @property
    def blocks_total(self) -> int:
        return self.config.num_blocks - 1

    @property
    def blocks_used(self) -> int:
        return self.blocks_total - len(self.pool.free)


class ReferenceSide:
    """The reference engine as a side of `testbed.oracle.sides.compare`."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = ReferenceEngine(config)
        self.flight: deque[Step] = deque()
        self.requests: dict[int, EngineRequest] = {}

    def add(self, spec: RequestSpec) -> None:
        request = EngineRequest(
            spec.request_id,
            spec.prompt_tokens,
            spec.output_tokens,
            spec.max_tokens,
            spec.priority,
            spec.segments,
            spec.output_content_id,
        )
        self.requests[spec.request_id] = request
        self.engine.add(request)

    def abort(self, request_id: int) -> None:
        self.engine.abort(self.requests[request_id])

    def has_requests(self) -> bool:
        return bool(self.engine.running or self.engine.waiting)

    def schedule(self) -> dict[str, Any]:
        step = self.engine.schedule()
        self.flight.append(step)
        batch = step.batch
        return self._state() | {
            "scheduled": sorted((row.request.request_id, tokens) for row, tokens, _ in step.rows),
            "tokens": batch.tokens,
            "admitted": [request.request_id for request in step.admitted],
            "resumed": [request.request_id for request in step.resumed],
            "preempted": sorted(request.request_id for request in step.preempted),
            "sampled": batch.sampled_seqs,
            "prefills": sorted(batch.prefills),
            "decodes": (batch.decode_seqs, batch.decode_context_tokens, batch.decode_context_max),
        }

    def update(self) -> dict[str, Any]:
        step = self.flight.popleft()
        self.engine.update(step)
        return self._state() | {
            "finished": sorted((r.request_id, r.finish_reason) for r in step.finished),
            "tokens_out": step.tokens_out,
            "first": sorted(request.request_id for request in step.first),
        }

    def _state(self) -> dict[str, Any]:
        engine = self.engine
        queue = engine.waiting_rows
        order = [entry[2] for entry in sorted(queue)] if engine.config.policy == "priority" else list(queue)
        return {
            "running": [(row.request.request_id, row.computed, row.generated) for row in engine.running_rows],
            "waiting": [(row.request.request_id, row.generated) for row in order],
            "free_blocks": len(engine.pool.free),
        }
