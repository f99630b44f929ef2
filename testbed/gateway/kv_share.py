"""The share of a replica's KV blocks in use: read from its `/metrics`, carried on between readings."""

from __future__ import annotations

import math
import re

KV_SHARE = re.compile(rb"^vllm:kv_cache_usage_perc(?:\{[^\n]*\})?[ \t]+(\S+)", re.MULTILINE)
"""vLLM's gauge, 1 is all (its name in 0.32); one line for each engine of a data-parallel server."""


def kv_share(metrics: bytes) -> float | None:
    """The gauge, mean over engines, within [0, 1]; None where the text has none that is a number."""
    try:
        shares = [float(text) for text in KV_SHARE.findall(metrics)]
    except ValueError:
        return None
    mean = sum(shares) / len(shares) if shares else math.nan
    return None if math.isnan(mean) else min(1.0, max(0.0, mean))


class KvShare:
    """One replica's share: its last reading, plus what requests sent since then hold, less those ended.

    A request is taken to hold what one held at the last reading, or `1 / slots` before there was one with
    requests: a full batch then fills the cache. A server without the gauge is so compared by its batch.
    wanted: whether anybody has looked; nobody's share need be read.
    """

    def __init__(self, slots: int) -> None:
        self.wanted = False
        self._read = 0.0
        self._running = 0
        self._each = 1.0 / slots

    def set(self, share: float, running: int) -> None:
        """A reading, while so many requests ran there."""
        self._read, self._running = share, running
        if share > 0.0 and running > 0:
            self._each = share / running

    def estimate(self, running: int) -> float:
        """The share now that so many run there, within [0, 1]."""
        self.wanted = True
        return min(1.0, max(0.0, self._read + self._each * (running - self._running)))
