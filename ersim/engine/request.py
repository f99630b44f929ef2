"""One request as an engine sees it: lengths, content identity, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ersim.types import Segment
from ersim.util.heaps import Item

if TYPE_CHECKING:
    from ersim.engine.bulk import DecodeBulk
    from ersim.engine.prefix import Node, Piece

NEW: Final = 0
WAITING: Final = 1
PREEMPTED: Final = 2
DECODING: Final = 3
WALKED: Final = 4
GHOST: Final = 5
FINISHED: Final = 6
"""Where a request is.

DECODING rows advance in bulk and are touched by nobody between events; WALKED rows (prefills, and
the few decode rows that need care) are looked at in every step; GHOST rows wait, asynchronously,
for the output that ends them. All three are in the running batch.
"""


class EngineRequest(Item):
    """A request in one engine.

    output_tokens is the true answer length, its end-of-sequence token included; the request ends
    by "length" when max_tokens or max_model_len comes first or at the same token, else by "stop".
    segments (their tokens sum to prompt_tokens) and output_content_id identify content for the
    prefix cache, as in `ersim.types.Request`; without segments nothing is shared. block_keys
    replaces both: the identity of each full block from the first on, as far as it is known (it may
    run on into the answer); what lies behind is private. payload is the caller's.

    Readable at any time: computed_tokens, generated_tokens, preemptions, cached_tokens (prefix hit
    of the first admission) and finish_reason (None, "length", "stop" or "abort").
    """

    __slots__ = (  # noqa: RUF023 (grouped by who sets them)
        # what the caller said
        "block_keys",
        "max_tokens",
        "output_content_id",
        "output_tokens",
        "payload",
        "priority",
        "prompt_tokens",
        "request_id",
        "segments",
        # what became of it
        "cached_tokens",
        "finish_reason",
        "preemptions",
        # the scheduler's own state; the formulas that bind it are in bulk.py
        "admission",
        "answer",
        "arrival",
        "computed",
        "engine",
        "finish_step",
        "generated",
        "hashed_blocks",
        "hashed_tokens",
        "held",
        "joined",
        "length",
        "offset",
        "path",
        "placeholders",
        "prefilling",
        "state",
        "stop",
        "tail",
    )

    def __init__(
        self,
        request_id: int,
        prompt_tokens: int,
        output_tokens: int,
        max_tokens: int,
        priority: int = 0,
        segments: Sequence[Segment] | None = None,
        output_content_id: int | None = None,
        block_keys: Sequence[int] | None = None,
        payload: object = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.max_tokens = max_tokens
        self.priority = priority
        self.segments = segments
        self.output_content_id = output_content_id
        self.block_keys = block_keys
        self.payload = payload
        self.cached_tokens = 0
        self.preemptions = 0
        self.finish_reason: str | None = None
        self.state = NEW
        self.generated = 0
        self.computed = 0
        self.placeholders = 0
        self.engine: DecodeBulk
        self.answer: Node | None = None
        self.path: list[tuple[Node, int, int]] | None = None
        self.held: list[tuple[Piece, int]]
        self.tail: Piece | None
        self.arrival: int
        self.admission: int
        self.length: int
        self.stop: str
        self.offset: int
        self.joined: int
        self.prefilling: bool
        self.finish_step: int
        self.hashed_tokens: int
        self.hashed_blocks: int

    @property
    def computed_tokens(self) -> int:
        """Tokens whose KV is computed or being computed by a scheduled step; 0 after a preemption."""
        return self.engine.computed_of(self) if self.state == DECODING else self.computed

    @property
    def generated_tokens(self) -> int:
        """Answer tokens delivered so far."""
        if self.state == DECODING:
            return self.engine.generated_of(self)
        return self.length - 1 if self.state == GHOST else self.generated

    def __repr__(self) -> str:
        return (
            f"EngineRequest(request_id={self.request_id}, prompt_tokens={self.prompt_tokens}, "
            f"output_tokens={self.output_tokens}, max_tokens={self.max_tokens}, priority={self.priority})"
        )
