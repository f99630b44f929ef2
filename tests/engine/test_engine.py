"""The engine by itself: refusals, livelock, the pipeline, long strides, and conservation."""

from __future__ import annotations

import random

import pytest
from reference_engine import ReferenceEngine

from ersim.engine import Engine, EngineConfig, EngineRequest, LivelockError, RejectedRequest, Step
from ersim.errors import ConfigError
from ersim.types import Segment


def drain(engine: Engine) -> list[Step]:
    steps = []
    while (step := engine.start()) is not None:
        assert engine.complete() is step
        steps.append(step)
    return steps


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "output", "max_tokens", "reason"),
    [
        (0, 5, 5, "empty_prompt"),
        (100, 5, 5, "prompt_too_long"),
        (500, 5, 5, "prompt_too_long"),
        (10, 5, 0, "no_output"),
        (10, 0, 5, "no_output"),
    ],
)
def test_refuses_what_vllm_answers_with_400(prompt: int, output: int, max_tokens: int, reason: str) -> None:
    engine = Engine(EngineConfig(max_model_len=100))
    with pytest.raises(RejectedRequest) as refusal:
        engine.add(EngineRequest(7, prompt, output, max_tokens))
    assert refusal.value.reason == reason
    assert "7" in str(refusal.value)
    assert not engine.has_work


def test_answer_is_cut_at_max_model_len_and_ends_by_length() -> None:
    engine = Engine(EngineConfig(max_model_len=100))
    request = EngineRequest(1, 90, 50, 50)
    engine.add(request)
    drain(engine)
    assert (request.generated_tokens, request.finish_reason) == (10, "length")


def test_an_answer_shorter_than_declared_ends_by_stop() -> None:
    for asynchronous in (False, True):
        engine = Engine(EngineConfig(async_scheduling=asynchronous))
        request = EngineRequest(1, 90, 5, 50)
        engine.add(request)
        steps = drain(engine)
        assert (request.generated_tokens, request.finish_reason) == (5, "stop")
        assert sum(step.tokens_out for step in steps) == 5
        assert sum(step.batch.sampled_seqs for step in steps) == 5 + asynchronous  # one row in vain


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("prompt", [200, 60])
def test_a_request_larger_than_the_cache_is_named(reserve: bool, asynchronous: bool, prompt: int) -> None:
    """Whether the prompt does not fit or the answer outgrows the cache: an error, never a hang."""
    config = EngineConfig(
        max_model_len=400,
        max_num_batched_tokens=256,
        num_blocks=5,
        scheduler_reserve_full_isl=reserve,
        async_scheduling=asynchronous,
    )
    engine = Engine(config)
    engine.add(EngineRequest(1, 10, 3, 3))
    culprit = EngineRequest(42, prompt, 100, 100)
    engine.add(culprit)
    with pytest.raises(LivelockError, match="request 42 can never be scheduled") as stuck:
        drain(engine)
    assert stuck.value.request is culprit
    assert stuck.value.needed_blocks > stuck.value.usable_blocks == 4
    engine.abort(culprit)
    assert drain(engine) == []
    assert engine.blocks_used == 0


def test_segments_must_add_up_to_the_prompt() -> None:
    engine = Engine(EngineConfig())
    with pytest.raises(ConfigError, match="segments"):
        engine.add(EngineRequest(1, 30, 5, 5, segments=(Segment(1, 10), Segment(2, 10))))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_seqs": 0},
        {"num_blocks": 1},
        {"watermark": 1.0},
        {"policy": "lifo"},
        {"max_num_seqs": 64, "max_num_batched_tokens": 32},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 512, "max_model_len": 1024},
    ],
)
def test_configurations_that_vllm_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(**wrong)  # type: ignore[arg-type]


# ---- the prefix cache ---------------------------------------------------------------------------


