"""Closed-loop users: determinism, sessions, shares, caps and pauses."""

from __future__ import annotations

import random
from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ersim.config import LengthsConfig, PromptSetConfig, WorkloadConfig
from ersim.errors import ConfigError, SimulationError
from ersim.types import Prompt, Request
from ersim.workload import PromptSet, build_workload, load_prompt_set
from ersim.workload.closed import ClosedWorkload

CONFIGS = {
    "plain": WorkloadConfig(),
    "sessions": WorkloadConfig(turns=3.0, system_prompt_tokens=50),
    "capped": WorkloadConfig(turns=3.0, lengths=LengthsConfig(max_total_tokens=3000)),
    "own lengths": WorkloadConfig(turns=2.0, lengths=LengthsConfig(kind="prompts", output_scale=0.5)),
    "weights": WorkloadConfig(domain_weights={"a": 1.0, "b": 3.0}, think_s=0.0),
}


def take(workload: ClosedWorkload, users: int, rounds: int) -> list[Request]:
    return [workload.next_request(user) for _ in range(rounds) for user in range(users)]


@pytest.mark.parametrize("name", CONFIGS)
def test_lazy_in_any_order_equals_eager_in_rounds(name: str, prompts: PromptSet) -> None:
    """Eager: whole rounds from one large block. Lazy: users in random order from blocks of one round."""
    users, rounds = 7, 40
    eager = take(ClosedWorkload(CONFIGS[name], prompts, users, 5, None, block_requests=10_000), users, rounds)
    lazy = ClosedWorkload(CONFIGS[name], prompts, users, 5, None, block_requests=1)
    order = [user for user in range(users) for _ in range(rounds)]
    random.Random(1).shuffle(order)
    drawn = []
    for user in order:
        lazy.think_s(user)  # asking for the pause must not move the user on
        drawn.append(lazy.next_request(user))
    drawn.sort(key=lambda request: request.request_id)
    assert [astuple(request) for request in drawn] == [astuple(request) for request in eager]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_user_asks_the_same_however_many_there_are(name: str, prompts: PromptSet) -> None:
    few = ClosedWorkload(CONFIGS[name], prompts, 2, 9)
    many = ClosedWorkload(CONFIGS[name], prompts, 5000, 9)
    for _ in range(30):
        assert few.think_s(1) == many.think_s(1)
        one, other = few.next_request(1), many.next_request(1)
        assert (one.prompt_index, one.prompt_tokens, one.output_tokens, one.turn) == (
            other.prompt_index,
            other.prompt_tokens,
            other.output_tokens,
            other.turn,
        )


