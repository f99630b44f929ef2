"""Request traces: who came when, with how many tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError
from ersim.workload.tables import find_column, read_table, real_numbers, texts, whole_numbers

if TYPE_CHECKING:
    import pandas as pd

KEY = "workload.trace_path"

RECORDED = "send_s"
ARRIVAL = ("arrived_at", "arrival_s", "arrival_time", "arrived", "arrival", "timestamp", RECORDED)
PROMPT = (
    "num_prefill_tokens",
    "prompt_tokens",
    "contexttokens",
    "input_tokens",
    "prompt_len",
    "input_length",
)
OUTPUT = ("num_decode_tokens", "output_tokens", "generatedtokens", "output_len", "output_length")
TEXT = ("prompt",)
PROMPT_INDEX = ("prompt_index",)
"""Column names in order of preference, in lower case: Vidur's and our own; TIMESTAMP, ContextTokens and
GeneratedTokens are those of the Azure LLM inference trace as published; prompt_len and output_len those of
`vllm bench serve`. The names that `ersim.results` writes are here too, so that a run can be replayed."""


BLOCKS = "hash_ids"
BLOCK_TOKENS = 512
"""Mooncake's traces (Qin et al., "Mooncake", FAST 2025; github.com/kvcache-ai/Mooncake) name the content of
each 512 tokens of a prompt by a hash id, so that shared prefixes can be replayed. Their timestamps are ms."""


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival; arrays of shape (requests,).

    arrival_s starts at 0, None when the file has no times. prompt_tokens is None when the file holds
    texts only. texts, prompt_indices and block_ids are None unless the file has them; block_ids identify the
    content of each prompt's successive blocks of BLOCK_TOKENS.
    """

    path: str
    arrival_s: npt.NDArray[np.float64] | None
    prompt_tokens: npt.NDArray[np.int64] | None
    output_tokens: npt.NDArray[np.int64]
    texts: list[str] | None = None
    prompt_indices: npt.NDArray[np.int64] | None = None
    block_ids: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.output_tokens)


def read_trace(path: str | Path) -> Trace:
    """Read a trace from CSV, JSONL or Parquet.

    Arrivals are seconds, or date-times; the first is moved to 0. A run that `ersim.results` recorded
    (column `send_s`) is put in order of sending, since its rows are in order of completion. What such a run
    shared through prefix caches, earlier turns above all, is not in the record.

    Raises DataError for a missing column (listing those there are), lengths that are no whole numbers >= 1,
    and arrivals that are missing, not finite or not in order.
    """
    table = read_table(path, KEY)
    if RECORDED in table.columns and table[RECORDED].notna().all():
        table = table.sort_values(RECORDED, kind="stable", ignore_index=True)
    output = _column(table, OUTPUT, path)
    if output is None:
        raise _no_column(table, path, "an output length", OUTPUT)
    prompt, text = _column(table, PROMPT, path), _column(table, TEXT, path)
    if prompt is None and text is None:
        raise _no_column(table, path, "a prompt length or text", PROMPT + TEXT)
    arrival, index = _column(table, ARRIVAL, path), _column(table, PROMPT_INDEX, path)
    seconds = None if arrival is None else _arrivals(arrival, path)
    prompt_tokens = None if prompt is None else whole_numbers(prompt, path, 1)
    blocks = None
    if BLOCKS in table.columns and prompt_tokens is not None:
        blocks = _blocks(table[BLOCKS], prompt_tokens, path)
        seconds = None if seconds is None else seconds / 1000
    return Trace(
        path=str(path),
        arrival_s=seconds,
        prompt_tokens=prompt_tokens,
        output_tokens=whole_numbers(output, path, 1),
        texts=None if text is None else list(texts(text, path)),
        prompt_indices=None if index is None else whole_numbers(index, path, 0),
        block_ids=blocks,
    )


def _column(table: pd.DataFrame, names: tuple[str, ...], path: str | Path) -> pd.Series | None:
    name = find_column(table, names)
    return None if name is None else table[name]


def _no_column(table: pd.DataFrame, path: str | Path, what: str, names: tuple[str, ...]) -> DataError:
    there = ", ".join(str(name) for name in table.columns)
    return DataError(
        f"{path} has no column with {what} (one of: {', '.join(names)}); its columns are: {there}"
    )


def _blocks(values: pd.Series, prompt_tokens: npt.NDArray[np.int64], path: str | Path) -> list[list[int]]:
    """Block ids by row; DataError unless a row has one whole number for each BLOCK_TOKENS."""
    rows = []
    for row, (ids, tokens) in enumerate(zip(values, prompt_tokens.tolist(), strict=True), 1):
        needed = math.ceil(tokens / BLOCK_TOKENS)
        good = isinstance(ids, (list, np.ndarray)) and len(ids) == needed
        if not good or not all(isinstance(one, (int, np.integer)) and one >= 0 for one in ids):
            raise DataError(
                f"{path}: row {row}: {BLOCKS} must be a list of {needed} whole numbers, one for each "
                f"{BLOCK_TOKENS} of its {tokens} prompt tokens"
            )
        rows.append([int(one) for one in ids])
    return rows


def _arrivals(values: pd.Series, path: str | Path) -> npt.NDArray[np.float64]:
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(values):
        stamps = pd.to_datetime(values, errors="coerce", utc=True, format="mixed")
        if stamps.notna().all():
            values = pd.Series((stamps - stamps.min()).dt.total_seconds(), name=values.name)
    seconds = real_numbers(values, path)
    step = np.diff(seconds)
    if (step < 0).any():
        row = int(np.argmax(step < 0)) + 2
        raise DataError(
            f"{path}: row {row}: {values.name} must not be before the row above it "
            f"({seconds[row - 1]} after {seconds[row - 2]}); sort the trace by arrival"
        )
    return np.asarray(seconds - seconds[0])
