"""Real vLLM experts: what passes through the gateway, what the recorder sees, what a crash costs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ersim.config import LengthsConfig, PromptSetConfig, WorkloadConfig
from ersim.workload import build_workload, load_prompt_set
from testbed.expert_server import answers, free_port

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("vllm", reason="needs the real vLLM: make test-live")
pytestmark = pytest.mark.live


def workload(users: int, seed: int, think_s: float = 0.1) -> Any:
    lengths = LengthsConfig(prompt_scale=0.05, output_scale=0.15, max_total_tokens=1000)
    config = WorkloadConfig(think_s=think_s, ramp_s=0.5, lengths=lengths)
    prompts = load_prompt_set(PromptSetConfig())
    return build_workload(config, prompts, users, seed, None), prompts.prompts


async def ask(url: str, body: dict[str, Any], path: str = "/v1/completions") -> tuple[int, bytes, Any]:
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as answer:
        return answer.status, await answer.read(), answer.headers


def token_ids(data: bytes) -> list[int]:
    from testbed.sse import TokenStream

    stream = TokenStream()
    stream.feed(data)
    assert stream.done
    return stream.token_ids


def test_the_gateway_gives_the_experts_own_answer(live: Any) -> None:
    body = {
        "model": "large", "prompt": "w5 w6 w7 w8", "max_tokens": 12, "ignore_eos": True, "temperature": 0.0,
        "stream": True, "return_token_ids": True, "unknown_to_everyone": {"a": 1},
    }  # fmt: skip
    direct = asyncio.run(ask(live.fleet.urls()["large"][0], body))
    routed = asyncio.run(ask(live.gateway_url, body))
    assert direct[0] == routed[0] == 200
    assert token_ids(direct[1]) == token_ids(routed[1]) and len(token_ids(routed[1])) == 12
    assert routed[2]["X-Ersim-Expert"] == "large"


def test_chat_models_and_errors_of_the_expert_pass_through(live: Any) -> None:
    chat = {"model": "auto", "messages": [{"role": "user", "content": "w9 w10"}], "max_tokens": 3}
    status, data, headers = asyncio.run(ask(live.gateway_url, chat, "/v1/chat/completions"))
    assert status == 200 and headers["X-Ersim-Expert"] in ("large", "small")
    assert json.loads(data)["usage"]["prompt_tokens"] == 2, "one word is one token"
    long = {"model": "small", "prompt": [5] * 9000, "max_tokens": 3}
    status, data, _ = asyncio.run(ask(live.gateway_url, long))
    assert status == 400 and b"8192" in data


def test_a_client_that_leaves_frees_the_expert(live: Any) -> None:
    from testbed.step_log import read_step_log

    async def leave() -> None:
        body = {"model": "small", "prompt": [7] * 20, "max_tokens": 2000, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession() as session:
            answer = await session.post(
                live.gateway_url + "/v1/completions", json=body, headers={"X-Request-Id": "leaver"}
            )
            await answer.content.readany()
            answer.close()

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    status = None
    while time.monotonic() < deadline and status is None:
        time.sleep(0.5)
        log = read_step_log(live.folder / "small.steps.jsonl")
        status = next((r.status for r in log.requests.values() if "leaver" in r.request_id), None)
    assert status is not None and "ABORT" in status


def test_load_records_and_replay(live: Any) -> None:
    """Closed-loop users through the gateway: nothing fails, steps replay, recording is cheap."""
    from testbed.access_log import read_access_log
    from testbed.load import LoadSettings, run_load
    from testbed.measured import requests_frame
    from testbed.prompt_tokens import PromptTokens
    from testbed.replay import replay
    from testbed.step_log import read_step_log

    users, prompts = workload(4, 11)
    settings = LoadSettings(live.gateway_url, 30, max_duration_s=120)
    load = asyncio.run(run_load(users, 4, settings, prompts, PromptTokens(32000, 11), "load"))
    assert len(load.records) >= 25 and {r.error for r in load.records} == {None}
    assert {r.expert for r in load.records} == {"large", "small"}
    time.sleep(1.5)
    logs = {name: read_step_log(live.folder / f"{name}.steps.jsonl") for name in ("large", "small")}
    frame = requests_frame(load, read_access_log(live.folder / "access.jsonl"), logs, prompts)
    assert (frame["output_tokens"] > 0).all() and (frame["first_token_s"] > frame["submit_s"]).all()
    assert frame["gateway_s"].median() < 0.1
    for log in logs.values():
        result = replay(log)
        assert result.steps > 50 and result.share == 1.0, result.first_difference
        assert log.record_overhead() < 0.02


def test_prefix_hits_are_those_of_the_segments(live: Any) -> None:
    """Two prompts that share 256 tokens: the second finds two blocks of 128 in the cache."""
    from ersim.types import Request, Segment
    from testbed.load import Client, LoadSettings
    from testbed.measured import _engine_view
    from testbed.prompt_tokens import PromptTokens
    from testbed.step_log import read_step_log

    async def both() -> None:
        url = live.fleet.urls()["small"][0]
        async with aiohttp.ClientSession() as session:
            client = Client(
                session, LoadSettings(url, 2, model="small"), None, PromptTokens(32000, 5), "prefix"
            )
            for number in (1, 2):
                segments = (Segment(77, 256), Segment(100 + number, 20))
                record = await client.send(Request(number, 0, 0, 276, 2, 2, segments=segments))
                assert record.error is None

    asyncio.run(both())
    time.sleep(1.0)
    view = _engine_view({"small": read_step_log(live.folder / "small.steps.jsonl")})
    assert view["prefix-1"][0] == 0 and view["prefix-2"][0] == 256


def test_a_killed_expert_costs_only_what_was_streaming(live: Any) -> None:
    """Kill `small` under load, wait, start it again: the gateway answers throughout and it comes back.

    One stream of its own is certainly open when it dies; whether a user's is, chance decides.
    """
    from testbed.load import LoadSettings, run_load
    from testbed.prompt_tokens import PromptTokens

    users, prompts = workload(6, 23, think_s=0.05)
    server = live.fleet.servers["small"][0]
    killed: list[float] = []

    async def disturb() -> None:
        await asyncio.sleep(6.0)
        body = {"model": "small", "prompt": [7] * 20, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        url = live.gateway_url + "/v1/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            assert answer.status == 200 and await answer.content.readany(), "the stream is open"
            killed.append(time.monotonic())
            await asyncio.to_thread(server.kill)
            with pytest.raises(aiohttp.ClientError):  # cut where it broke, not ended as if it were whole
                await answer.content.read()

    async def scene() -> Any:
        settings = LoadSettings(live.gateway_url, 10**9, max_duration_s=16)
        load, _ = await asyncio.gather(
            run_load(users, 6, settings, prompts, PromptTokens(32000, 23), "kill"), disturb()
        )
        return load

    load = asyncio.run(scene())
    assert any(r.expert == "small" and r.error is None and r.send_s < killed[0] for r in load.records)
    bad = [r for r in load.records if r.error is not None]
    assert all(r.first_s is not None and r.send_s < killed[0] for r in bad), "only started streams may fail"
    assert len(bad) <= 6
    after = [r for r in load.records if r.send_s > killed[0] + 1.0]
    assert after and all(r.error is None and r.expert == "large" for r in after)
    text = asyncio.run(metrics(live.gateway_url))
    counted = sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("ersim_errors_total") and 'kind="mid_stream"' in line
    )
    assert counted == len(bad) + 1, "the stream that was open for certain, and those of users that were"
    server.start()
    server.wait_ready()
    deadline = time.monotonic() + 10
    seen: set[str] = set()
    while time.monotonic() < deadline and "small" not in seen:
        body = {"model": "auto", "prompt": [5, 6], "max_tokens": 1}
        seen.add(asyncio.run(ask(live.gateway_url, body))[2]["X-Ersim-Expert"])
    assert "small" in seen, "it comes back without a restart of the gateway"


async def metrics(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as answer:
        return await answer.text()


def test_a_port_in_use_by_an_expert_is_said(live: Any) -> None:
    from ersim.errors import ConfigError
    from testbed.expert_server import check_port

    port = int(live.fleet.urls()["large"][0].rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match="a free port"):
        check_port(port, "fleet.experts.large")


def test_nothing_is_left_running(tmp_path: Path) -> None:
    """A fleet that fails half way stops what it had started."""
    from ersim.config import EngineSettings, ExpertConfig, FleetConfig
    from ersim.errors import ErsimError
    from testbed.fleet import LiveFleet

    bad = ExpertConfig("llama-36m", "bf16", "cpu", live={"args": ["--no-such-argument"]})
    good = ExpertConfig("llama-36m", "bf16", "cpu", engine=EngineSettings(max_model_len=2048))
    fleet = LiveFleet(FleetConfig("broken", experts={"good": good, "bad": bad}), tmp_path)
    with pytest.raises(ErsimError, match="no-such-argument"), fleet:
        pass
    assert not any(server.running for server in fleet.all_servers)


def test_a_fleet_is_served_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """`ersim-serve` with one real expert: ready, asked, stopped by Ctrl-C with nothing left."""
    port = free_port()
    command = [
        sys.executable, "-m", "experiments.serve", "expert=tiny_bf16", f"port={port}", f"folder={tmp_path}",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end_s = time.monotonic() + 200
        while not answers(f"http://127.0.0.1:{port}/ready"):
            assert process.poll() is None and time.monotonic() < end_s
            time.sleep(0.5)
        body = {"model": "auto", "prompt": "w5 w6 w7", "max_tokens": 4, "ignore_eos": True}
        status, data, headers = asyncio.run(ask(f"http://127.0.0.1:{port}", body))
        assert status == 200 and json.loads(data)["usage"]["completion_tokens"] == 4
        assert headers["X-Ersim-Expert"] == "tiny_bf16"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert json.loads(output.splitlines()[-1])["restarted"] == {"tiny_bf16": 0}
    settings = json.loads((tmp_path / "serve" / "gateway.json").read_text())
    assert not answers(settings["experts"][0]["urls"][0] + "/health")
    assert not list((tmp_path / "serve").glob("*.steps.jsonl")), "steps are not recorded"


def test_several_front_ends_serve_one_engine(tmp_path: Path) -> None:
    """Both processes stand, requests go through with their ids, and one recorder saw all of them."""
    from ersim.config import EngineSettings, ExpertConfig, FleetConfig
    from testbed.expert_server import _descendants
    from testbed.fleet import LiveFleet
    from testbed.load import LoadSettings, run_load
    from testbed.prompt_tokens import PromptTokens
    from testbed.replay import replay
    from testbed.step_log import read_step_log, request_tag

    settings = EngineSettings(max_model_len=2048, watermark=0.02, scheduler_reserve_full_isl=False)
    expert = ExpertConfig("llama-36m", "bf16", "cpu", engine=settings, live={"api_servers": 2})
    with LiveFleet(FleetConfig("wide", experts={"e": expert}), tmp_path) as fleet:
        server = fleet.servers["e"][0]
        assert server._process is not None
        children = _descendants(server._process.pid)
        names = [Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0].strip() for pid in children]
        assert sorted(name for name in names if "APIServer" in name) == [
            "VLLM::APIServer_0",
            "VLLM::APIServer_1",
        ]
        users, prompts = workload(4, 31)
        load_settings = LoadSettings(server.spec.url, 20, max_duration_s=120, model="e")
        load = asyncio.run(run_load(users, 4, load_settings, prompts, PromptTokens(32000, 31), "wide"))
        time.sleep(1.5)
    assert len(load.records) >= 16 and {record.error for record in load.records} == {None}
    log = read_step_log(server.spec.steps_path)
    assert {record.tag for record in load.records} <= {
        request_tag(request.request_id) for request in log.requests.values()
    }
    assert log.meta["watermark"] == 0.02 and log.meta["scheduler_reserve_full_isl"] is False
    assert replay(log).share == 1.0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children), "a process outlived the server"
