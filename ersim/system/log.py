"""Recording without slowing down: flat arrays while the run goes on, frames afterwards.

A log writes its numbers, all as doubles, into a short row of pending ones that stays in the cache, and
packs them into one byte array now and then: 8 bytes a number, and no object for any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ersim.results.records import REQUEST_COLUMNS, STATUSES, Gaps, RequestTable
from ersim.system.inflight import InFlight
from ersim.util.vectors import as_bytes, i64, vec

# Numbers of one request, in the order in which `RequestLog.add` writes them. Indices stand for
# names until `frame` resolves them. Doubles hold every integer that occurs here exactly.
_FIELDS = (
    "request_id",
    "user",
    "session",
    "turn",
    "prompt_index",
    "expert",
    "replica",
    "prompt_tokens",
    "output_tokens",
    "cached_tokens",
    "preemptions",
    "send_s",
    "gateway_s",
    "routing_s",
    "submit_s",
    "first_token_s",
    "last_token_s",
    "status",
)

_WIDTH: Final = 18
_STEP_FIELDS = ("end_s", "duration_s", "gaps", "tokens", "blocks")
_STEP_WIDTH: Final = 5
_STEP_KINDS = {"end_s": np.float64, "duration_s": np.float64}

_PENDING: Final = 128
"""Rows that are collected number by number before they go, packed, to the others."""


class RequestLog:
    """One row per request that ended, in the order of ending."""

    __slots__ = ("_at", "_errors", "_pending", "_rows", "by_status", "ended")

    def __init__(self) -> None:
        self._rows = bytearray()
        self._pending: vec[float] = vec[float]([0.0] * (_PENDING * _WIDTH))
        self._at: i64 = 0
        self._errors: dict[int, str] = {}
        self.ended = 0
        self.by_status = [0] * len(STATUSES)

    def add(
        self,
        flight: InFlight,
        status: int,
        gateway_s: float,
        first_token_s: float,
        last_token_s: float,
        error: str | None = None,
    ) -> None:
        """Record the end of a request; `status` indexes `STATUSES`, times are the client's."""
        request = flight.request
        row, at = self._pending, self._at
        row[at] = float(request.request_id)
        row[at + 1] = float(request.user)
        row[at + 2] = float(request.session)
        row[at + 3] = float(request.turn)
        row[at + 4] = float(request.prompt_index)
        row[at + 5] = float(flight.expert)
        row[at + 6] = float(flight.replica)
        row[at + 7] = float(request.prompt_tokens)
        row[at + 8] = float(flight.generated_tokens)
        row[at + 9] = float(flight.cached_tokens)
        row[at + 10] = float(flight.preemptions)
        row[at + 11] = flight.send_s
        row[at + 12] = gateway_s
        row[at + 13] = flight.routing_s
        row[at + 14] = flight.submit_s
        row[at + 15] = first_token_s
        row[at + 16] = last_token_s
        row[at + 17] = float(status)
        self._at = at + _WIDTH
        if self._at == len(row):
            self._pack()
        if error is not None:
            self._errors[self.ended] = error
        self.ended += 1
        self.by_status[status] += 1

    def _pack(self) -> None:
        if self._at:
            self._rows += as_bytes(self._pending[: self._at])
            self._at = 0

    def table(self, experts: Sequence[str], domains: Sequence[str]) -> RequestTable:
        """All rows with the house's columns; `domains[i]` is the domain of prompt i."""
        self._pack()
        table = np.frombuffer(self._rows, dtype=np.float64).reshape(self.ended, len(_FIELDS))
        columns = {name: table[:, index] for index, name in enumerate(_FIELDS)}
        data: dict[str, np.ndarray] = {}
        for name, kind in REQUEST_COLUMNS.items():
            if kind in ("int64", "float64"):
                data[name] = columns[name].astype(kind)
        data["expert"] = _names(columns["expert"], experts)
        data["domain"] = _names(columns["prompt_index"], domains)
        data["status"] = _names(columns["status"], STATUSES)
        error = np.full(self.ended, None, dtype=object)
        for row, message in self._errors.items():
            error[row] = message
        data["error"] = error
        return RequestTable({name: data[name] for name in REQUEST_COLUMNS})


def _names(indices: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Names by index as an object array; index -1 (never chosen) is the empty string."""
    table = np.array([*names, ""], dtype=object)
    return table[indices.astype(np.int64)]


class StepLog:
    """What every engine step of one replica did; runs of equal batches are entered at once."""

    __slots__ = ("_at", "_pending", "_rows")

    def __init__(self) -> None:
        self._rows = bytearray()
        self._pending: vec[float] = vec[float]([0.0] * (_PENDING * _STEP_WIDTH))
        self._at: i64 = 0

    def add(self, end_s: float, duration_s: float, gaps: int, tokens: int, blocks: int) -> None:
        """Record one step: `tokens` delivered at its end, `gaps` of them after an earlier token."""
        row, at = self._pending, self._at
        row[at] = end_s
        row[at + 1] = duration_s
        row[at + 2] = float(gaps)
        row[at + 3] = float(tokens)
        row[at + 4] = float(blocks)
        self._at = at + _STEP_WIDTH
        if self._at == len(row):
            self._pack()

    def add_run(self, end_s: np.ndarray, duration_s: np.ndarray, seqs: int, blocks: np.ndarray) -> None:
        """Record consecutive decode steps of `seqs` rows; shapes (n,) each."""
        self._pack()
        steps = np.empty((len(end_s), _STEP_WIDTH))
        steps[:, 0] = end_s
        steps[:, 1] = duration_s
        steps[:, 2:4] = seqs
        steps[:, 4] = blocks
        self._rows += steps.tobytes()

    def _pack(self) -> None:
        if self._at:
            self._rows += as_bytes(self._pending[: self._at])
            self._at = 0

    def __len__(self) -> int:
        return (len(self._rows) // 8 + int(self._at)) // _STEP_WIDTH

    def column(self, name: str) -> np.ndarray:
        """end_s, duration_s, gaps, tokens or blocks of every step, in order, shape (steps,)."""
        self._pack()
        steps = np.frombuffer(self._rows, np.float64).reshape(-1, _STEP_WIDTH)
        return steps[:, _STEP_FIELDS.index(name)].astype(_STEP_KINDS.get(name, np.int64))

    def gaps(self, delivery_s: float) -> Gaps:
        """The steps as the client sees them: `delivery_s` after they ended."""
        return Gaps(
            self.column("end_s") + delivery_s,
            self.column("duration_s"),
            self.column("gaps"),
            self.column("tokens"),
        )

    def occupancy(self, start_s: float, end_s: float) -> dict[str, float]:
        """Busy share, mean running tokens per step and KV blocks over [start_s, end_s], time-weighted."""
        ends, length = self.column("end_s"), self.column("duration_s")
        inside = (ends > start_s) & (ends <= end_s)
        span, busy = end_s - start_s, float(length[inside].sum())
        if span <= 0 or busy == 0.0:
            return {"busy_share": 0.0, "tokens_per_step": 0.0, "mean_kv_blocks": 0.0, "peak_kv_blocks": 0.0}
        blocks, tokens = self.column("blocks")[inside], self.column("tokens")[inside]
        return {
            "busy_share": min(busy / span, 1.0),
            "tokens_per_step": float(tokens.mean()),
            "mean_kv_blocks": float(np.dot(blocks, length[inside])) / busy,
            "peak_kv_blocks": float(blocks.max()),
        }
