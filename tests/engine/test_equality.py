"""The fast engine equals the one that walks the whole batch, call by call, on random workloads."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_engine import ReferenceSide

from ersim.engine import EngineConfig
from ersim.types import Segment
from testbed.oracle.cases import THEMES, Case, Event, RequestSpec, make_case
from testbed.oracle.sides import ErsimSide, compare

CASES_PER_THEME = 12


def assert_equal(case: Case) -> int:
    steps, difference = compare(case, ErsimSide(case.config), ReferenceSide(case.config))
    assert difference is None, f"{case.seed} {case.theme} {case.config}\n{difference.describe()}"
    return steps


@pytest.mark.parametrize("theme", sorted(THEMES))
def test_equals_the_reference_on_random_cases(theme: str) -> None:
    steps = sum(assert_equal(make_case(seed, theme)) for seed in range(CASES_PER_THEME))
    assert steps > 50


def test_cases_that_once_differed() -> None:
    for seed in (47, 1834):  # a memo that outlived a lone request's threshold; one without chunked prefill
        assert_equal(make_case(seed))


def test_asynchronous_engine_whose_pipeline_runs_dry_in_every_step() -> None:
    for seed in range(60):
        case = make_case(seed)
        if case.config.async_scheduling:
            _, difference = compare(case, ErsimSide(case.config), ReferenceSide(case.config), depth=1)
            assert difference is None, f"{seed} {case.config}\n{difference.describe()}"


requests = st.builds(
    lambda shared, own, output, extra, priority, answer: (shared, own, output, extra, priority, answer),
    shared=st.integers(0, 40),
    own=st.integers(1, 40),
    output=st.integers(1, 25),
    extra=st.sampled_from([0, 0, 3, 30]),
    priority=st.integers(0, 2),
    answer=st.sampled_from([None, 900, 901]),
)
configs = st.builds(
    EngineConfig,
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 60),
    max_model_len=st.just(100),
    block_size=st.sampled_from([1, 2, 4, 16]),
    num_blocks=st.integers(4, 60),
    enable_prefix_caching=st.booleans(),
    long_prefill_token_threshold=st.sampled_from([0, 1, 7]),
    policy=st.sampled_from(["fcfs", "priority"]),
    watermark=st.sampled_from([0.0, 0.1]),
    scheduler_reserve_full_isl=st.booleans(),
    async_scheduling=st.booleans(),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    config=configs,
    drawn=st.lists(st.tuples(requests, st.integers(0, 30)), min_size=1, max_size=14),
    aborts=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 60), st.booleans()), max_size=4),
)
def test_equals_the_reference_on_small_adversarial_cases(
    config: EngineConfig,
    drawn: list[tuple[tuple[int, int, int, int, int, int | None], int]],
    aborts: list[tuple[int, int, bool]],
) -> None:
    """Few contents, tiny caches: nearly every block is shared, duplicated, evicted or taken back."""
    events = []
    for number, ((shared, own, output, extra, priority, answer), call) in enumerate(drawn):
        segments = (Segment(1, shared), Segment(2 + own % 2, own))
        spec = RequestSpec(number, shared + own, output, output + extra, priority, segments, answer)
        events.append(Event(call, add=spec))
    events += [
        Event(call, before_update=late, abort=number) for number, call, late in aborts if number < len(drawn)
    ]
    events.sort(key=lambda event: (event.call, event.before_update))
    assert_equal(Case(0, "hypothesis", config, tuple(events)))
