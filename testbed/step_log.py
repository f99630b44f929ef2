"""Reads what the recorder wrote: engine steps with their periods, requests, the engine's constants.

Step period. Synchronous scheduling runs schedule, execute, update one after the other; the outputs
of step n leave at u1[n], so that the period is u1[n] - u1[n-1] while requests are unfinished, and
u1[n] - s0[n] for the first step after an idle engine. Asynchronous scheduling overlaps them: the
period is u0[n] - max(u0[n-1], s1[n]), and u0[n] - s0[n] would double it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError
from ersim.types import Batch
from testbed.log_lines import (
    COUNT,
    COUNTS,
    FLAG,
    INTEGER,
    NUMBER,
    POSITIVE,
    TEXT,
    Kind,
    Line,
    NotJson,
    check_fields,
    counts_of,
    list_of,
    maybe,
    read_lines,
)

FORMATS = (1, 2, 3, 4)
"""1 said nothing of stolen time and of CPU seconds at a step's start, 2 nothing of waiting for a core, 3 not
which requests decode."""
REMEDY = "record it again"
_HEXADECIMAL = re.compile("[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class StepRow:
    """A row of a step that was not a plain decode row."""

    request: int
    tokens: int
    computed_tokens: int
    total_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One engine step that ran something; times are monotonic seconds.

    cpu_s, cpu_start_s: CPU seconds of the engine's thread until this step's end and its schedule_s; probe_s:
    what the speed probe took then (see `recording_scheduler.SpeedProbe`); stolen_share: of the last second
    (see `stolen_time`); waited_s, waited_start_s: seconds that the thread waited for its core (`core_wait`),
    as the CPU seconds are; decoding: the requests of the decode rows, in order of their indices. None where
    they were not recorded.
    """

    number: int
    schedule_s: float
    scheduled_s: float
    update_s: float
    updated_s: float
    running: int
    waiting: int
    blocks_used: int
    decode_seqs: int
    decode_context_tokens: int
    decode_context_max: int
    rows: tuple[StepRow, ...]
    preempted: tuple[int, ...]
    hits: tuple[tuple[int, int], ...]
    tokens_out: int
    record_cost_s: float
    cpu_s: float | None = None
    probe_s: float | None = None
    stolen_share: float | None = None
    cpu_start_s: float | None = None
    waited_s: float | None = None
    waited_start_s: float | None = None
    decoding: tuple[int, ...] | None = None

    def batch(self) -> Batch:
        """The step as the step-time models see it."""
        prefills = [(row.tokens, row.computed_tokens) for row in self.rows]
        return Batch(
            tokens=self.decode_seqs + sum(row.tokens for row in self.rows),
            decode_seqs=self.decode_seqs,
            decode_context_tokens=self.decode_context_tokens,
            decode_context_max=self.decode_context_max,
            prefills=prefills,
            sampled_seqs=self.decode_seqs
            + sum(row.computed_tokens + row.tokens >= row.total_tokens for row in self.rows),
        )


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request as the engine saw it; `finished_s` and what follows are None while it runs."""

    index: int
    request_id: str
    added_s: float
    prompt_tokens: int
    max_tokens: int
    priority: int
    prompt_hashes: tuple[str, ...]
    finished_s: float | None = None
    status: str | None = None
    output_tokens: int | None = None
    preemptions: int | None = None
    final_hashes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepLog:
    """A whole log: the engine's constants, its steps (empty calls dropped), its requests by index.

    emptied: calls that ran nothing, since they preempted whoever ran; a replay needs them.
    """

    meta: Mapping[str, Any]
    steps: Sequence[LoggedStep]
    requests: Mapping[int, LoggedRequest]
    emptied: Sequence[LoggedStep] = ()

    def between(self, start_s: float, end_s: float) -> StepLog:
        """The steps that were scheduled and delivered inside an interval (monotonic seconds)."""
        return self.within([(start_s, end_s)])

    def within(self, spans_s: Sequence[tuple[float, float]]) -> StepLog:
        """The steps that were scheduled and delivered inside one of several intervals (monotonic seconds)."""
        inside = [
            step
            for step in self.steps
            if any(low <= step.schedule_s and step.updated_s <= high for low, high in spans_s)
        ]
        return StepLog(self.meta, inside, self.requests)

    def periods_s(self) -> npt.NDArray[np.float64]:
        """Seconds that each step took, shape (steps,); see the module's head."""
        return periods_s(self.steps, bool(self.meta["async_scheduling"]))

    def ends_s(self) -> npt.NDArray[np.float64]:
        """Moment at which each step's outputs were there, shape (steps,)."""
        if self.meta["async_scheduling"]:
            return np.array([step.update_s for step in self.steps])
        return np.array([step.updated_s for step in self.steps])

    def record_overhead(self) -> float:
        """Share of the steps' time that recording took."""
        total = float(self.periods_s().sum())
        return sum(step.record_cost_s for step in self.steps) / total if total else 0.0


