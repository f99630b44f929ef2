"""What came out of a run: records, windows, figures, intervals."""

from ersim.results import quality
from ersim.results.compare import VALIDATED, Comparison, Difference, compare, difference
from ersim.results.intervals import (
    combine,
    interval_method,
    mean_is_known,
    mean_known_within,
    prediction_interval,
)
from ersim.results.percentiles import latency_statistics, weighted_quantiles
from ersim.results.records import (
    COMPLETED,
    FAILED,
    REJECTED,
    REQUEST_COLUMNS,
    Gaps,
    RequestTable,
    check_requests,
)
from ersim.results.summary import breakdown, in_window, latencies_s, summarise
from ersim.results.warmup import Window, mser_cut, steady_window

__all__ = [
    "COMPLETED",
    "FAILED",
    "REJECTED",
    "REQUEST_COLUMNS",
    "VALIDATED",
    "Comparison",
    "Difference",
    "Gaps",
    "RequestTable",
    "Window",
    "breakdown",
    "check_requests",
    "combine",
    "compare",
    "difference",
    "in_window",
    "interval_method",
    "latencies_s",
    "latency_statistics",
    "mean_is_known",
    "mean_known_within",
    "mser_cut",
    "prediction_interval",
    "quality",
    "steady_window",
    "summarise",
    "weighted_quantiles",
]
