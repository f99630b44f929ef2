"""Repeats as one sample: rates over the same seconds, latencies of the same requests."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ersim.config import ObjectiveConfig
from ersim.results import REQUEST_COLUMNS, Gaps, Window
from ersim.types import Request
from testbed.load import LoadResult, RequestRecord
from testbed.pooled import answered, pool, pooled_figures
from testbed.predict import with_shares
from testbed.step_log import LoggedStep, StepLog
from testbed.waits import (
    WAYS,
    Ways,
    add_waits,
    extra_waits,
    gateway_medians,
    recorded_ways,
    requests_under_way,
    resampled,
)

WINDOW = Window(1.0, 3.0, True)


def run(ends_s: list[float], took_s: list[float], first_id: int = 0) -> tuple[pd.DataFrame, Gaps]:
    """Requests of 3 tokens that end at `ends_s` after `took_s`, a third of it before the first token."""
    ends, took = np.array(ends_s), np.array(took_s)
    columns: dict[str, object] = {name: 0 for name in REQUEST_COLUMNS}
    frame = pd.DataFrame(
        {**columns, "request_id": np.arange(first_id, first_id + len(ends)), "domain": "d", "expert": "e",
         "prompt_tokens": 10, "output_tokens": 3, "send_s": ends - took, "submit_s": ends - took,
         "first_token_s": ends - took * 2 / 3, "last_token_s": ends, "status": "completed", "error": None,
         "gateway_s": 0.002, "routing_s": 0.001}
    )  # fmt: skip
    return frame, Gaps(ends, took / 3, np.full(len(ends), 2), np.full(len(ends), 3))


def test_repeats_follow_each_other_cut_to_their_windows() -> None:
    sample = pool([run([0.5, 1.5, 3.0], [0.3, 0.3, 0.6]), run([1.0, 2.0], [0.3, 0.3])], WINDOW)
    assert sample.requests["last_token_s"].tolist() == [0.5, 2.0, 3.0]
    np.testing.assert_allclose(sample.gaps.end_s, [0.5, 2.0, 3.0])
    assert (sample.window.start_s, sample.window.end_s) == (0.0, 4.0)
    frame = sample.requests
    np.testing.assert_allclose(frame["last_token_s"] - frame["send_s"], [0.3, 0.6, 0.3])


def test_latencies_are_those_of_the_judged_requests_and_rates_of_the_window() -> None:
    """A slower prediction ends one of the judged requests after the window: it still counts for E2E."""
    measured = [run([1.2, 2.0, 2.8], [0.3, 0.6, 0.9])]
    judged = [answered(measured[0], WINDOW)]
    assert judged[0].tolist() == [0, 1, 2]
    predicted = [run([1.3, 2.2, 3.4, 3.6], [0.33, 0.66, 0.99, 9.0])]
    real = pooled_figures(measured, WINDOW, judged, ObjectiveConfig())
    told = pooled_figures(predicted, WINDOW, judged, ObjectiveConfig())
    assert told["median_e2el_ms"] == pytest.approx(1.1 * real["median_e2el_ms"])
    assert told["mean_tpot_ms"] == pytest.approx(1.1 * real["mean_tpot_ms"])
    assert (real["completed"], told["completed"]) == (3, 2)
    assert real["output_throughput"] == pytest.approx(4.5)
    assert told["output_throughput"] == pytest.approx(3.0)
    assert told["judged_requests"] == 3


def test_failed_and_unfinished_requests_are_not_judged() -> None:
    frame, gaps = run([1.2, 2.0, 2.8], [0.3, 0.6, 0.9])
    frame.loc[1, "status"] = "failed"
    frame.loc[2, "last_token_s"] = np.nan
    assert answered((frame, gaps), WINDOW).tolist() == [0]


def test_waits_beyond_the_medians_are_added_where_the_client_sees_them() -> None:
    rng = np.random.default_rng(0)
    seconds = np.tile([0.001, 0.0004, 0.0001, 0.003, 0.002, 0.0005], (200, 1))
    seconds[:100, 0] += np.linspace(0.0, 0.05, 100)
    seconds[::3, WAYS.index("in")] = np.nan
    ways = Ways(seconds, np.ones(len(seconds), dtype=np.int64))
    medians = gateway_medians(ways)
    assert medians["routing_s"] == pytest.approx(0.0004)
    assert medians["to_engine_s"] == pytest.approx(0.003)
    waits = extra_waits(ways)
    assert np.array(waits)[:, 1].max() == pytest.approx(0.05, abs=0.002)
    assert np.ptp(np.array(waits)[:, 2]) == 0
    frame, _ = run([5.0] * 4000, [0.9] * 4000)
    seen = add_waits(frame, waits, rng)
    ttft = seen["first_token_s"] - seen["send_s"]
    assert ttft.quantile(0.995) - 0.3 == pytest.approx(0.05, rel=0.1)
    np.testing.assert_allclose(seen["last_token_s"] - 5.0, seen["first_token_s"] - 4.4, atol=1e-9)
    assert seen["gateway_s"].max() == pytest.approx(0.052, rel=0.05)
    pd.testing.assert_frame_equal(add_waits(frame, (), rng), frame)


def test_another_recording_has_as_many_waits_and_other_ones() -> None:
    waits = [[1, 0.001 * number, 0.0, 0.0] for number in range(50)]
    again = resampled(waits, np.random.default_rng(0))
    assert len(again) == 50 and all(one in waits for one in again)
    assert 20 < len({tuple(one) for one in again}) < 40, "1 - 1/e of them are seen"
    assert resampled((), np.random.default_rng(0)) == ()


def test_the_only_token_of_an_answer_waits_on_both_ways() -> None:
    frame, _ = run([5.0], [0.9])
    frame["output_tokens"], frame["first_token_s"] = 1, 5.0
    seen = add_waits(frame, [[1, 0.01, 0.02, 0.015]], np.random.default_rng(0))
    assert seen["last_token_s"][0] == seen["first_token_s"][0] == pytest.approx(5.03)


def test_shares_of_experts_are_figures_with_intervals() -> None:
    blocks = {"a": {"share": 0.75, "share_low": 0.7, "share_high": 0.8}, "b": {"share": 0.25}}
    found = with_shares({"x": 1, "per_expert": blocks}, ["a", "b", "c"])
    assert (found["x"], found["share_a"], found["share_a_low"], found["share_a_high"]) == (1, 0.75, 0.7, 0.8)
    assert (found["share_b"], found["share_b_low"]) == (0.25, None)
    assert found["share_c"] == 0.0, "who answered nothing has none"


def test_ways_are_read_from_the_replica_that_answered() -> None:
    """Replica 0 ended a step at 1.00 s, replica 1 at 1.04: the first byte of each came 10 ms later."""

    def record(number: int, replica: int) -> RequestRecord:
        first = 1.0 + 0.04 * replica + 0.015
        asked = Request(number, 0, 0, 8, 2, 2)
        return RequestRecord(asked, f"t-{number}", 0.9, "a", replica, first_s=first, last_s=1.5)

    def log(replica: int) -> StepLog:
        end = 1.0 + 0.04 * replica
        only = LoggedStep(0, 0.95, 0.951, end - 1e-3, end, 1, 0, 1, 1, 9, 9, (), (), (), 1, 1e-5)
        return StepLog({"async_scheduling": False}, [only], {})

    gate = {"received_s": 0.901, "routing_s": 0.001, "queued_s": 0.0, "submitted_s": 0.904}
    access = {f"t-{n}": {**gate, "first_in_s": 1.0 + 0.04 * n + 0.01} for n in range(3)}
    load = LoadResult([record(0, 0), record(1, 1), record(2, 7)], 0.0, 2.0, [record(3, 0)])
    ways = recorded_ways([load, load], access, {"a": [log(0), log(1)]})
    assert ways.seconds.shape == (4, len(WAYS)), "an unknown replica's way cannot be told"
    out = WAYS.index("out")
    np.testing.assert_allclose(ways.seconds[:, out], 0.01)
    np.testing.assert_allclose(ways.seconds[:, WAYS.index("back")], 0.005)
    assert ways.under_way.tolist() == [4] * 4, "with who was cut off; a load knows nothing of others"


def test_requests_that_met_stolen_time_are_no_usual_ways() -> None:
    """Ten of them, one a second, of 0.7 s in the engine each; what passes there is not looked at."""
    records, access = [], {}
    for number in range(10):
        tag, end = f"t-{number}", number + 0.8
        asked = Request(number, 0, 0, 8, 2, 2)
        first_in_s = end + (0.1 if number in (3, 4) else 0.004)
        records.append(
            RequestRecord(asked, tag, number + 0.1, "a", 0, first_s=first_in_s + 0.001, last_s=end + 0.2)
        )
        gate = {"received_s": number + 0.1, "routing_s": 0.001, "queued_s": 0.0, "submitted_s": number + 0.11}
        access[tag] = {**gate, "first_in_s": first_in_s}

    def log(robbed: tuple[float, float]) -> StepLog:
        """Steps of 10 ms, of which 4 were stolen in between."""
        steps, cpu_s = [], 0.0
        for number in range(1100):
            end, began_s = 0.01 * number, cpu_s
            cpu_s += 0.006 if robbed[0] <= end < robbed[1] else 0.01
            steps.append(
                LoggedStep(number, end - 0.01, end - 0.01, end, end, 1, 0, 1, 1, 9, 9, (), (), (), 1, 1e-5,
                           cpu_s, None, 0.0, began_s, 0.0, 0.0)
            )  # fmt: skip
        return StepLog({"async_scheduling": False, "one_thread": True}, steps, {})

    def calm(robbed: tuple[float, float], *loads: list[RequestRecord]) -> int:
        rounds = [LoadResult(one, 0.0, 10.0, []) for one in loads]
        return len(recorded_ways(rounds, access, {"a": [log(robbed)]}).under_way)

    assert calm((3.0, 5.0), records) == 10 - 4, "those of both seconds, and who came or left just beside them"
    assert calm((3.44, 3.46), records) == 10
    assert calm((0.0, 99.0), records) >= 5, "a profile that was disturbed all the time still says something"
    assert calm((6.0, 11.0), records[:6], records[6:]) >= 5 + 2, "and so does a load that was"


def test_requests_under_way_are_counted_as_each_is_sent() -> None:
    sent_s, ended_s = np.array([3.0, 0.0, 1.0, 2.0]), np.array([4.0, 2.0, np.inf, 2.5])
    assert requests_under_way(sent_s, ended_s).tolist() == [2, 1, 2, 2]


def test_a_request_waits_as_one_that_was_sent_among_as_many() -> None:
    waits = [[1, 0.0, 0.0, 0.001]] * 30 + [[8, 0.0, 0.0, 0.1]] * 20 + [[10, 0.0, 0.0, 0.3]] * 30

    def added_s(users: int) -> set[float]:
        frame, _ = run([5.0] * users, [0.9] * users)
        seen = add_waits(frame, waits, np.random.default_rng(0))
        return set((seen["gateway_s"] - frame["gateway_s"]).round(4))

    assert added_s(1) == {0.001}
    assert added_s(9) == {0.1, 0.3}, "the nearest thirty are those of eight and ten"
    assert added_s(900) == {0.3}