def periods_s(steps: Sequence[LoggedStep], asynchronous: bool) -> npt.NDArray[np.float64]:
    """Period of each of consecutive steps, seconds, shape (steps,)."""
    result = np.empty(len(steps))
    previous: LoggedStep | None = None
    for index, step in enumerate(steps):
        if asynchronous:
            start = step.scheduled_s if previous is None else max(previous.update_s, step.scheduled_s)
            result[index] = step.update_s - start
        else:
            follows = previous is not None and previous.number == step.number - 1
            start = previous.updated_s if follows and previous is not None else step.schedule_s
            result[index] = step.updated_s - start
        previous = step
    return result


META: Mapping[str, Kind] = {
    "vllm_version": TEXT,
    "async_scheduling": FLAG,
    "max_num_seqs": POSITIVE,
    "max_num_batched_tokens": POSITIVE,
    "max_model_len": POSITIVE,
    "block_size": POSITIVE,
    "num_blocks": POSITIVE,
    "enable_chunked_prefill": FLAG,
    "enable_prefix_caching": FLAG,
    "long_prefill_token_threshold": COUNT,
    "policy": TEXT,
    "watermark": NUMBER,
    "scheduler_reserve_full_isl": FLAG,
}
"""The engine's constants that every reader may count on."""

_SHARE = Kind("a number from 0 to below 1", lambda value: NUMBER.fits(value) and 0.0 <= value < 1.0)
_DURATION = Kind("a number above 0", lambda value: NUMBER.fits(value) and value > 0.0)
_HASHES = Kind(
    "a list of hexadecimal strings",
    list_of(lambda value: type(value) is str and _HEXADECIMAL.fullmatch(value) is not None),
)
_FIVES = Kind("a list of five integers >= 0 each", list_of(counts_of(5)))
_PAIRS = Kind("a list of two integers >= 0 each", list_of(counts_of(2)))
_ADDED = (
    ("time", NUMBER), ("index", COUNT), ("request id", TEXT), ("prompt tokens", COUNT), ("max_tokens", COUNT),
    ("priority", INTEGER), ("block hashes", _HASHES),
)  # fmt: skip
_FINISHED = (
    ("time", NUMBER), ("index", maybe(COUNT)), ("status", TEXT), ("output tokens", COUNT),
    ("preemptions", COUNT), ("block hashes", _HASHES),
)  # fmt: skip
_STEP = (
    ("number", COUNT), ("s0", NUMBER), ("s1", NUMBER), ("u0", NUMBER), ("u1", NUMBER), ("running", COUNT),
    ("waiting", COUNT), ("blocks used", COUNT), ("decode rows", COUNT), ("decode context", COUNT),
    ("largest decode context", COUNT), ("other rows", _FIVES), ("preempted", COUNTS), ("prefix hits", _PAIRS),
    ("tokens out", COUNT), ("record cost", NUMBER),
    ("CPU seconds", maybe(NUMBER)), ("probe", maybe(_DURATION)), ("stolen share", maybe(_SHARE)),
    ("CPU seconds at s0", maybe(NUMBER)), ("seconds waited", maybe(NUMBER)),
    ("seconds waited at s0", maybe(NUMBER)), ("decode rows that join", COUNTS), ("that leave", COUNTS),
)  # fmt: skip
_JOIN, _LEAVE = 23, 24  # places of the last two in a line
_FIELDS: Mapping[str, tuple[Sequence[tuple[str, Kind]], int]] = {
    "m": ((("constants", Kind("an object", lambda value: type(value) is dict)),), 1),
    "a": (_ADDED, len(_ADDED)),
    "f": (_FINISHED, len(_FINISHED)),
    "s": (_STEP, len(_STEP) - 8),
}
"""By a line's first element: its others, and how many of them format 1 has already."""


def _parse_lines(path: Path) -> Iterator[tuple[Line, list[Any]]]:
    """Checked lines. One that was cut by a kill is left out: the last one, or one before another start."""
    cut: NotJson | None = None
    for line, record in read_lines(path, "a step log", "; was the recorder on?", REMEDY):
        if isinstance(record, NotJson):
            if cut is not None:
                raise cut.error
            cut = record
            continue
        if cut is not None and not (isinstance(record, list) and record[:1] == ["m"]):
            raise cut.error
        _check_line(line, record)
        cut = None  # a server was killed while it wrote, and another one started
        yield line, record
    if cut is not None and cut.whole:
        raise cut.error  # else the server was cut off while writing its last line


