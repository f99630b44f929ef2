"""Open arrivals against the theory of their process, and sessions carried on by later arrivals."""

from __future__ import annotations

from dataclasses import astuple
from itertools import islice

import numpy as np
import pytest
from scipy import stats

from ersim.config import WorkloadConfig
from ersim.errors import ConfigError, SimulationError
from ersim.workload import PromptSet, build_workload
from ersim.workload.opened import READING_S_PER_TOKEN, arrival_times


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff([0.0, *islice(arrival_times(8.0, 1.0, 0), 20_000)])
    assert stats.kstest(gaps, "expon", args=(0, 1 / 8)).pvalue > 1e-3


@pytest.mark.parametrize("cv", [0.3, 2.0])
def test_gamma_gaps_have_the_rate_and_cv_asked_for(cv: float) -> None:
    gaps = np.diff([0.0, *islice(arrival_times(5.0, cv, 4), 100_000)])
    assert gaps.mean() == pytest.approx(0.2, rel=4 * cv / 100_000**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_arrival_times_do_not_depend_on_the_chunk() -> None:
    whole = list(islice(arrival_times(3.0, 1.5, 1, chunk=4096), 100))
    pieces = list(islice(arrival_times(3.0, 1.5, 1, chunk=7), 100))
    assert pieces == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("turns", [1.0, 5.0])
def test_arrivals_are_in_order_and_the_same_each_time(prompts: PromptSet, turns: float) -> None:
    config = WorkloadConfig(arrivals="gamma", rate_rps=20.0, cv=2.0, requests=6000, turns=turns)
    workload = build_workload(config, prompts, 1, 3)
    requests = list(workload.arrivals())
    times = [request.arrival_s for request in requests]
    assert not workload.closed
    assert len(requests) == 6000 and times == sorted(times)
    assert [request.request_id for request in requests] == list(range(6000))
    assert [astuple(request) for request in workload.arrivals()] == [astuple(r) for r in requests]


def test_requests_default_to_the_documented_number(prompts: PromptSet) -> None:
    config = WorkloadConfig(arrivals="poisson", rate_rps=1.0)
    assert sum(1 for _ in build_workload(config, prompts, 1, 0).arrivals()) == 2000
    assert sum(1 for _ in build_workload(config, prompts, 300, 0).arrivals()) == 3000


def test_sessions_keep_their_mean_and_never_answer_before_the_pause(prompts: PromptSet) -> None:
    config = WorkloadConfig(
        arrivals="poisson", rate_rps=50.0, requests=40_000, turns=4.0, think_s=1.0, system_prompt_tokens=10
    )
    before: dict[int, tuple[float, int, int]] = {}
    opened = 0
    for request in build_workload(config, prompts, 1, 0).arrivals():
        assert request.arrival_s is not None and request.user == request.session
        opened += (
            request.turn == 0 and request.request_id >= 20_000
        )  # at first nobody has anything to carry on
        if request.turn:
            then_s, turn, answer_tokens = before[request.session]
            assert request.turn == turn + 1
            assert request.arrival_s >= then_s + READING_S_PER_TOKEN * answer_tokens
        before[request.session] = (request.arrival_s, request.turn, request.output_tokens)
    assert 20_000 / opened == pytest.approx(4.0, rel=0.05)


def test_open_workload_has_no_users(prompts: PromptSet) -> None:
    workload = build_workload(WorkloadConfig(arrivals="poisson", rate_rps=1.0), prompts, 1, 0)
    for ask in (workload.next_request, workload.think_s, workload.start_s):
        with pytest.raises(SimulationError, match=r"OpenWorkload is open"):
            ask(0)


def test_a_rate_is_needed(prompts: PromptSet) -> None:
    with pytest.raises(ConfigError, match=r"workload.rate_rps must be set for poisson arrivals"):
        build_workload(WorkloadConfig(arrivals="poisson"), prompts, 1, 0)
    with pytest.raises(ConfigError, match=r"workload.rate_rps must be > 0"):
        build_workload(WorkloadConfig(arrivals="poisson", rate_rps=0.0), prompts, 1, 0)
