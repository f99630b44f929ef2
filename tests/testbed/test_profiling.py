"""Driving a plan: what fails is said when it fails, and for its own reason."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from aiohttp import web

from ersim.config import WorkloadConfig
from testbed import profiling
from testbed.expert_server import ExpertFailed, free_port
from testbed.plan import Burst, ProfilePlan
from testbed.profiling import Profiler, ProfileRun
from testbed.stub_upstream import Stub

PLAN = ProfilePlan([16], 1, [1], [16], 2, 100, [1], 0.5, 1, 20.0)


def drive(profiler: Profiler, plan: ProfilePlan = PLAN) -> ProfileRun:
    return asyncio.run(asyncio.wait_for(profiler.run(plan, 8), 30))


async def with_stub(stub: Stub, run: Any) -> Any:
    runner = web.AppRunner(stub.app(), access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        return await asyncio.wait_for(run(f"http://127.0.0.1:{port}"), 30)
    finally:
        await runner.cleanup()


def test_a_server_that_answers_is_driven_through_all_phases() -> None:
    checks: list[float] = []

    async def run(url: str) -> ProfileRun:
        check = lambda: checks.append(time.monotonic())  # noqa: E731
        return await Profiler(url, "e", 1000, WorkloadConfig(), 1, check_alive=check).run(PLAN, 8)

    result = asyncio.run(with_stub(Stub(), run))
    assert [phase.name for phase in result.phases] == ["warmup", "prefill", "decode-c16-b1", "mixed-1"]
    assert not result.failures and len(checks) == 4
    assert all(phase.end_s <= check for phase, check in zip(result.phases, checks, strict=True))


def test_a_server_that_refuses_all_is_said_after_the_first_phase() -> None:
    stub = Stub()
    stub.refuses = 503

    async def run(url: str) -> ProfileRun:
        return await Profiler(url, "e", 1000, WorkloadConfig(), 1).run(PLAN, 8)

    with pytest.raises(ExpertFailed, match=r"no request of 4 of the profile was answered: HTTP 503"):
        asyncio.run(with_stub(stub, run))
    assert stub.requests == 4, "only the warm-up was sent"


def test_a_server_that_is_gone_is_its_own_error_first() -> None:
    def gone() -> None:
        raise ExpertFailed("expert e ended with status 3")

    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ExpertFailed, match="ended with status 3"):
        drive(Profiler(url, "e", 1000, WorkloadConfig(), 1, check_alive=gone))
    with pytest.raises(ExpertFailed, match=r"no request of 4 .*: ClientConnectorError"):
        drive(Profiler(url, "e", 1000, WorkloadConfig(), 1))


def test_a_plan_that_is_over_before_an_answer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    stub = Stub()
    monkeypatch.setattr(stub, "complete", silent)

    async def run(url: str) -> ProfileRun:
        short = ProfilePlan([16], 1, [1], [16], 2, 100, [1], 0.5, 1, 0.3)
        return await Profiler(url, "e", 1000, WorkloadConfig(), 1).run(short, 8)

    with pytest.raises(ExpertFailed, match=r"no request of 0 .*none ended in time; raise plan\.seconds"):
        asyncio.run(with_stub(stub, run))


def test_an_error_of_our_own_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *args: Any) -> None:
            pass

        async def send(self, request: Any) -> Any:
            if request.prompt_tokens == 7:
                raise ZeroDivisionError("ours")
            await asyncio.sleep(60)

    monkeypatch.setattr(profiling, "Client", Broken)
    profiler = Profiler("http://127.0.0.1:9", "e", 1000, WorkloadConfig(), 1)
    began_s = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="ours"):
        asyncio.run(profiler._phase(Burst("b", [(16, 2), (7, 2)], 2), 20.0, 1))
    assert time.monotonic() - began_s < 5, "it waited for the others"