def test_same_seed_same_requests_other_seed_other_requests(prompts: PromptSet) -> None:
    first, again, other = (
        [astuple(request) for request in take(ClosedWorkload(WorkloadConfig(), prompts, 3, seed), 3, 20)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_request_ids_are_round_times_users_plus_user(prompts: PromptSet) -> None:
    requests = take(ClosedWorkload(WorkloadConfig(), prompts, 4, 0), 4, 5)
    assert [request.request_id for request in requests] == list(range(20))
    assert [request.user for request in requests] == [0, 1, 2, 3] * 5


def test_blocks_are_kept_only_for_users_who_have_not_come_to_them(prompts: PromptSet) -> None:
    workload = ClosedWorkload(WorkloadConfig(), prompts, 10, 0, None, block_requests=20)
    take(workload, 10, 101)
    assert not workload._blocks
    for _ in range(9):
        workload.next_request(3)
    assert list(workload._blocks) == [51, 52, 53, 54]
    take(workload, 10, 10)
    assert list(workload._blocks) == [56, 57, 58, 59]  # user 3 is nine rounds ahead


@settings(max_examples=30, deadline=None)
@given(
    turns=st.floats(1.0, 8.0),
    system=st.integers(0, 300),
    kind=st.sampled_from(["conversation", "code", "summarisation", "prompts"]),
    cap=st.one_of(st.none(), st.integers(400, 6000)),
    seed=st.integers(0, 2**40),
)
def test_every_request_is_consistent(
    turns: float, system: int, kind: str, cap: int | None, seed: int
) -> None:
    """Segments add up, later turns hold the earlier ones with their answers, and the cap holds."""
    prompts = PromptSet("p", [Prompt(str(i), "word " * (1 + 9 * i), "xy"[i % 2]) for i in range(20)])
    lengths = LengthsConfig(kind=kind, max_total_tokens=cap, max_tokens_factor=1.5)
    config = WorkloadConfig(turns=turns, system_prompt_tokens=system, lengths=lengths)
    workload = build_workload(config, prompts, 3, seed)
    before: dict[int, Request] = {}
    for _ in range(60):
        for user in range(3):
            request = workload.next_request(user)
            assert request.prompt_tokens >= 1 and request.output_tokens >= 1
            assert request.max_tokens >= 1.5 * request.output_tokens
            assert cap is None or request.prompt_tokens + request.output_tokens <= cap
            if request.segments is not None:
                assert sum(segment.tokens for segment in request.segments) == request.prompt_tokens
            if request.turn:
                _check_follows(before[user], request, prompts)
            before[user] = request


def _check_follows(earlier: Request, later: Request, prompts: PromptSet) -> None:
    assert later.session == earlier.session and later.turn == earlier.turn + 1
    assert earlier.segments is not None and later.segments is not None
    answer = later.segments[len(earlier.segments)]
    assert later.segments[: len(earlier.segments)] == earlier.segments
    assert (answer.content_id, answer.tokens) == (earlier.output_content_id, earlier.output_tokens)
    assert later.prompt_tokens > earlier.prompt_tokens + earlier.output_tokens
    domain = [prompts.prompts[request.prompt_index].domain for request in (earlier, later)]
    assert domain[0] == domain[1]


def test_sessions_have_geometric_lengths(prompts: PromptSet) -> None:
    """Mean 4 turns: a session ends after each turn with probability 1/4."""
    requests = take(ClosedWorkload(WorkloadConfig(turns=4.0), prompts, 200, 3), 200, 200)
    last: dict[int, int] = {}
    for request in requests:
        last[request.session] = max(request.turn, last.get(request.session, 0))
    ended = {request.session for request in requests if request.output_content_id is None}
    counts = np.bincount([last[session] + 1 for session in ended])[1:]
    share = counts / counts.sum()
    assert share[:5] == pytest.approx([0.25 * 0.75**k for k in range(5)], abs=0.015)
    opened = sum(request.turn == 0 for request in requests)
    assert len(requests) / opened == pytest.approx(4.0, rel=0.03)


def test_content_ids_are_shared_only_by_equal_content(prompts: PromptSet) -> None:
    fitted = take(build_workload(WorkloadConfig(turns=2.0, system_prompt_tokens=9), prompts, 20, 0), 20, 50)
    new = [request.segments[-1].content_id for request in fitted if request.segments]
    answers = [r.output_content_id for r in fitted if r.output_content_id is not None]
    assert len(set(new + answers)) == len(new) + len(answers) and 0 not in new + answers
    assert {request.segments[0].content_id for request in fitted if request.segments} == {0}

    own = WorkloadConfig(lengths=LengthsConfig(kind="prompts"))
    seen: dict[int, set[int]] = {}
    for request in take(build_workload(own, prompts, 20, 0), 20, 50):
        assert request.segments is not None
        seen.setdefault(request.prompt_index, set()).add(request.segments[0].content_id)
    assert all(len(ids) == 1 for ids in seen.values())
    assert len(set.union(*seen.values())) == len(seen)


def test_plain_requests_share_nothing(prompts: PromptSet) -> None:
    request = build_workload(WorkloadConfig(), prompts, 1, 0).next_request(0)
    assert request.segments is None and request.output_content_id is None
    assert request.max_tokens == request.output_tokens


def test_only_held_out_prompts_are_asked(prompts: PromptSet) -> None:
    asked = [3, 4, 5, 17, 18, 40]
    for turns in (1.0, 3.0):
        workload = build_workload(WorkloadConfig(turns=turns), prompts, 10, 0, ask=asked)
        assert {request.prompt_index for request in take(workload, 10, 60)} == set(asked)


def test_prompts_are_asked_alike_or_by_domain_weight(prompts: PromptSet) -> None:
    alike = take(build_workload(WorkloadConfig(), prompts, 100, 0), 100, 60)
    counts = np.bincount([request.prompt_index for request in alike], minlength=60)
    assert stats.chisquare(counts).pvalue > 1e-3
    weighted = take(build_workload(CONFIGS["weights"], prompts, 100, 0), 100, 60)
    domains = np.array([prompts.prompts[request.prompt_index].domain for request in weighted])
    assert np.mean(domains == "b") == pytest.approx(0.75, abs=0.02)
    assert not (domains == "c").any()


def test_prompt_text_is_the_floor_of_fitted_lengths() -> None:
    long_texts = PromptSet("long", [Prompt("0", "x" * 20_000, "d"), Prompt("1", "x", "d")])
    for request in take(build_workload(WorkloadConfig(), long_texts, 50, 0), 50, 20):
        assert request.prompt_tokens >= long_texts.own_tokens[request.prompt_index]


def test_fitted_prompt_lengths_survive_the_floor() -> None:
    """With the built-in set the floor moves the mean prompt of the conversation traffic by under 3 %."""
    requests = take(build_workload(WorkloadConfig(), load_prompt_set(PromptSetConfig()), 500, 0), 500, 100)
    mean = np.mean([request.prompt_tokens for request in requests])
    assert mean == pytest.approx(1154.7, rel=0.03)


def test_own_lengths_come_from_the_set(prompts: PromptSet) -> None:
    config = WorkloadConfig(lengths=LengthsConfig(kind="prompts"))
    for request in take(build_workload(config, prompts, 10, 0), 10, 60):
        prompt = prompts.prompts[request.prompt_index]
        assert request.prompt_tokens == prompts.own_tokens[request.prompt_index]
        assert prompt.output_tokens in (None, request.output_tokens)


def test_output_scale_scales(prompts: PromptSet) -> None:
    one, half = (
        take(build_workload(WorkloadConfig(lengths=LengthsConfig(output_scale=scale)), prompts, 5, 0), 5, 50)
        for scale in (1.0, 0.5)
    )
    for whole, scaled in zip(one, half, strict=True):
        assert scaled.prompt_tokens == whole.prompt_tokens
        assert scaled.output_tokens == max(1, round(whole.output_tokens * 0.5))


@pytest.mark.parametrize("turns", [1.0, 3.0])
def test_pauses_are_exponential(prompts: PromptSet, turns: float) -> None:
    workload = build_workload(WorkloadConfig(think_s=2.5, turns=turns), prompts, 100, 0)
    pauses = []
    for _ in range(100):
        for user in range(100):
            pauses.append(workload.think_s(user))
            workload.next_request(user)
    assert stats.kstest(pauses, "expon", args=(0, 2.5)).pvalue > 1e-3


def test_pause_and_session_are_unrelated(prompts: PromptSet) -> None:
    """Both come from one uniform; the pause must not tell whether another turn follows."""
    workload = build_workload(WorkloadConfig(think_s=1.0, turns=2.0), prompts, 100, 0)
    pauses, follows = [], []
    for _ in range(200):
        for user in range(100):
            pauses.append(workload.think_s(user))
            follows.append(workload.next_request(user).output_content_id is not None)
    by_follow = [np.array(pauses)[np.array(follows) == follow] for follow in (True, False)]
    assert stats.ks_2samp(*by_follow).pvalue > 1e-3


def test_no_pause_and_even_ramp(prompts: PromptSet) -> None:
    workload = build_workload(WorkloadConfig(think_s=0.0, ramp_s=4.0), prompts, 8, 0)
    assert workload.closed
    assert [workload.start_s(user) for user in range(8)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert workload.think_s(3) == 0.0
    with pytest.raises(SimulationError, match=r"ClosedWorkload is closed"):
        workload.arrivals()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrivals": "sometimes"}, "workload.arrivals must be one of: closed"),
        ({"think_s": -1.0}, "workload.think_s must be >= 0"),
        ({"turns": 0.5}, "workload.turns must be >= 1"),
        (
            {"domain_weights": {"physics": 1.0}},
            "workload.domain_weights must be one of: a, b, c; got 'physics'",
        ),
        ({"domain_weights": {"a": -1.0}}, "workload.domain_weights.a must be >= 0"),
        ({"domain_weights": {"a": 0.0}}, "must be positive for a domain that can be asked"),
        (
            {"system_prompt_tokens": 100, "lengths": LengthsConfig(max_total_tokens=101)},
            r"max_total_tokens must be >= system_prompt_tokens \+ 2 \(102\), got 101",
        ),
    ],
)
def test_what_cannot_be_generated_is_an_error(
    prompts: PromptSet, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_workload(replace(WorkloadConfig(), **change), prompts, 3, 0)  # type: ignore[arg-type]


def test_nobody_to_ask_or_nothing_to_ask_is_an_error(prompts: PromptSet) -> None:
    with pytest.raises(ConfigError, match=r"users must be >= 1, got 0"):
        build_workload(WorkloadConfig(), prompts, 0, 0)
    with pytest.raises(ConfigError, match=r"no prompt of small is left to ask"):
        build_workload(WorkloadConfig(), prompts, 3, 0, ask=[])
    with pytest.raises(ConfigError, match=r"ask must be indices below 60, got 60"):
        build_workload(WorkloadConfig(), prompts, 3, 0, ask=[60])