def test_a_repeated_prompt_hits_all_full_blocks_but_the_last_token() -> None:
    engine = Engine(EngineConfig(block_size=16))
    prompts = [(Segment(1, 64),), (Segment(1, 64),), (Segment(1, 40), Segment(2, 30))]
    requests = [EngineRequest(n, sum(s.tokens for s in p), 4, 4, segments=p) for n, p in enumerate(prompts)]
    for request in requests:
        engine.add(request)
        drain(engine)
    assert [request.cached_tokens for request in requests] == [0, 48, 32]


def test_the_next_turn_hits_the_answer() -> None:
    engine = Engine(EngineConfig(block_size=16))
    first = EngineRequest(0, 32, 33, 33, segments=(Segment(1, 32),), output_content_id=5)
    engine.add(first)
    drain(engine)
    again = (Segment(1, 32), Segment(5, 33), Segment(6, 20))
    second = EngineRequest(1, 85, 4, 4, segments=again)
    engine.add(second)
    drain(engine)
    assert second.cached_tokens == 64  # 32 of prompt and 32 answer tokens whose KV was computed


def test_recorded_block_keys_decide_what_is_shared() -> None:
    engine = Engine(EngineConfig(block_size=16))
    for number, (keys, hit) in enumerate([((1, 2, 3), 0), ((1, 2, 4), 32), ((2, 2, 3), 0), ((1, 2, 3), 48)]):
        request = EngineRequest(number, 50, 4, 4, block_keys=keys)
        engine.add(request)
        drain(engine)
        assert request.cached_tokens == hit


def test_recorded_block_keys_find_an_answer_that_is_still_being_written() -> None:
    """Keys that run on into the answer: the blocks written so far are shared, as vLLM shares them."""
    engine = Engine(EngineConfig(block_size=16))
    writing = EngineRequest(0, 40, 100, 100, block_keys=(1, 2, 3, 4, 5, 6, 7, 8))
    engine.add(writing)
    for _ in range(30):
        engine.start()
        engine.complete()
    assert 64 <= writing.computed_tokens < 80, "four whole blocks, 24 tokens of the answer in the last two"
    quoting = EngineRequest(1, 90, 4, 4, block_keys=(1, 2, 3, 4, 5))
    engine.add(quoting)
    drain(engine)
    assert quoting.cached_tokens == 64
    late = EngineRequest(2, 140, 4, 4, block_keys=(1, 2, 3, 4, 5, 6, 7, 8))
    engine.add(late)
    drain(engine)
    assert late.cached_tokens == 128


def test_the_trie_forgets_what_nobody_can_find() -> None:
    engine = Engine(EngineConfig(num_blocks=40, block_size=4, max_num_seqs=4))
    for number in range(300):
        own = (Segment(1, 8), Segment(100 + number, 20))
        engine.add(EngineRequest(number, 28, 6, 6, segments=own, output_content_id=5000 + number))
    drain(engine)
    children = engine.pool.root.children or {}
    live = sum(len(node.children or ()) for node in children.values())
    assert len(children) <= 1 and live <= 40


# ---- long strides -------------------------------------------------------------------------------


def stepwise_and_by_strides(seed: int) -> tuple[list[object], list[object]]:
    """The same run taken step by step, and with every steady stretch taken at once."""
    outcomes = []
    for strides in (False, True):
        rng = random.Random(seed)
        config = EngineConfig(
            max_num_seqs=rng.choice([2, 8]),
            max_num_batched_tokens=64,
            block_size=rng.choice([4, 16]),
            num_blocks=rng.choice([60, 200]) * 4,
            max_model_len=512,
            enable_prefix_caching=rng.random() < 0.5,
            async_scheduling=rng.random() < 0.5,
        )
        engine = Engine(config)
        for number in range(25):
            output = rng.randint(1, 150)
            engine.add(EngineRequest(number, rng.randint(1, 120), output, output + rng.choice([0, 9])))
        seen: list[object] = []
        while engine.has_work:
            steady = engine.steady_steps()
            if strides and steady:
                batch = engine.steady_batch()
                blocks = engine.steady_blocks(steady)
                taken = rng.randint(1, steady)
                engine.advance(taken)
                for step in range(taken):
                    context = batch.decode_context_tokens + step * batch.decode_seqs
                    longest = batch.decode_context_max + step
                    seen.append((batch.decode_seqs, context, longest, [], int(blocks[step])))
                continue
            step = engine.start()
            assert step is not None
            b = step.batch
            engine.complete()
            ended = [request.request_id for request in step.finished]
            seen.append((b.tokens, b.decode_context_tokens, b.decode_context_max, ended, engine.blocks_used))
        outcomes.append(seen)
    return outcomes[0], outcomes[1]


