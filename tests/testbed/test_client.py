"""The load client: tokens counted as tokens, prompts that repeat exactly, records without loss."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ersim.config import LengthsConfig, ObjectiveConfig, PromptSetConfig, WorkloadConfig
from ersim.results import REQUEST_COLUMNS, Window
from ersim.types import Request, Segment
from ersim.workload import build_workload, load_prompt_set
from testbed.access_log import read_access_log
from testbed.load import LoadSettings, run_load
from testbed.measured import measured_summary, requests_frame, token_gaps
from testbed.prompt_tokens import PromptTokens
from testbed.sse import TokenStream


def event(ids: list[int] | None = None, **choice: Any) -> bytes:
    if ids is not None:
        choice["token_ids"] = ids
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def test_tokens_are_counted_not_events() -> None:
    stream = TokenStream()
    assert stream.feed(event([1, 2, 3])) == 3
    assert stream.feed(event([4]) + event([])) == 1
    stream.feed(b"data: [DONE]\n\n")
    assert stream.output_tokens == 4 and stream.token_ids == [1, 2, 3, 4] and stream.done


def test_pieces_may_be_cut_anywhere() -> None:
    body = event([1, 2]) + event([3]) + b"data: [DONE]\n\n"
    for size in (1, 3, 7, 50):
        stream = TokenStream()
        total = sum(stream.feed(body[i : i + size]) for i in range(0, len(body), size))
        assert total == 3 and stream.done


def test_without_ids_the_usage_block_corrects_the_count() -> None:
    stream = TokenStream()
    assert stream.feed(event(text=" two words")) == 1
    stream.feed(b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n')
    assert stream.output_tokens == 2


def test_errors_inside_a_stream_are_seen() -> None:
    stream = TokenStream()
    stream.feed(b'data: {"error": {"message": "engine died"}}\n\n')
    assert "engine died" in (stream.error or "")


def request(number: int, tokens: int, **fields: Any) -> Request:
    return Request(number, 0, 0, tokens, 4, 4, **fields)


def test_an_event_that_is_no_object_is_an_error_of_the_stream() -> None:
    stream = TokenStream()
    assert stream.feed(b"data: 5\n\ndata: [1]\n\n") == 0
    assert stream.error is not None and "not a JSON object" in stream.error


def test_prompts_have_exact_lengths_repeat_and_do_not_share() -> None:
    tokens = PromptTokens(32000, 1)
    first = tokens.ids(request(1, 100))
    assert len(first) == 100 and min(first) >= 3 and max(first) < 32000
    assert first == PromptTokens(32000, 1).ids(request(1, 100))
    assert first[:16] != tokens.ids(request(2, 100))[:16]
    assert first[:16] != PromptTokens(32000, 2).ids(request(1, 100))[:16]


def test_shared_segments_share_exactly_their_tokens() -> None:
    tokens = PromptTokens(32000, 1)
    long = tokens.ids(request(1, 60, segments=(Segment(7, 50), Segment(8, 10))))
    short = tokens.ids(request(2, 40, segments=(Segment(7, 30), Segment(9, 10))))
    assert long[:30] == short[:30] and long[30:40] != short[30:]


def test_later_turns_quote_the_answer_that_really_came() -> None:
    tokens = PromptTokens(32000, 1)
    tokens.remember_answer(request(1, 5, output_content_id=99), [11, 12, 13, 14])
    turn = tokens.ids(request(2, 9, segments=(Segment(5, 5), Segment(99, 4))))
    assert turn[5:] == [11, 12, 13, 14]


def test_text_prompts_have_one_word_per_token() -> None:
    tokens = PromptTokens(32000, 1)
    assert len(tokens.text(request(1, 37)).split()) == 37


async def test_users_follow_the_workload_object(make_gateway: Any) -> None:
    """Every user's requests are its workload's, in order; the measured frame has the house's columns."""
    setup = await make_gateway()
    prompts = load_prompt_set(PromptSetConfig())
    config = WorkloadConfig(
        think_s=0.01, ramp_s=0.05, lengths=LengthsConfig(prompt_scale=0.02, output_scale=0.1)
    )
    tokens = PromptTokens(32000, 3)
    load = await run_load(
        build_workload(config, prompts, 4, 5, None),
        4,
        LoadSettings(setup.url, 40),
        prompts.prompts,
        tokens,
        "t",
    )
    assert len(load.records) == 40 and all(record.error is None for record in load.records)
    expected = build_workload(config, prompts, 4, 5, None)
    for user in range(4):
        mine = sorted((r for r in load.records if r.request.user == user), key=lambda r: r.send_s)
        told = [expected.next_request(user) for _ in mine]
        assert [r.request.request_id for r in mine] == [t.request_id for t in told]
        assert [r.output_tokens for r in mine] == [t.output_tokens for t in told]
    frame = requests_frame(load, read_access_log(setup.access_log), {}, prompts.prompts)
    assert list(frame.columns) == list(REQUEST_COLUMNS) and set(frame["expert"]) == {"e0", "e1"}
    assert (frame["gateway_s"] > 0).all() and (frame["submit_s"] >= frame["send_s"]).all()
    gaps = token_gaps(load)
    assert gaps.tokens.sum() == frame["output_tokens"].sum()
    assert gaps.count.sum() == (frame["output_tokens"] - 1).sum()
    window = Window(0.0, load.end_s - load.start_s, True)
    summary = measured_summary(frame, gaps, window, ObjectiveConfig(), None)
    assert summary["completed"] == 40 and summary["power"]["measured"] is False
    assert summary["median_gateway_ms"] > 0 and np.isfinite(summary["p99_itl_ms"])


