"""Replay: the requests of a trace file, or of a list in memory, at their own times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ersim.config import WorkloadConfig
from ersim.errors import DataError, bad_value
from ersim.types import Request, Segment
from ersim.workload.base import Workload
from ersim.workload.draws import Sampler
from ersim.workload.opened import arrival_times
from ersim.workload.prompts import PromptSet
from ersim.workload.sessions import RequestMaker
from ersim.workload.traces import BLOCK_TOKENS, Trace, read_trace

Ints = npt.NDArray[np.int64]


class ReplayWorkload(Workload):
    """Given requests, in order of their `arrival_s`."""

    closed = False

    def __init__(self, requests: Sequence[Request]) -> None:
        """Raise DataError if a request has no arrival time or the times are not in order."""
        before = 0.0
        for request in requests:
            if request.arrival_s is None or not request.arrival_s >= before:
                raise DataError(
                    f"request {request.request_id}: arrival_s must be >= {before}, got {request.arrival_s!r}"
                )
            before = request.arrival_s
        self.requests = len(requests)
        self._requests = requests

    def arrivals(self) -> Iterator[Request]:
        return iter(self._requests)


class TraceWorkload(Workload):
    """A trace file's first `requests` rows (None: all), its times divided by `trace_speed`.

    Lengths are the trace's own. What is asked: the row's `prompt_index` or text where the file has one
    (the text must be in the prompt set; training prompts are then asked too, a replay leaves nothing
    out), otherwise prompts drawn from those that may be asked. A file without times needs `rate_rps`,
    and its rows arrive at that rate with `cv`.
    """

    closed = False

    def __init__(
        self,
        config: WorkloadConfig,
        prompts: PromptSet,
        users: int,
        seed: int,
        ask: Sequence[int] | None = None,
    ) -> None:
        """Raise DataError for a trace that cannot be used, ConfigError for what does not go with one."""
        if config.trace_path is None:
            raise bad_value("workload.trace_path", "set for trace arrivals", None)
        for name, only in (("turns", 1), ("system_prompt_tokens", 0)):
            if getattr(config, name) != only:
                raise bad_value(f"workload.{name}", f"{only} with trace arrivals", getattr(config, name))
        trace = read_trace(config.trace_path)
        self.requests = len(trace) if config.requests is None else min(config.requests, len(trace))
        sampler = Sampler(config, prompts, seed, ask)
        self._maker = RequestMaker(config, sampler, set_texts_only=trace.texts is not None)
        index = _prompt_index(trace, prompts, sampler)
        self._index = index[: self.requests].tolist()
        own = prompts.own_tokens[index] if trace.prompt_tokens is None else trace.prompt_tokens
        self._prompt_tokens, self._output_tokens = (
            tokens[: self.requests].tolist()
            for tokens in sampler.cut(own, sampler.scaled(trace.output_tokens))
        )
        self._block_ids = trace.block_ids
        self._arrival_s = _times(trace, config, seed)[: self.requests].tolist()

    def arrivals(self) -> Iterator[Request]:
        rows = zip(self._index, self._prompt_tokens, self._output_tokens, strict=True)
        for number, (row, arrival_s) in enumerate(zip(rows, self._arrival_s, strict=True)):
            request = self._maker.opening(number, number, *row)
            request.arrival_s = arrival_s
            if self._block_ids is not None:
                request.segments = _segments(self._block_ids[number], request.prompt_tokens)
            yield request


def _segments(block_ids: Sequence[int], prompt_tokens: int) -> tuple[Segment, ...]:
    """The prompt's content by the trace's block ids; the last block may be shorter."""
    starts = range(0, prompt_tokens, BLOCK_TOKENS)
    return tuple(
        Segment(block_id + 1, min(BLOCK_TOKENS, prompt_tokens - start))
        for block_id, start in zip(block_ids, starts, strict=False)
    )


def _times(trace: Trace, config: WorkloadConfig, seed: int) -> npt.NDArray[np.float64]:
    if trace.arrival_s is not None:
        return trace.arrival_s / config.trace_speed
    if config.rate_rps is None:
        raise DataError(
            f"{trace.path} has no arrival times: set workload.rate_rps to send its rows at a rate"
        )
    times = arrival_times(config.rate_rps, config.cv, seed)
    return np.fromiter(times, np.float64, len(trace))


def _prompt_index(trace: Trace, prompts: PromptSet, sampler: Sampler) -> Ints:
    """Index into the prompt set of each row of the trace."""
    if trace.prompt_indices is not None:
        return _checked(trace, trace.prompt_indices, prompts)
    if trace.texts is None:
        return sampler.draw(np.zeros(1, np.int64), np.arange(len(trace))).prompt_index
    place = {prompt.text: index for index, prompt in enumerate(prompts.prompts)}
    for row, text in enumerate(trace.texts, 1):
        if text not in place:
            raise DataError(
                f"{trace.path}: row {row}: its prompt is not in the prompt set {prompts.name}; "
                f"set workload.prompts.path to {trace.path} too"
            )
    return np.array([place[text] for text in trace.texts], np.int64)


def _checked(trace: Trace, indices: Ints, prompts: PromptSet) -> Ints:
    beyond = indices >= len(prompts.prompts)
    if beyond.any():
        row = int(np.argmax(beyond))
        raise DataError(
            f"{trace.path}: row {row + 1}: prompt_index must be below {len(prompts.prompts)}, the size of "
            f"{prompts.name}, got {indices[row]}"
        )
    return indices
