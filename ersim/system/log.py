"""Recording without slowing down: flat arrays while the run goes on, frames afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import numpy as np

from ersim.results.records import REQUEST_COLUMNS, STATUSES, Gaps, RequestTable
from ersim.system.inflight import InFlight

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

_ROW = Struct(f"{len(_FIELDS)}d")
_STEP = Struct("ddqqq")
_STEP_TYPE = np.dtype(
    [("end_s", "f8"), ("duration_s", "f8"), ("gaps", "i8"), ("tokens", "i8"), ("blocks", "i8")]
)


class RequestLog:
    """One row per request that ended, in the order of ending."""

    __slots__ = ("_errors", "_pack", "_rows", "by_status", "ended")

    def __init__(self) -> None:
        self._rows = bytearray()
        self._pack = _ROW.pack
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
        self._rows += self._pack(
            request.request_id,
            request.user,
            request.session,
            request.turn,
            request.prompt_index,
            flight.expert,
            flight.replica,
            request.prompt_tokens,
            flight.generated_tokens,
            flight.cached_tokens,
            flight.preemptions,
            flight.send_s,
            gateway_s,
            flight.routing_s,
            flight.submit_s,
            first_token_s,
            last_token_s,
            status,
        )
        if error is not None:
            self._errors[self.ended] = error
        self.ended += 1
        self.by_status[status] += 1

    def table(self, experts: Sequence[str], domains: Sequence[str]) -> RequestTable:
        """All rows with the house's columns; `domains[i]` is the domain of prompt i."""
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

    __slots__ = ("_pack", "_rows")

    def __init__(self) -> None:
        self._rows = bytearray()
        self._pack = _STEP.pack

    def add(self, end_s: float, duration_s: float, gaps: int, tokens: int, blocks: int) -> None:
        """Record one step: `tokens` delivered at its end, `gaps` of them after an earlier token."""
        self._rows += self._pack(end_s, duration_s, gaps, tokens, blocks)

    def add_run(self, end_s: np.ndarray, duration_s: np.ndarray, seqs: int, blocks: np.ndarray) -> None:
        """Record consecutive decode steps of `seqs` rows; shapes (n,) each."""
        steps = np.empty(len(end_s), _STEP_TYPE)
        steps["end_s"] = end_s
        steps["duration_s"] = duration_s
        steps["gaps"] = steps["tokens"] = seqs
        steps["blocks"] = blocks
        self._rows += steps.tobytes()

    def __len__(self) -> int:
        return len(self._rows) // _STEP.size

    def column(self, name: str) -> np.ndarray:
        """end_s, duration_s, gaps, tokens or blocks of every step, in order, shape (steps,)."""
        found: np.ndarray = np.frombuffer(self._rows, _STEP_TYPE)[name].copy()
        return found

    def gaps(self, delivery_s: float) -> Gaps:
        """The steps as the client sees them: `delivery_s` after they ended."""
        steps = np.frombuffer(self._rows, _STEP_TYPE)
        return Gaps(
            steps["end_s"] + delivery_s,
            steps["duration_s"].copy(),
            steps["gaps"].copy(),
            steps["tokens"].copy(),
        )

    def occupancy(self, start_s: float, end_s: float) -> dict[str, float]:
        """Busy share, mean running tokens per step and KV blocks over [start_s, end_s], time-weighted."""
        steps = np.frombuffer(self._rows, _STEP_TYPE)
        ends, length = steps["end_s"], steps["duration_s"]
        inside = (ends > start_s) & (ends <= end_s)
        span, busy = end_s - start_s, float(length[inside].sum())
        if span <= 0 or busy == 0.0:
            return {"busy_share": 0.0, "tokens_per_step": 0.0, "mean_kv_blocks": 0.0, "peak_kv_blocks": 0.0}
        blocks, tokens = steps["blocks"][inside], steps["tokens"][inside]
        return {
            "busy_share": min(busy / span, 1.0),
            "tokens_per_step": float(tokens.mean()),
            "mean_kv_blocks": float(np.dot(blocks, length[inside])) / busy,
            "peak_kv_blocks": float(blocks.max()),
        }
