"""The designed grid of a profile: which requests make which batches, within a time budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ersim.errors import bad_value

PREFILL_ANSWER = 2  # tokens that a prompt sent for its prefill is answered with


@dataclass
class ProfilePlan:
    """What a profile drives through an expert.

    prefill_tokens: prompt lengths sent one at a time, `repeats` times each. decode_batches x
    decode_contexts: that many equal requests at once, each `decode_tokens` long; combinations of
    more than `max_context_tokens` in all are left out. mixed_users: closed loops with the
    workload's own random lengths, `mixed_s` each; such a number of users must not be used to
    validate. rounds: how often all of this is driven (mixed_s is shared among them), so that no part
    of the grid rests on one moment of a shared machine. seconds bounds the whole plan: what no longer
    fits is skipped and said.
    """

    prefill_tokens: list[int] = field(default_factory=lambda: [16, 64, 128, 256, 512, 1024, 2048])
    repeats: int = 2
    decode_batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    decode_contexts: list[int] = field(default_factory=lambda: [64, 512])
    decode_tokens: int = 16
    max_context_tokens: int = 8192
    mixed_users: list[int] = field(default_factory=lambda: [3, 6, 12])
    mixed_s: float = 15.0
    rounds: int = 1
    seconds: float = 150.0


@dataclass(frozen=True)
class Burst:
    """Requests of (prompt, answer) tokens, at most `at_once` under way."""

    name: str
    jobs: Sequence[tuple[int, int]]
    at_once: int


@dataclass(frozen=True)
class ClosedLoop:
    """Users with the workload's random lengths for some time."""

    name: str
    users: int
    seconds: float


Phase = Burst | ClosedLoop


def check_plan(plan: ProfilePlan, max_model_len: int) -> None:
    """Raise ConfigError for a plan that the engine would refuse or that cannot be fitted."""
    for name, answer in (("prefill_tokens", PREFILL_ANSWER), ("decode_contexts", plan.decode_tokens)):
        longest, most = max(getattr(plan, name), default=0), max_model_len - answer
        if longest > most:
            must = f"at most {most} (max_model_len={max_model_len} less {answer} tokens of answer)"
            raise bad_value(f"plan.{name}", must, longest)
    for name in ("prefill_tokens", "decode_batches", "decode_contexts", "mixed_users"):
        if any(value < 1 for value in getattr(plan, name)):
            raise bad_value(f"plan.{name}", "all >= 1", getattr(plan, name))
        if not getattr(plan, name) and name != "mixed_users":
            raise bad_value(f"plan.{name}", "at least one number", getattr(plan, name))
    for name, least in (("repeats", 1), ("decode_tokens", 2), ("rounds", 1)):  # one token: no decode step
        if getattr(plan, name) < least:
            raise bad_value(f"plan.{name}", f">= {least}", getattr(plan, name))
    smallest = min(plan.decode_batches) * min(plan.decode_contexts)
    if plan.max_context_tokens < smallest:
        must = f">= {smallest}, or no decode batch is left of the grid"
        raise bad_value("plan.max_context_tokens", must, plan.max_context_tokens)
    if not 0 < plan.seconds < math.inf:
        raise bad_value("plan.seconds", "a number of seconds > 0", plan.seconds)


def check_common_load(plan: ProfilePlan) -> None:
    """Raise ConfigError for a plan without the common load that a fleet is profiled under."""
    if not plan.mixed_users:
        raise bad_value("plan.mixed_users", "at least one number of users", plan.mixed_users)
    if not 0 < plan.mixed_s < math.inf:
        raise bad_value("plan.mixed_s", "a number of seconds > 0", plan.mixed_s)


def phases(plan: ProfilePlan, max_num_seqs: int) -> Iterator[Phase]:
    """The plan's phases in order: what matters most comes first."""
    yield Burst("warmup", [(128, 8)] * 4, 2)
    for number in range(plan.rounds):
        yield from _round(plan, max_num_seqs, f"/{number + 1}" if plan.rounds > 1 else "")


def _round(plan: ProfilePlan, max_num_seqs: int, suffix: str) -> Iterator[Phase]:
    prefills = [(tokens, PREFILL_ANSWER) for tokens in plan.prefill_tokens for _ in range(plan.repeats)]
    yield Burst(f"prefill{suffix}", prefills, 1)
    for context in plan.decode_contexts:
        for batch in plan.decode_batches:
            if batch <= max_num_seqs and batch * context <= plan.max_context_tokens:
                jobs = [(context, plan.decode_tokens)] * batch
                yield Burst(f"decode-c{context}-b{batch}{suffix}", jobs, batch)
    for users in plan.mixed_users:
        yield ClosedLoop(f"mixed-{users}{suffix}", users, plan.mixed_s / plan.rounds)
