"""Replays a recorded server through `ersim.engine`: same arrivals, same step moments, same batches?

The recorded times decide when requests arrive, steps are scheduled and outputs are applied; the
engine decides what runs. A wrong scheduler shows here, whatever the clock; where this agrees and a
prediction is off, the clock (the step-time model) is to blame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ersim.engine import Engine, EngineConfig, EngineRequest, LivelockError, Step
from testbed.step_log import LoggedRequest, LoggedStep, StepLog

_ARRIVES, _ABORTED, _UPDATED, _SCHEDULED = range(4)


@dataclass(frozen=True)
class Replay:
    """How many of the recorded steps the engine made with the same batch; the first that differs."""

    steps: int
    identical: int
    first_difference: str | None

    @property
    def share(self) -> float:
        """Identical steps over all steps; 1 for an empty log."""
        return self.identical / self.steps if self.steps else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for summaries."""
        return {
            "steps": self.steps,
            "identical": self.identical,
            "share": round(self.share, 6),
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


def _events(log: StepLog) -> list[tuple[float, int, int]]:
    """(moment, kind, index) in order of time."""
    events: list[tuple[float, int, int]] = []
    for request in log.requests.values():
        events.append((request.added_s, _ARRIVES, request.index))
        if request.finished_s is not None and "ABORT" in (request.status or ""):
            events.append((request.finished_s, _ABORTED, request.index))
    for number, step in enumerate(log.steps):
        events.append((step.schedule_s, _SCHEDULED, number))
        events.append((step.update_s, _UPDATED, number))
    return sorted(events)


def _difference(real: LoggedStep, made: Step) -> str | None:
    """None when the batches are identical, else what differs."""
    told, ours = real.batch(), made.batch
    pairs = {
        "tokens": (told.tokens, ours.tokens),
        "decode_seqs": (told.decode_seqs, ours.decode_seqs),
        "decode_context_tokens": (told.decode_context_tokens, ours.decode_context_tokens),
        "prefills": (sorted(told.prefills), sorted(ours.prefills)),
    }
    for name, (theirs, mine) in pairs.items():
        if theirs != mine:
            return f"{name}: recorded {theirs}, replayed {mine}"
    return None


def replay(log: StepLog) -> Replay:
    """Replay a whole log, from the server's start; a livelock ends it and is reported."""
    engine = Engine(recorded_config(log.meta))
    requests = {index: _request(logged) for index, logged in log.requests.items()}
    flying: dict[int, Step] = {}
    identical, first = 0, None
    for moment, kind, index in _events(log):
        try:
            if kind == _ARRIVES:
                engine.add(requests[index])
            elif kind == _ABORTED:
                engine.abort(requests[index])
            elif kind == _UPDATED and index in flying:
                engine.update(flying.pop(index))
            elif kind == _SCHEDULED:
                step = flying[index] = engine.schedule()
                difference = _difference(log.steps[index], step)
                identical += difference is None
                if difference is not None and first is None:
                    first = f"step {log.steps[index].number} at {moment:.6f} s: {difference}"
        except LivelockError as error:
            first = first or str(error)
            break
    return Replay(len(log.steps), identical, first)
