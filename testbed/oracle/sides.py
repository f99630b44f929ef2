"""One face for every scheduler under comparison, and the loop that drives two of them in step.

The loop is that of vLLM's engine core: synchronous, or with a queue of two batches when scheduling
is asynchronous (v1/engine/core.py, `step` and `step_with_batch_queue` of the release named in
`ersim.engine.VLLM_VERSION`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ersim.engine import Engine, EngineConfig, EngineRequest, Step
from testbed.oracle.cases import Case, Event, RequestSpec

Observation = dict[str, Any]
"""What a call made of the scheduler, in plain values: equal observations mean equal behaviour."""

MAX_CALLS = 1500
"""Calls after which a case is cut: without reserve_full_isl, a request that outgrows the whole KV cache
preempts and recomputes itself for ever, in vLLM as here."""

IDLE_CALLS = 12
"""Empty calls in a row after which a queue counts as stuck for ever, when no event is to come."""


class Side(Protocol):
    """A scheduler under comparison."""

    def add(self, spec: RequestSpec) -> None:
        """A request arrives."""

    def abort(self, request_id: int) -> None:
        """A request is given up by its client; unknown and finished ids are ignored."""

    def schedule(self) -> Observation:
        """Choose the next step and put it behind those in flight."""

    def update(self) -> Observation:
        """Apply the outputs of the oldest step in flight."""

    def has_requests(self) -> bool:
        """Whether anything runs or waits."""


class ErsimSide:
    """`ersim.engine.Engine`, or an engine with the same face, as a side."""

    def __init__(self, config: EngineConfig, engine: Callable[[EngineConfig], Engine] = Engine) -> None:
        self.engine = engine(config)
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

    def schedule(self) -> Observation:
        step = self.engine.schedule()
        self.flight.append(step)
        batch = step.batch
        rows = sorted((request.request_id, tokens) for request, tokens in self.engine.scheduled_rows(step))
        return self._state() | {
            "scheduled": rows,
            "tokens": batch.tokens,
            "admitted": [request.request_id for request in step.admitted],
            "resumed": [request.request_id for request in step.resumed],
            "preempted": sorted(request.request_id for request in step.preempted),
            "sampled": batch.sampled_seqs,
            "prefills": sorted(batch.prefills),
            "decodes": (batch.decode_seqs, batch.decode_context_tokens, batch.decode_context_max),
        }

    def update(self) -> Observation:
        step = self.flight.popleft()
        self.engine.update(step)
        return self._state() | {
            "finished": sorted((r.request_id, r.finish_reason) for r in step.finished),
            "tokens_out": step.tokens_out,
            "first": sorted(request.request_id for request in step.first),
        }

    def _state(self) -> Observation:
        return {
            "running": [
                (r.request_id, r.computed_tokens, r.generated_tokens) for r in self.engine.running_requests()
            ],
            "waiting": [(r.request_id, r.generated_tokens) for r in self.engine.waiting_requests()],
            "free_blocks": self.engine.blocks_total - self.engine.blocks_used,
        }


@dataclass(slots=True)
class Difference:
    """The first call in which two sides differ, with both observations."""

    call: int
    kind: str
    left: Observation
    right: Observation

    def describe(self) -> str:
        """Only the fields that differ, one side under the other."""
        lines = [f"first difference in call {self.call} ({self.kind}):"]
        for name in self.left:
            if self.left[name] != self.right[name]:
                lines += [f"  {name}", f"    left  {self.left[name]}", f"    right {self.right[name]}"]
        lines += ["whole state", f"  left  {self.left}", f"  right {self.right}"]
        return "\n".join(lines)


def valid_for(spec: RequestSpec, config: EngineConfig) -> bool:
    """Whether vLLM's server would let the request in at all (else HTTP 400)."""
    return 0 < spec.prompt_tokens < config.max_model_len and spec.max_tokens > 0 and spec.output_tokens > 0


def compare(case: Case, left: Side, right: Side, depth: int | None = None) -> tuple[int, Difference | None]:
    """Drive both sides through a case; returns the steps compared and the first difference, if any.

    depth: batches in flight, by default as the engine core has it.
    """
    depth = depth or (2 if case.config.async_scheduling else 1)
    pending = deque(case.events)
    steps = calls = in_flight = idle = 0
    admitted: set[int] = set()

    def apply(events: Iterator[Event]) -> None:
        for event in events:
            if event.add is not None and valid_for(event.add, case.config):
                admitted.add(event.add.request_id)
                left.add(event.add)
                right.add(event.add)
            elif event.abort is not None and event.abort in admitted:
                left.abort(event.abort)
                right.abort(event.abort)

    def due(before_update: bool) -> Iterator[Event]:
        while pending and (pending[0].call < calls or (pending[0].call == calls)):
            if pending[0].call == calls and pending[0].before_update and not before_update:
                return
            yield pending.popleft()

    while calls < MAX_CALLS:
        apply(due(False))
        if left.has_requests():
            ours, theirs = left.schedule(), right.schedule()
            in_flight += 1
            if (difference := _differ(calls, "schedule", ours, theirs)) is not None:
                return steps, difference
            steps += bool(ours["tokens"])
            idle = 0 if ours["tokens"] else idle + 1
            calls += 1
            if in_flight < depth and (ours["tokens"] or left.has_requests()) and idle <= IDLE_CALLS:
                continue
        elif not in_flight:
            if not pending:
                return steps, None
            calls = max(calls, pending[0].call) + 1
            continue
        apply(due(True))
        ours, theirs = left.update(), right.update()
        in_flight -= 1
        if (difference := _differ(calls, "update", ours, theirs)) is not None:
            return steps, difference
        if idle > IDLE_CALLS:
            while in_flight:  # only empty steps are left
                left.update()
                right.update()
                in_flight -= 1
            if not pending:
                return steps, None
            calls = max(calls, pending[0].call) + 1
            idle = 0
    return steps, None


def _differ(call: int, kind: str, left: Observation, right: Observation) -> Difference | None:
    shared = left.keys() & right.keys()
    ours = {name: left[name] for name in left if name in shared}
    theirs = {name: right[name] for name in left if name in shared}
    return None if ours == theirs else Difference(call, kind, ours, theirs)
