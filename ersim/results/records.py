"""What a run leaves behind, simulated or measured: one row per request, and inter-token gaps.

Both sides write the same columns, so that a prediction lies beside its measurement without
translation. All times are seconds on the run's own clock, as the client sees them unless the
column says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

COMPLETED, FAILED, REJECTED = "completed", "failed", "rejected"
STATUSES = (COMPLETED, FAILED, REJECTED)

# Column -> numpy kind. Order is the order in requests.parquet.
REQUEST_COLUMNS: dict[str, str] = {
    "request_id": "int64",
    "user": "int64",
    "session": "int64",
    "turn": "int64",
    "prompt_index": "int64",
    "domain": "object",
    "expert": "object",
    "replica": "int64",
    "prompt_tokens": "int64",
    "output_tokens": "int64",
    "cached_tokens": "int64",
    "preemptions": "int64",
    "send_s": "float64",
    "gateway_s": "float64",
    "routing_s": "float64",
    "submit_s": "float64",
    "first_token_s": "float64",
    "last_token_s": "float64",
    "status": "object",
    "error": "object",
}


class RequestTable:
    """The rows of requests.parquet as one array per column: what figures need of a data frame, no more.

    pandas takes half a second to import, which is most of what a small simulation takes.
    `table["send_s"]` is a column, `table[mask]` the rows where mask is true.
    """

    def __init__(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(self.columns["request_id"])

    @overload
    def __getitem__(self, wanted: str) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, wanted: npt.NDArray[np.bool_]) -> RequestTable: ...
    def __getitem__(self, wanted: str | npt.NDArray[np.bool_]) -> npt.NDArray[Any] | RequestTable:
        if isinstance(wanted, str):
            return self.columns[wanted]
        return RequestTable({name: values[wanted] for name, values in self.columns.items()})

    def frame(self) -> pd.DataFrame:
        """The same as a pandas data frame."""
        import pandas as pd

        return pd.DataFrame(self.columns)

    def write_parquet(self, path: Path) -> None:
        """Write the rows; columns of names and messages are strings even where all are missing.

        `pa.array` would import pandas to see whether it is given its objects: hence the buffers.
        """
        import pyarrow as pa
        from pyarrow import parquet

        arrays = []
        for name, kind in REQUEST_COLUMNS.items():
            if kind == "object":
                buffers, arrow = _string_buffers(self.columns[name]), pa.string()
            else:
                values = np.ascontiguousarray(self.columns[name], dtype=kind)
                buffers, arrow = [None, values], pa.from_numpy_dtype(kind)
            wrapped = [None if buffer is None else pa.py_buffer(buffer) for buffer in buffers]
            arrays.append(pa.Array.from_buffers(arrow, len(self), wrapped))
        parquet.write_table(pa.Table.from_arrays(arrays, names=list(REQUEST_COLUMNS)), path)


def _string_buffers(values: npt.NDArray[Any]) -> list[Any]:
    """Arrow's buffers of a string column: which are there (a bit each), where each begins, all bytes."""
    texts = [None if value is None else str(value).encode() for value in values.tolist()]
    there = np.packbits([text is not None for text in texts], bitorder="little")
    ends = np.cumsum([0, *(len(text or b"") for text in texts)], dtype=np.int32)
    return [there, ends, b"".join(text or b"" for text in texts)]


@dataclass(frozen=True, slots=True)
class Gaps:
    """Inter-token gaps of a run: at `end_s[i]`, `count[i]` tokens came `gap_s[i]` after their predecessors.

    `tokens[i]` counts all tokens delivered at that moment, first tokens included. Shapes: (n,) each.
    """

    end_s: npt.NDArray[np.float64]
    gap_s: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    @staticmethod
    def concatenate(parts: list[Gaps]) -> Gaps:
        """Put the gaps of several replicas together, in the order given."""
        if not parts:
            empty = np.empty(0)
            return Gaps(empty, empty, empty.astype(np.int64), empty.astype(np.int64))
        return Gaps(
            np.concatenate([part.end_s for part in parts]),
            np.concatenate([part.gap_s for part in parts]),
            np.concatenate([part.count for part in parts]),
            np.concatenate([part.tokens for part in parts]),
        )


def check_requests(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """Return the frame with exactly the house's columns; DataError names the file and what is missing."""
    missing = [column for column in REQUEST_COLUMNS if column not in frame.columns]
    if missing:
        raise DataError(f"{source}: columns missing: {', '.join(missing)}; it has {', '.join(frame.columns)}")
    unknown = sorted(set(frame["status"].unique()) - set(STATUSES))
    if unknown:
        raise DataError(f"{source}: status must be one of {', '.join(STATUSES)}; it has {', '.join(unknown)}")
    return frame[list(REQUEST_COLUMNS)]
