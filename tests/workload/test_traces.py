"""Replay of traces and of recorded requests, and traces that cannot be replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from ersim.config import LengthsConfig, PromptSetConfig, WorkloadConfig
from ersim.errors import ConfigError, DataError
from ersim.types import Request, Segment
from ersim.workload import (
    PromptSet,
    ReplayWorkload,
    build_workload,
    load_prompt_set,
    read_trace,
)

ROWS = pd.DataFrame(
    {
        "arrived_at": [5.0, 5.0, 7.5, 10.0],
        "num_prefill_tokens": [374, 396, 879, 91],
        "num_decode_tokens": [44, 109, 55, 16],
    }
)


def config(path: Path, **more: object) -> WorkloadConfig:
    return replace(WorkloadConfig(arrivals="trace", trace_path=str(path)), **more)  # type: ignore[arg-type]


def csv(table: pd.DataFrame, folder: Path) -> Path:
    path = folder / "trace.csv"
    table.to_csv(path, index=False)
    return path


def replay(path: Path, prompts: PromptSet, **more: object) -> list[Request]:
    return list(build_workload(config(path, **more), prompts, 1, 0).arrivals())


def test_trace_is_replayed_row_by_row(tmp_path: Path, prompts: PromptSet) -> None:
    requests = replay(csv(ROWS, tmp_path), prompts)
    assert [request.arrival_s for request in requests] == [0.0, 0.0, 2.5, 5.0]
    assert [request.prompt_tokens for request in requests] == list(ROWS.num_prefill_tokens)
    assert [request.output_tokens for request in requests] == list(ROWS.num_decode_tokens)
    assert [request.request_id for request in requests] == [0, 1, 2, 3]
    assert all(0 <= request.prompt_index < 60 for request in requests)


def test_speed_scale_cap_and_number(tmp_path: Path, prompts: PromptSet) -> None:
    lengths = LengthsConfig(output_scale=0.5, max_total_tokens=400)
    requests = replay(csv(ROWS, tmp_path), prompts, trace_speed=2.0, requests=3, lengths=lengths)
    assert [request.arrival_s for request in requests] == [0.0, 0.0, 1.25]
    assert [request.output_tokens for request in requests] == [22, 54, 28]
    assert [request.prompt_tokens for request in requests] == [374, 346, 372]


@pytest.mark.parametrize(
    "names",
    [
        ["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
        ["timestamp", "input_tokens", "output_tokens"],
        ["send_s", "prompt_tokens", "output_tokens"],
        ["arrival_time", "prompt_len", "output_len"],
    ],
)
def test_usual_names_are_known(tmp_path: Path, names: list[str]) -> None:
    trace = read_trace(csv(ROWS.set_axis(names, axis=1), tmp_path))
    assert trace.arrival_s is not None and trace.arrival_s.tolist() == [0.0, 0.0, 2.5, 5.0]
    assert trace.prompt_tokens is not None and trace.prompt_tokens.tolist() == [374, 396, 879, 91]


def test_date_times_become_seconds(tmp_path: Path) -> None:
    """The Azure trace as published has times such as 2023-11-16 18:15:46.6805900."""
    stamps = ["2023-11-16 18:15:46.6805900", "2023-11-16 18:15:50.9951690", "2023-11-16 18:15:51.2224670"]
    table = pd.DataFrame(
        {"TIMESTAMP": stamps, "ContextTokens": [374, 396, 879], "GeneratedTokens": [44, 109, 55]}
    )
    trace = read_trace(csv(table, tmp_path))
    assert trace.arrival_s is not None
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 4.314579, 4.541877], abs=1e-6)


def test_prompt_index_of_a_recorded_run_is_kept(tmp_path: Path, prompts: PromptSet) -> None:
    requests = replay(csv(ROWS.assign(prompt_index=[7, 7, 59, 0]), tmp_path), prompts)
    assert [request.prompt_index for request in requests] == [7, 7, 59, 0]
    with pytest.raises(DataError, match=r"row 3: prompt_index must be below 60, the size of small, got 60"):
        replay(csv(ROWS.assign(prompt_index=[7, 7, 60, 0]), tmp_path), prompts)


def test_recorded_run_is_replayed_in_order_of_sending(tmp_path: Path, prompts: PromptSet) -> None:
    """requests.parquet has its rows in order of completion."""
    path = tmp_path / "requests.parquet"
    pd.DataFrame(
        {
            "send_s": [1.0, 0.5, 3.0],
            "prompt_tokens": [10, 20, 30],
            "output_tokens": [1, 9, 2],
            "prompt_index": [4, 5, 6],
        }
    ).to_parquet(path)
    requests = replay(path, prompts)
    assert [request.arrival_s for request in requests] == [0.0, 0.5, 2.5]
    assert [request.prompt_tokens for request in requests] == [20, 10, 30]
    assert [request.prompt_index for request in requests] == [5, 4, 6]


def test_bench_jsonl_is_replayed_at_a_rate(tmp_path: Path, prompts: PromptSet) -> None:
    """vllm bench serve's custom format has texts and answer lengths, no times and no prompt lengths."""
    path = tmp_path / "custom.jsonl"
    path.write_text(
        "".join(
            f'{{"prompt": "{text}", "output_tokens": {n}}}\n'
            for text, n in [("a b", 5), ("c", 6), ("a b", 7)]
        )
    )
    own = load_prompt_set(PromptSetConfig(path=str(path), domain_column=None))
    requests = replay(path, own, rate_rps=10.0)
    assert [request.output_tokens for request in requests] == [5, 6, 7]
    assert [own.prompts[request.prompt_index].text for request in requests] == ["a b", "c", "a b"]
    assert [request.prompt_tokens for request in requests] == [1, 1, 1]
    assert requests[0].segments == requests[2].segments != requests[1].segments
    assert 0 < requests[0].arrival_s < requests[1].arrival_s < requests[2].arrival_s  # type: ignore[operator]
    with pytest.raises(DataError, match=r"has no arrival times: set workload.rate_rps"):
        replay(path, own)
    with pytest.raises(DataError, match=r"row 1: its prompt is not in the prompt set small.*prompts.path"):
        replay(path, prompts, rate_rps=10.0)


