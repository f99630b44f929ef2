"""Replays a recorded server through `ersim.engine`: same arrivals, same step moments, same steps?

The recorded times decide when requests arrive, steps are scheduled and outputs are applied; the
engine decides what runs. A wrong scheduler shows here, whatever the clock; where this agrees and a
prediction is off, the clock (the step-time model) is to blame.

A step is identical when all is that the recorder writes of it: every row that is no plain decode row, by
request; of those that are, which requests they are (where the log says so), number, contexts and largest
context; the requests that run and wait after `schedule`, KV blocks in use, who was preempted, the prefix hits
of new requests, and how many tokens came out at its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from ersim.engine import Engine, EngineConfig, EngineRequest, LivelockError, Step
from testbed.step_log import LoggedRequest, LoggedStep, StepLog

_ARRIVES, _ABORTED, _UPDATED, _SCHEDULED = range(4)


@dataclass(frozen=True)
class Replay:
    """How many of the recorded steps the engine made as they were; the first that differs."""

    steps: int
    identical: int
    first_difference: str | None

    @property
    def share(self) -> float | None:
        """Identical steps over all steps; None for a log without steps, which shows nothing."""
        return self.identical / self.steps if self.steps else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for summaries."""
        return {
            "steps": self.steps,
            "identical": self.identical,
            "share": None if self.share is None else round(self.share, 6),
            "first_difference": self.first_difference,
        }


def recorded_config(meta: Mapping[str, Any]) -> EngineConfig:
    """The engine's configuration as the recorder wrote it down."""
    names = (
        "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "num_blocks",
        "enable_chunked_prefill", "enable_prefix_caching", "long_prefill_token_threshold", "policy",
        "watermark", "scheduler_reserve_full_isl", "async_scheduling",
    )  # fmt: skip
    return EngineConfig(**{name: meta[name] for name in names})


def _request(logged: LoggedRequest) -> EngineRequest:
    """A recorded request; what was aborted or still ran counts as long as it was allowed to be."""
    finished = logged.status is not None and "ABORT" not in logged.status
    hashes = logged.final_hashes or logged.prompt_hashes
    return EngineRequest(
        logged.index,
        logged.prompt_tokens,
        logged.output_tokens if finished and logged.output_tokens else logged.max_tokens,
        logged.max_tokens,
        logged.priority,
        block_keys=[int(block_hash, 16) for block_hash in hashes],
    )


def _events(log: StepLog, steps: Sequence[LoggedStep]) -> list[tuple[float, int, int]]:
    """(moment, kind, index) in order of time."""
    events: list[tuple[float, int, int]] = []
    for request in log.requests.values():
        events.append((request.added_s, _ARRIVES, request.index))
        if request.finished_s is not None and "ABORT" in (request.status or ""):
            events.append((request.finished_s, _ABORTED, request.index))
    for number, step in enumerate(steps):
        events.append((step.schedule_s, _SCHEDULED, number))
        events.append((step.update_s, _UPDATED, number))
    return sorted(events)


Facts = Mapping[str, Any]
"""What is compared of a step, by name, in plain values."""


def _recorded(step: LoggedStep) -> Facts:
    """What the recorder wrote of a step's `schedule`."""
    known = {} if step.decoding is None else {"decoding": [*step.decoding]}
    return known | {
        "other rows": sorted(dataclasses.astuple(row) for row in step.rows),
        "decode rows": step.decode_seqs,
        "decode context": step.decode_context_tokens,
        "largest decode context": step.decode_context_max,
        "preempted": sorted(step.preempted),
        "prefix hits": sorted(step.hits),
        "running": step.running,
        "waiting": step.waiting,
        "blocks used": step.blocks_used,
    }


def _replayed(engine: Engine, step: Step) -> Facts:
    """The same of the engine's; ask right after `schedule` returned it."""
    others, contexts, decoding = [], [], []
    for request, tokens in engine.scheduled_rows(step):
        computed = request.computed_tokens - tokens
        if tokens == 1 and computed >= request.prompt_tokens:
            contexts.append(computed)
            decoding.append(request.request_id)
        else:
            known = request.prompt_tokens + request.generated_tokens
            others.append((request.request_id, tokens, computed, known, request.prompt_tokens))
    context, largest = step.decode_context_tokens, step.decode_context_max
    if len(contexts) != step.decode_seqs:  # resumed with all but one token cached: a prefill to the engine
        context, largest = sum(contexts), max(contexts, default=0)
    return {
        "decoding": sorted(decoding),
        "other rows": sorted(others),
        "decode rows": len(contexts),
        "decode context": context,
        "largest decode context": largest,
        "preempted": sorted(request.request_id for request in step.preempted),
        "prefix hits": sorted((request.request_id, request.cached_tokens) for request in step.admitted),
        "running": engine.running,
        "waiting": engine.waiting,
        "blocks used": engine.blocks_used,
    }


def _differs(told: Facts, made: Facts) -> str | None:
    """None when both are alike, else the first fact that is not."""
    for name, theirs in told.items():
        if theirs != made[name]:
            return f"{name}: recorded {theirs}, replayed {made[name]}"
    return None


def replay(log: StepLog) -> Replay:
    """Replay a whole log, from the server's start; a livelock ends it and is reported."""
    engine = Engine(recorded_config(log.meta))
    requests = {index: _request(logged) for index, logged in log.requests.items()}
    steps = sorted([*log.steps, *log.emptied], key=attrgetter("number"))
    flying: dict[int, Step] = {}
    same: dict[int, bool] = {}
    first = None if steps else "the log holds no step: nothing was compared"
    for moment, kind, index in _events(log, steps):
        difference = None
        try:
            if kind == _ARRIVES:
                engine.add(requests[index])
            elif kind == _ABORTED:
                engine.abort(requests[index])
            elif kind == _UPDATED and index in flying:
                step = flying.pop(index)
                engine.update(step)
                difference = _differs(
                    {"tokens out": steps[index].tokens_out}, {"tokens out": step.tokens_out}
                )
            elif kind == _SCHEDULED:
                flying[index] = engine.schedule()
                difference = _differs(_recorded(steps[index]), _replayed(engine, flying[index]))
                same[index] = True
        except LivelockError as error:
            first = first or str(error)
            break
        if difference is not None:
            same[index] = False
            first = first or f"step {steps[index].number} at {moment:.6f} s: {difference}"
    return Replay(len(steps), sum(same.values()), first)
