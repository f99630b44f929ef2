"""The gateway as a process: how it starts, what it says when it cannot, how it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ersim.routing import ExpertProfile, create_policy
from testbed.expert_server import ROOT, free_port
from testbed.gateway.__main__ import _end
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings, to_dict
from testbed.stub_upstream import Stub

from .conftest import port_of, serve

SLOW = {"model": "auto", "prompt": "w5", "max_tokens": 5, "stream": True, "pace_s": 0.2}


def settings_file(folder: Path, **changes: Any) -> Path:
    """A settings file that works but for the changes."""
    policy = folder / "policy.bin"
    create_policy("round_robin", [ExpertProfile("e", "m")], {}).save(policy)
    settings = GatewaySettings([ExpertEndpoint("e", ["http://127.0.0.1:9"])], str(policy), port=free_port())
    path = folder / "gateway.json"
    path.write_text(json.dumps(to_dict(dataclasses.replace(settings, **changes))))
    return path


def test_a_bad_host_log_or_port_is_blamed_by_its_name(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for changes, status, message in (
            (
                {"host": "203.0.113.7", "api_keys": ["k"]},
                2,
                "gateway.host must be an address of this machine",
            ),
            ({"host": "a..b", "api_keys": ["k"]}, 2, "gateway.host must be an address of this machine"),
            ({"access_log": str(tmp_path)}, 2, "gateway.access_log must be a file that can be written"),
            ({"access_log": "/dev/null/log"}, 2, "gateway.access_log must be a file that can be written"),
            ({"policy_path": str(tmp_path)}, 2, f"policy file {tmp_path} cannot be read"),
            ({"port": port}, 1, f"gateway.port {port}: cannot listen"),
        ):
            path = settings_file(tmp_path, **changes)
            done = subprocess.run(
                [sys.executable, "-m", "testbed.gateway", str(path)],
                cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
            assert message in done.stderr


@asynccontextmanager
async def one_stream_under_way(folder: Path, events: int) -> AsyncIterator[tuple[Any, Any]]:
    """A gateway process of its own, and a stream through it that has begun."""
    async with AsyncExitStack() as stack:
        upstream = f"http://127.0.0.1:{port_of(await serve(stack, Stub().app()))}"
        path = settings_file(folder, experts=[ExpertEndpoint("e", [upstream])])
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "testbed.gateway", str(path), cwd=ROOT,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            url = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().split()[-1]
            session = await stack.enter_async_context(aiohttp.ClientSession())
            answer = await session.post(f"{url}/v1/completions", json={**SLOW, "max_tokens": events})
            await answer.content.readany()
            yield process, answer
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def test_on_a_signal_what_is_under_way_may_end(tmp_path: Path) -> None:
    async with one_stream_under_way(tmp_path, events=8) as (process, answer):
        process.send_signal(signal.SIGINT)
        rest = await asyncio.wait_for(answer.content.read(), 10)
        assert rest.endswith(b"data: [DONE]\n\n")
        _, said = await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == 0
        assert said.decode().startswith("waiting up to 30 s for 1 requests under way; once more to cut them")


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    async with one_stream_under_way(tmp_path, events=1000) as (process, answer):
        process.send_signal(signal.SIGINT)
        await answer.content.readany()
        await asyncio.sleep(0.5)
        assert process.returncode is None, "it waits for the stream"
        process.send_signal(signal.SIGINT)
        began_s = time.monotonic()
        with pytest.raises(aiohttp.ClientError):
            await asyncio.wait_for(answer.content.read(), 10)
        _, said = await asyncio.wait_for(process.communicate(), 10)
        assert time.monotonic() - began_s < 3.0 and process.returncode == 0
        assert "Traceback" not in said.decode() and said.count(b"\n") == 1


async def test_what_does_not_end_is_cut_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()

    async def endless(request: web.Request) -> web.Response:
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()
        return web.Response()

    async with AsyncExitStack() as stack:
        app = web.Application()
        app.router.add_get("/", endless)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        session = await stack.enter_async_context(aiohttp.ClientSession())
        asked = asyncio.create_task(session.get(f"http://127.0.0.1:{port_of(runner)}/"))
        await asyncio.sleep(0.1)
        monkeypatch.setattr("testbed.gateway.__main__.DRAIN_S", 0.3)
        await asyncio.wait_for(_end(runner, asyncio.Event()), 5)
        assert ended.is_set()
        with pytest.raises(aiohttp.ClientError):
            await asked