@pytest.mark.parametrize("seed", range(30))
def test_strides_equal_steps(seed: int) -> None:
    stepwise, strides = stepwise_and_by_strides(seed)
    assert stepwise == strides


def test_a_lone_long_answer_is_one_stride() -> None:
    engine = Engine(EngineConfig())
    engine.add(EngineRequest(1, 100, 5000, 5000))
    engine.start()
    engine.complete()
    assert engine.steady_steps() == 4998


# ---- invariants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_requests_and_blocks_are_conserved(seed: int) -> None:
    rng = random.Random(seed)
    config = EngineConfig(
        max_num_seqs=16,
        max_num_batched_tokens=128,
        num_blocks=80,
        max_model_len=600,
        policy=rng.choice(["fcfs", "priority"]),
        enable_prefix_caching=rng.random() < 0.6,
        async_scheduling=rng.random() < 0.5,
    )
    engine = Engine(config)
    requests: list[EngineRequest] = []
    finished: set[EngineRequest] = set()
    aborted: set[EngineRequest] = set()
    delivered = 0
    for _ in range(600):
        if rng.random() < 0.2:
            segments = (Segment(rng.randrange(3), 40), Segment(100 + rng.randrange(20), rng.randint(1, 60)))
            prompt = sum(segment.tokens for segment in segments)
            output = rng.randint(1, 200)
            answer = rng.choice([None, 7, 8])
            request = EngineRequest(len(requests), prompt, output, output, rng.randrange(3), segments, answer)
            engine.add(request)
            requests.append(request)
        if requests and rng.random() < 0.02:
            victim = rng.choice(requests)
            if victim not in finished:
                engine.abort(victim)
                aborted.add(victim)
        if engine.start() is None:
            continue
        step = engine.complete()
        finished.update(step.finished)
        delivered += step.tokens_out
        assert len(requests) == len(finished) + len(aborted) + engine.running + engine.waiting
        assert engine.running <= config.max_num_seqs
        assert step.batch.tokens <= config.max_num_batched_tokens
        assert blocks_in_books(engine) == engine.blocks_total
    assert finished and any(request.preemptions for request in requests)
    assert delivered == sum(request.generated_tokens for request in requests)
    while engine.start() is not None:
        engine.complete()
    assert engine.blocks_used == 0


def blocks_in_books(engine: Engine) -> int:
    """Blocks free without content, free with content, and held, counted piece by piece."""
    pool = engine.pool
    cached, piece = 0, pool.ends.after
    while piece is not pool.ends:
        assert piece.references == 0 and piece.low < piece.high
        cached += piece.high - piece.low
        piece = piece.after
    assert pool.free == pool.unhashed + cached
    return engine.blocks_used + pool.unhashed + cached


def test_reference_reports_rejections_too() -> None:
    with pytest.raises(RejectedRequest):
        ReferenceEngine(EngineConfig(max_model_len=50)).add(EngineRequest(1, 50, 1, 1))


def test_the_result_does_not_depend_on_the_answer_length_before_it_is_reached() -> None:
    """Blindness: two answers that differ in length only are scheduled alike until the shorter one ends."""
    traces = []
    for length in (40, 90):
        engine = Engine(EngineConfig(num_blocks=30, max_num_seqs=4, max_num_batched_tokens=64))
        for number in range(4):
            engine.add(EngineRequest(number, 50, length, 200))
        trace = []
        for _ in range(40):
            step = engine.start()
            assert step is not None
            trace.append((step.batch.tokens, len(step.preempted), engine.blocks_used))
            engine.complete()
        traces.append(trace)
    assert traces[0] == traces[1]
