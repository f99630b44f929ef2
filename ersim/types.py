"""The request and batch types that the rooms of ersim share, and nothing else.

`workload` makes `Request`s, `routing` sees a `RoutingQuery` and `FleetState`, `engine` turns
requests into `Batch`es, `steptime` turns a `Batch` into seconds, `results` keeps what came out.
None of these rooms imports another; they all import this page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ersim.util.vectors import mypyc_attr


@dataclass(frozen=True, slots=True)
class Prompt:
    """One entry of a prompt set.

    `quality` maps a model name to the score in [0, 1] that its answer got; empty when unknown.
    `prompt_tokens` and `output_tokens` are None when the set does not say.
    """

    prompt_id: str
    text: str
    domain: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    quality: Mapping[str, float] = field(default_factory=dict)


@mypyc_attr(acyclic=True)  # nothing in it leads back to it: the garbage collector need not watch it
@dataclass(slots=True, init=False, unsafe_hash=True)
class Segment:
    """A run of tokens whose content is identified by `content_id`.

    Two requests share a prefix as far as their segment lists agree; the last segment that both
    have in common is shared up to the shorter of its two lengths.
    """

    content_id: int
    tokens: int

    # Written out, as for `Request`.
    def __init__(self, content_id: int, tokens: int) -> None:
        self.content_id = content_id
        self.tokens = tokens


@mypyc_attr(acyclic=True)
@dataclass(slots=True, eq=False, init=False)
class Request:
    """One request as a user sends it.

    `output_tokens` is the true answer length: the engine uses it to end the request, router and
    scheduler decisions never read it. `max_tokens` is what the client declares. When the two are
    equal the request ends by length, otherwise by an end-of-sequence token.
    `segments` identify the content of the prompt for the prefix cache; None means that no other
    request shares a token with it. `output_content_id` identifies the answer's content so that a
    later turn can find it in the cache; None when nobody will.
    `block_keys` overrides `segments` when a recorded run gives the identity of each full prompt
    block directly (equal key at equal index = equal prefix).
    """

    request_id: int
    user: int
    prompt_index: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    priority: int = 0
    session: int = 0
    turn: int = 0
    segments: tuple[Segment, ...] | None = None
    output_content_id: int | None = None
    block_keys: Sequence[int] | None = None
    arrival_s: float | None = None

    # Written out because one is made per simulated request: a generated one cannot be compiled.
    def __init__(
        self,
        request_id: int,
        user: int,
        prompt_index: int,
        prompt_tokens: int,
        output_tokens: int,
        max_tokens: int,
        priority: int = 0,
        session: int = 0,
        turn: int = 0,
        segments: tuple[Segment, ...] | None = None,
        output_content_id: int | None = None,
        block_keys: Sequence[int] | None = None,
        arrival_s: float | None = None,
    ) -> None:
        self.request_id = request_id
        self.user = user
        self.prompt_index = prompt_index
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.max_tokens = max_tokens
        self.priority = priority
        self.session = session
        self.turn = turn
        self.segments = segments
        self.output_content_id = output_content_id
        self.block_keys = block_keys
        self.arrival_s = arrival_s


class Batch:
    """What one engine step runs, in numbers that a step-time model needs.

    tokens: all tokens scheduled in this step.
    decode_seqs: rows that have finished their prefill and advance by one token.
    decode_context_tokens: sum over decode rows of the tokens computed before this step.
    decode_context_max: the largest of those, 0 without decode rows.
    prefills: (chunk_tokens, context_tokens_before) per row still in prefill or recompute.
    sampled_seqs: rows that emit a token in this step (decode rows and completed prefills).
    """

    __slots__ = (
        "decode_context_max",
        "decode_context_tokens",
        "decode_seqs",
        "prefills",
        "sampled_seqs",
        "tokens",
    )

    def __init__(
        self,
        tokens: int,
        decode_seqs: int,
        decode_context_tokens: int,
        decode_context_max: int,
        prefills: Sequence[tuple[int, int]],
        sampled_seqs: int,
    ) -> None:
        self.tokens = tokens
        self.decode_seqs = decode_seqs
        self.decode_context_tokens = decode_context_tokens
        self.decode_context_max = decode_context_max
        self.prefills = prefills
        self.sampled_seqs = sampled_seqs

    def __repr__(self) -> str:
        return (
            f"Batch(tokens={self.tokens}, decode_seqs={self.decode_seqs}, "
            f"decode_context_tokens={self.decode_context_tokens}, "
            f"decode_context_max={self.decode_context_max}, prefills={list(self.prefills)}, "
            f"sampled_seqs={self.sampled_seqs})"
        )


class StepTime(Protocol):
    """How long engine steps take on one replica of one expert (the period between outputs).

    Implementations live in `ersim.steptime`; `ersim.system` only calls these two.
    """

    def step_s(self, batch: Batch) -> float:
        """Seconds that this step takes (mean, no noise)."""
        ...

    def decode_run_s(
        self, decode_seqs: int, context_tokens: int, context_max: int, steps: int
    ) -> npt.NDArray[np.float64]:
        """Seconds of each of `steps` consecutive pure decode steps, shape (steps,).

        Every sequence grows by one token a step: step i has context_tokens + i * decode_seqs and
        context_max + i. Equals `step_s` on the same batches.
        """
        ...


@dataclass(frozen=True, slots=True)
class RoutingQuery:
    """All that a router may know of a request: never its domain label or its answer length."""

    text: str
    prompt_tokens: int | None = None
    max_tokens: int | None = None


class ReplicaState(Protocol):
    """What a balancer may see of one replica, in the simulator and live."""

    @property
    def running(self) -> int:
        """Requests in the engine's running batch."""
        ...

    @property
    def waiting(self) -> int:
        """Requests sent to the replica and not yet running."""
        ...

    @property
    def kv_used_fraction(self) -> float:
        """Share of KV blocks in use, 0 to 1."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether the replica accepts requests."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertState:
    """What a routing policy may see of one expert: its identity, price and replicas.

    `usd_per_mtok_in` and `usd_per_mtok_out` are prices per million tokens, None when unknown.
    `slots` is the number of sequences that all its replicas can run at once.
    """

    name: str
    model: str
    domains: tuple[str, ...]
    replicas: Sequence[ReplicaState]
    slots: int
    usd_per_mtok_in: float | None = None
    usd_per_mtok_out: float | None = None


@dataclass(frozen=True, slots=True)
class FleetState:
    """The visible state of the whole fleet; experts are in the fleet's order."""

    experts: Sequence[ExpertState]


@dataclass(frozen=True, slots=True)
class Decision:
    """Which expert answers, by its index in the fleet, and why (one short phrase for headers and logs)."""

    expert: int
    reason: str
