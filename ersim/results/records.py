"""What a run leaves behind, simulated or measured: one row per request, and inter-token gaps.

Both sides write the same columns, so that a prediction lies beside its measurement without
translation. All times are seconds on the run's own clock, as the client sees them unless the
column says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from ersim.errors import DataError

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