def _check_line(line: Line, record: object) -> None:
    """Raise DataError unless the line is what the recorder writes."""
    if not isinstance(record, list) or not record:
        raise line.bad(f"must be a JSON array, got {reprlib.repr(record)}")
    kind = record[0]
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise line.bad(f"must begin with one of {', '.join(_FIELDS)}, got {reprlib.repr(kind)}")
    fields, least = _FIELDS[kind]
    if not least <= len(record) - 1 <= len(fields):
        wanted = f"{least} to {len(fields)}" if least < len(fields) else f"{least}"
        raise line.bad(f"must have {wanted} values after {kind!r}, got {len(record) - 1}")
    check_fields(line, fields, record[1:])


def _check_meta(line: Line, meta: Mapping[str, Any]) -> None:
    """Raise DataError unless the constants are those of a format that is known."""
    formats = f"one of {', '.join(map(str, FORMATS))}"
    known = Kind(formats, lambda value: type(value) is int and value in FORMATS)
    for name, kind in {"format": known, **META}.items():
        if name not in meta:
            raise line.bad(f"lacks the engine's {name}")
        line.check(name, kind, meta[name])


def _decoding_after(line: Line, record: Sequence[Any], before: frozenset[int]) -> frozenset[int]:
    """The requests of a step's decode rows, from those of the call before it.

    Raises DataError where who joins and who leaves is not both there, or does not agree with the line's own
    count.
    """
    if len(record) <= _LEAVE:
        raise line.bad("says who joins the decode rows, and not who leaves them")
    joining, leaving = frozenset(record[_JOIN]), frozenset(record[_LEAVE])
    after = before - leaving | joining
    if joining & before or leaving - before or len(after) != record[9]:
        raise line.bad(f"says {record[9]} decode rows, and who joins and leaves makes {len(after)}")
    return after


def _step(record: Sequence[Any], decoding: frozenset[int]) -> LoggedStep:
    values: list[Any] = [
        *record[1:12],
        tuple(StepRow(*row) for row in record[12]),
        tuple(record[13]),
        tuple((index, tokens) for index, tokens in record[14]),
        *record[15:_JOIN],
    ]
    step = LoggedStep(*values)
    return replace(step, decoding=tuple(sorted(decoding))) if len(record) > _JOIN else step


def _finish(request: LoggedRequest, record: Sequence[Any]) -> LoggedRequest:
    return LoggedRequest(
        request.index,
        request.request_id,
        request.added_s,
        request.prompt_tokens,
        request.max_tokens,
        request.priority,
        request.prompt_hashes,
        finished_s=record[1],
        status=record[3],
        output_tokens=record[4],
        preemptions=record[5],
        final_hashes=tuple(record[6]),
    )


def read_step_log(path: Path) -> StepLog:
    """Read a recorder's file. Raises DataError naming file, line and remedy."""
    meta: dict[str, Any] | None = None
    steps: list[LoggedStep] = []
    emptied: list[LoggedStep] = []
    requests: dict[int, LoggedRequest] = {}
    decoding: frozenset[int] = frozenset()
    for line, record in _parse_lines(path):
        kind = record[0]
        if kind == "m":  # a server that was started again counts anew
            _check_meta(line, record[1])
            meta, steps, emptied, requests, decoding = record[1], [], [], {}, frozenset()
        elif kind == "a":
            requests[record[2]] = LoggedRequest(
                record[2], record[3], record[1], record[4], record[5], record[6], tuple(record[7])
            )
        elif kind == "f" and record[2] in requests:
            requests[record[2]] = _finish(requests[record[2]], record)
        elif kind == "s":
            if len(record) > _JOIN:
                decoding = _decoding_after(line, record, decoding)
            if record[9] or record[12]:
                steps.append(_step(record, decoding))
            elif record[13]:
                emptied.append(_step(record, decoding))
    if meta is None:
        raise DataError(f"{path}: no line with the engine's constants; the file is cut or no step log")
    return StepLog(meta, steps, requests, emptied)


def request_tag(engine_id: str) -> str:
    """The X-Request-Id inside vLLM's own id (`cmpl-<id>-<choice>-<random>`)."""
    return engine_id.removeprefix("cmpl-").removeprefix("chatcmpl-").rsplit("-", 2)[0]
