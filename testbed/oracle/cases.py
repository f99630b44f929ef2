"""Random and adversarial workloads for comparing schedulers, each reproducible from one number.

A case is a scheduler configuration and a list of events in the engine core's own time, the index of
`schedule` calls. Half of the cases draw every dimension at random; the others start from a theme
that real traffic or an unkind one would produce (`THEMES`) and vary the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ersim.engine import EngineConfig
from ersim.types import Segment


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What one request asks, before any engine has seen it."""

    request_id: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    priority: int = 0
    segments: tuple[Segment, ...] | None = None
    output_content_id: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that reaches the engine before schedule call `call` (or before the update after it).

    `add` is a new request, `abort` the id of one to forget; exactly one of them is set.
    """

    call: int
    before_update: bool = False
    add: RequestSpec | None = None
    abort: int | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: `seed` reproduces it, `theme` says what it was drawn for."""

    seed: int
    theme: str
    config: EngineConfig
    events: tuple[Event, ...]


@dataclass(slots=True)
class Knobs:
    """What a theme may fix before the rest is drawn; ranges are (low, high), both included."""

    requests: tuple[int, int] = (1, 60)
    prompt: tuple[int, int] = (1, 200)
    output: tuple[int, int] = (1, 60)
    gap: float = 2.0
    burst: float = 0.3
    shared: float = 0.0
    turns: float = 0.0
    repeats: float = 0.0
    answers: float = 0.0
    eos: float = 0.3
    abort: float = 0.0
    priorities: int = 1
    config: dict[str, object] = field(default_factory=dict)


def _anything(rng: random.Random) -> Knobs:
    return Knobs(
        requests=rng.choice([(1, 5), (5, 40), (40, 120)]),
        prompt=rng.choice([(1, 20), (1, 200), (30, 600), (1, 1200)]),
        output=rng.choice([(1, 4), (1, 60), (20, 200)]),
        gap=rng.choice([0.1, 1.0, 5.0, 30.0]),
        burst=rng.random(),
        shared=rng.choice([0.0, 0.5, 0.9]),
        turns=rng.choice([0.0, 0.0, 0.4]),
        repeats=rng.choice([0.0, 0.0, 0.4]),
        answers=rng.choice([0.0, 0.3, 1.0]),
        eos=rng.choice([0.0, 0.3, 1.0]),
        abort=rng.choice([0.0, 0.0, 0.1, 0.3]),
        priorities=rng.choice([1, 3]),
    )


def _chat(rng: random.Random) -> Knobs:
    return Knobs(
        requests=(10, 60), prompt=(5, 120), output=(5, 80), shared=0.9, turns=0.7, answers=1.0, eos=0.8
    )


def _repeats(rng: random.Random) -> Knobs:
    return Knobs(requests=(10, 50), prompt=(16, 96), output=(1, 60), repeats=0.8, answers=1.0, burst=0.8)


def _starved(rng: random.Random) -> Knobs:
    """KV for a handful of requests: preemption after preemption."""
    return Knobs(
        requests=(8, 60),
        prompt=(1, 120),
        output=(10, 120),
        burst=0.9,
        repeats=rng.choice([0.0, 0.5]),
        answers=rng.choice([0.0, 1.0]),
        priorities=rng.choice([1, 3]),
        config={"num_blocks": rng.randint(16, 60), "max_num_seqs": rng.randint(2, 32)},
    )


def _long_prefills(rng: random.Random) -> Knobs:
    """Several long prompts in chunks under a threshold: decodes may starve of budget."""
    return Knobs(
        requests=(5, 40),
        prompt=(100, 1500),
        output=(1, 80),
        burst=0.9,
        repeats=rng.choice([0.0, 0.6]),
        shared=rng.choice([0.0, 0.8]),
        config={
            "long_prefill_token_threshold": rng.choice([8, 17, 64]),
            "max_num_batched_tokens": rng.choice([40, 64, 100, 256]),
            "max_num_seqs": rng.choice([8, 16, 40]),
        },
    )


def _misfits(rng: random.Random) -> Knobs:
    """Prompts at and beyond what max_model_len and the KV cache hold."""
    return Knobs(
        requests=(3, 25),
        prompt=(200, 1100),
        output=(1, 300),
        config={"num_blocks": rng.randint(10, 40), "max_model_len": rng.choice([256, 700, 1024])},
    )


def _crowd(rng: random.Random) -> Knobs:
    return Knobs(requests=(150, 400), prompt=(1, 120), output=(1, 40), gap=0.2, burst=0.9, eos=0.5)


THEMES: dict[str, Callable[[random.Random], Knobs]] = {
    "anything": _anything,
    "chat": _chat,
    "repeats": _repeats,
    "starved": _starved,
    "long_prefills": _long_prefills,
    "misfits": _misfits,
    "crowd": _crowd,
}
WEIGHTS = (10, 3, 3, 5, 4, 2, 1)