def test_mooncake_trace_keeps_its_shared_prefixes(tmp_path: Path, prompts: PromptSet) -> None:
    """Times in ms, and content ids for blocks of 512 tokens: the first two requests share one block."""
    path = tmp_path / "mooncake.jsonl"
    path.write_text(
        '{"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}\n'
        '{"timestamp": 4000, "input_length": 1024, "output_length": 6, "hash_ids": [0, 2]}\n'
    )
    first, second = replay(path, prompts)
    assert (first.arrival_s, second.arrival_s) == (0.0, 3.0)
    assert first.segments == (Segment(1, 512), Segment(2, 188))
    assert second.segments == (Segment(1, 512), Segment(3, 512))
    path.write_text('{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0]}\n')
    with pytest.raises(DataError, match=r"row 1: hash_ids must be a list of 2 whole numbers"):
        read_trace(path)


def test_azure_traces_replay_whole(shared_data: Path, prompts: PromptSet) -> None:
    requests = replay(shared_data / "traces" / "splitwise_conv.csv", prompts)
    assert len(requests) == 19_366
    assert requests[-1].arrival_s == pytest.approx(3501.72, abs=0.01)
    assert sum(request.output_tokens for request in requests) == pytest.approx(211.126 * 19_366, rel=1e-4)


@pytest.mark.parametrize("column", ["num_prefill_tokens", "num_decode_tokens"])
def test_missing_column_lists_those_there(tmp_path: Path, column: str) -> None:
    with pytest.raises(DataError, match=r"trace.csv has no column with .*its columns are: arrived_at, num_"):
        read_trace(csv(ROWS.drop(columns=column), tmp_path))


@pytest.mark.parametrize("length", [-44, 0, 1.5, None, "long", 1e300])
@pytest.mark.parametrize("column", ["num_prefill_tokens", "num_decode_tokens"])
def test_lengths_that_are_none(tmp_path: Path, column: str, length: object) -> None:
    table = ROWS.astype({column: object})
    table.loc[1, column] = length
    with pytest.raises(DataError, match=rf"row 2: {column} must be a whole number >= 1, got"):
        read_trace(csv(table, tmp_path))


@pytest.mark.parametrize("arrival", [None, float("inf"), "soon"])
def test_arrivals_that_are_none(tmp_path: Path, arrival: object) -> None:
    table = ROWS.astype({"arrived_at": object})
    table.loc[2, "arrived_at"] = arrival
    with pytest.raises(DataError, match=r"row 3: arrived_at must be a finite number"):
        read_trace(csv(table, tmp_path))


def test_arrivals_out_of_order(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 3: arrived_at must not be before the row above.*sort"):
        read_trace(csv(ROWS.assign(arrived_at=[1, 5, 4, 6]), tmp_path))


def test_missing_empty_and_broken_traces(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"workload.trace_path: no such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"holds no rows"):
        read_trace(csv(ROWS.iloc[:0], tmp_path))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "output_tokens": 3}\n{"prompt": "b", "outp')
    with pytest.raises(DataError, match=r"cannot be read as jsonl: line 2"):
        read_trace(broken)


def test_settings_that_do_not_go_with_a_trace(tmp_path: Path, prompts: PromptSet) -> None:
    path = csv(ROWS, tmp_path)
    with pytest.raises(ConfigError, match=r"workload.turns must be 1 with trace arrivals"):
        replay(path, prompts, turns=2.0)
    with pytest.raises(ConfigError, match=r"workload.system_prompt_tokens must be 0 with trace arrivals"):
        replay(path, prompts, system_prompt_tokens=10)
    with pytest.raises(ConfigError, match=r"workload.trace_path must be set"):
        build_workload(WorkloadConfig(arrivals="trace"), prompts, 1, 0)


def test_recorded_requests_replay_as_they_are(prompts: PromptSet) -> None:
    made = build_workload(WorkloadConfig(arrivals="poisson", rate_rps=5.0, requests=50), prompts, 1, 0)
    requests = list(made.arrivals())
    replayed = ReplayWorkload(requests)
    assert list(replayed.arrivals()) == requests and replayed.requests == 50
    with pytest.raises(DataError, match=r"request 0: arrival_s must be >= "):
        ReplayWorkload([requests[1], requests[0]])
    with pytest.raises(DataError, match=r"arrival_s must be >= 0.0, got None"):
        ReplayWorkload([replace(requests[0], arrival_s=None)])
