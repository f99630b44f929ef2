from __future__ import annotations

import numpy as np
import pytest

from ersim.errors import ConfigError
from ersim.results import quality as q

EXPERT = np.array([0, 0, 1, 1, 1, 2])
SCORE = np.array([1.0, 0.0, 1.0, 0.5, np.nan, np.nan])


def test_scores_ignore_requests_without_label() -> None:
    assert q.mean_score(SCORE) == 0.625
    assert q.score_by(EXPERT, SCORE, ["a", "b", "c"]) == {"a": 0.5, "b": 0.75}
    assert q.mean_score(np.array([np.nan])) is None


def test_shares_sum_to_one_and_name_idle_experts() -> None:
    share = q.share_by(EXPERT, ["a", "b", "c", "idle"])
    assert sum(share.values()) == pytest.approx(1.0)
    assert share["idle"] == 0.0


def test_misroutes_by_domain_skip_domains_that_nobody_serves() -> None:
    serves = np.array([[True, False, False], [False, True, False], [False, False, False]])
    domain = np.array([0, 1, 1, 1, 2, 2])
    # Requests 4 and 5 are of domain 2, served by nobody; of the other four, number 1 went astray.
    assert q.misroute_rate_by_domain(EXPERT, domain, serves) == 0.25
    assert q.misroute_rate_by_domain(EXPERT, domain, np.zeros((3, 3), dtype=bool)) is None


def test_misroutes_by_quality_are_zero_for_the_oracle_and_one_for_its_opposite() -> None:
    labels = np.random.default_rng(1).permuted(np.tile([0.0, 0.5, 1.0], (200, 1)), axis=1)
    assert q.misroute_rate_by_quality(labels.argmax(axis=1), labels) == 0.0
    assert q.misroute_rate_by_quality(labels.argmin(axis=1), labels) == 1.0


def test_cost_per_correct_answer_agrees_between_total_and_per_request() -> None:
    score = np.array([1.0, 0.0, 1.0, 1.0])
    usd = np.array([0.1, 0.2, 0.3, 0.4])
    assert q.usd_per_correct_answer(usd, score) == pytest.approx(1.0 / 3)
    assert q.usd_per_correct_answer(1.0, score) == pytest.approx(1.0 / 3)
    assert q.usd_per_correct_answer(1.0, np.zeros(4)) is None
    with pytest.raises(ConfigError, match="usd must be >= 0"):
        q.usd_per_correct_answer(-1.0, score)


def test_load_imbalance_is_one_in_proportion_to_slots_and_count_when_all_go_to_one() -> None:
    assert q.load_imbalance(np.array([0, 1, 1, 1]), [1, 3]) == pytest.approx(1.0)
    assert q.load_imbalance(np.zeros(10, dtype=int), [4, 4, 4, 4]) == pytest.approx(4.0)
    assert q.load_imbalance(np.array([0, 1]), [1, 1], weight=np.array([3.0, 1.0])) == pytest.approx(1.5)


def test_spill_price_is_what_the_scores_say() -> None:
    scores = np.array([[0.9, 0.8], [0.9, 0.8], [0.2, 0.6], [0.5, 0.5]])
    chosen = np.array([0, 1, 1, 1])
    assert q.quality_given_up(scores, chosen) == pytest.approx(0.025)
    assert q.spilled_share(chosen, scores.argmax(axis=1)) == 0.5


def test_strong_share_and_empty_runs() -> None:
    assert q.strong_call_share(EXPERT, np.array([True, False, False])) == pytest.approx(2 / 6)
    nobody = np.array([], dtype=int)
    assert q.strong_call_share(nobody, np.array([True])) is None
    assert q.load_imbalance(nobody, [1]) is None
    assert q.share_by(nobody, ["a"]) == {}
