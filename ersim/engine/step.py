"""One engine step: what the scheduler chose, and what came of it when the step ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ersim.types import Batch

if TYPE_CHECKING:
    from ersim.engine.request import EngineRequest

NOBODY: Final[tuple[EngineRequest, ...]] = ()
"""Shared by all steps in which nothing happened to anybody."""

NO_CHUNKS: Final[tuple[tuple[int, int], ...]] = ()
"""Shared by all steps without a prefill."""


class Step(Batch):
    """The decision of one `schedule` call and, after its `update`, the outcome.

    A step is the batch that it runs (`batch` is the step itself: one object per step, not two).
    index: counts steps that run something; -1 marks a step that runs nothing.
    admitted, resumed: requests that joined the batch in this step (resumed: after a preemption).
    preempted: requests that lost their KV blocks so that this step could be scheduled.
    first: requests that emit their very first token when this step ends.
    finished: requests that end when this step ends; filled by `update`.
    tokens_out: tokens delivered when this step ends; final after `update` (rows that are computed
    in vain, after an end-of-sequence token or an abort, deliver none).
    rows: requests outside the bulk whose token of this step `update` must count one by one.

    No __slots__: what is rarely set is a class attribute until it is.
    """

    admitted: Sequence[EngineRequest] = NOBODY
    resumed: Sequence[EngineRequest] = NOBODY
    preempted: Sequence[EngineRequest] = NOBODY
    first: Sequence[EngineRequest] = NOBODY
    finished: Sequence[EngineRequest] = NOBODY
    rows: list[EngineRequest] | None = None

    def __init__(self, index: int, decodes: int, context_tokens: int, longest: int, tokens_out: int) -> None:
        self.index = index
        self.tokens = self.decode_seqs = self.sampled_seqs = decodes
        self.decode_context_tokens = context_tokens
        self.decode_context_max = longest
        self.prefills = NO_CHUNKS
        self.tokens_out = tokens_out

    @property
    def batch(self) -> Batch:
        """What a step-time model needs."""
        return self