def make_case(seed: int, theme: str | None = None) -> Case:
    """Draw the case that belongs to this seed; a theme may be forced."""
    rng = random.Random(seed)
    name = rng.choices(list(THEMES), WEIGHTS)[0]
    name = theme or name
    knobs = THEMES[name](rng)
    config = _draw_config(rng, knobs)
    return Case(seed, name, config, tuple(_draw_events(rng, knobs, config)))


def _draw_config(rng: random.Random, knobs: Knobs) -> EngineConfig:
    block_size = rng.choice([1, 4, 8, 16, 16, 16, 32, 128])
    max_model_len = rng.choice([256, 512, 1024, 2048])
    seqs = rng.choice([1, 2, 4, 8, 16, 64, 256])
    budget = rng.choice([seqs, seqs + 3, 32, 64, 100, 256, 1024, 4096])
    drawn: dict[str, Any] = {
        "max_num_seqs": seqs,
        "max_num_batched_tokens": budget,
        "max_model_len": max_model_len,
        "block_size": block_size,
        "num_blocks": rng.choice([rng.randint(4, 40), rng.randint(20, 200), 2000]) * 16 // block_size + 2,
        "enable_chunked_prefill": rng.random() < 0.85,
        "enable_prefix_caching": rng.random() < 0.65,
        "long_prefill_token_threshold": rng.choice([0, 0, 0, 5, 32, 100]),
        "policy": "priority" if knobs.priorities > 1 or rng.random() < 0.1 else "fcfs",
        "watermark": rng.choice([0.0, 0.0, 0.01, 0.2]),
        "scheduler_reserve_full_isl": rng.random() < 0.6,
        "async_scheduling": rng.random() < 0.5,
    }
    drawn.update(knobs.config)
    drawn["max_num_batched_tokens"] = max(drawn["max_num_batched_tokens"], drawn["max_num_seqs"])
    if not drawn["enable_chunked_prefill"]:
        drawn["max_num_batched_tokens"] = max(drawn["max_num_batched_tokens"], drawn["max_model_len"])
    return EngineConfig(**drawn)


def _draw_events(rng: random.Random, knobs: Knobs, config: EngineConfig) -> list[Event]:
    content = _Content(rng, knobs)
    events: list[Event] = []
    call = 0
    count = min(rng.randint(*knobs.requests), 12 * config.max_num_seqs)  # a long queue adds only length
    for request_id in range(count):
        if rng.random() > knobs.burst:
            call += int(rng.expovariate(1.0 / knobs.gap))
        spec = content.request(request_id)
        events.append(Event(call, before_update=rng.random() < 0.3, add=spec))
        if rng.random() < knobs.abort:
            later = call + int(rng.expovariate(1.0 / 20.0))
            events.append(Event(later, before_update=rng.random() < 0.5, abort=request_id))
    events.sort(key=lambda event: (event.call, event.before_update))
    return events


class _Content:
    """Draws prompts that share: system prompts, further turns of a conversation, full repeats."""

    def __init__(self, rng: random.Random, knobs: Knobs) -> None:
        self.rng = rng
        self.knobs = knobs
        self.next_id = 1000
        self.systems = [Segment(index, rng.randint(1, 150)) for index in range(3)]
        self.past: list[RequestSpec] = []

    def _fresh(self) -> int:
        self.next_id += 1
        return self.next_id

    def request(self, request_id: int) -> RequestSpec:
        rng, knobs = self.rng, self.knobs
        output = rng.randint(*knobs.output)
        max_tokens = output if rng.random() >= knobs.eos else output + rng.randint(1, 40)
        if rng.random() < 0.03:
            output = max_tokens + rng.randint(1, 5)
        segments = self._prompt()
        answer = self._fresh() if rng.random() < knobs.answers else None
        if self.past and rng.random() < knobs.repeats:
            old = rng.choice(self.past)
            segments = old.segments
            answer = old.output_content_id if rng.random() < 0.8 else answer
        prompt = rng.randint(*knobs.prompt) if segments is None else sum(s.tokens for s in segments)
        spec = RequestSpec(
            request_id,
            prompt,
            output,
            max_tokens,
            rng.randrange(knobs.priorities),
            segments,
            answer if segments is not None else None,
        )
        if segments is not None:
            self.past.append(spec)
        return spec

    def _prompt(self) -> tuple[Segment, ...] | None:
        rng, knobs = self.rng, self.knobs
        if knobs.shared + knobs.turns + knobs.repeats == 0.0:
            return None
        words = Segment(self._fresh(), rng.randint(*knobs.prompt))
        if self.past and rng.random() < knobs.turns:
            old = rng.choice(self.past[-8:])
            if old.segments is not None and old.output_content_id is not None:
                said = min(old.output_tokens, old.max_tokens)
                if rng.random() < 0.2:
                    said = rng.randint(1, said)
                return (*old.segments, Segment(old.output_content_id, said), words)
        if rng.random() < knobs.shared:
            system = rng.choice(self.systems)
            if rng.random() < 0.2:
                system = Segment(system.content_id, rng.randint(1, system.tokens))
            return (system, words)
        return (words,)