async def test_a_dead_gateway_gives_failed_records_not_exceptions() -> None:
    prompts = load_prompt_set(PromptSetConfig())
    config = WorkloadConfig(think_s=0.0, ramp_s=0.01, lengths=LengthsConfig(prompt_scale=0.02))
    load = await run_load(
        build_workload(config, prompts, 2, 5, None), 2, LoadSettings("http://127.0.0.1:9", 6),
        prompts.prompts, PromptTokens(32000, 3), "t",
    )  # fmt: skip
    assert len(load.records) == 6
    assert all(record.status == "failed" and record.error for record in load.records)


async def test_time_limits_end_a_run(make_gateway: Any) -> None:
    setup = await make_gateway()
    prompts = load_prompt_set(PromptSetConfig())
    config = WorkloadConfig(think_s=0.01, ramp_s=0.01, lengths=LengthsConfig(prompt_scale=0.02))
    settings = LoadSettings(setup.url, 10**9, max_duration_s=0.5)
    load = await run_load(
        build_workload(config, prompts, 2, 5, None), 2, settings, prompts.prompts, PromptTokens(32000, 3), "t"
    )
    assert load.end_s - load.start_s == pytest.approx(0.5, abs=0.2)
    assert all(record.error is None for record in load.records)


@pytest.mark.parametrize("arrivals", ["closed", "poisson"])
async def test_a_mistake_of_ours_ends_a_run_and_is_shown(
    make_gateway: Any, monkeypatch: pytest.MonkeyPatch, arrivals: str
) -> None:
    setup = await make_gateway()
    prompts = load_prompt_set(PromptSetConfig())
    lengths = LengthsConfig(prompt_scale=0.02)
    config = WorkloadConfig(think_s=0.01, ramp_s=0.01, lengths=lengths, arrivals=arrivals, rate_rps=50.0)

    def broken(self: PromptTokens, request: Request) -> list[int]:
        raise KeyError("no such segment")

    monkeypatch.setattr(PromptTokens, "ids", broken)
    workload = build_workload(config, prompts, 3, 5, None)
    settings = LoadSettings(setup.url, 10**9, max_duration_s=3.0)
    with pytest.raises(KeyError, match="no such segment"):
        await run_load(workload, 3, settings, prompts.prompts, PromptTokens(32000, 3), "t")
