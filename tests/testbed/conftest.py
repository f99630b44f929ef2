"""Gateways over stub upstreams, all in the test's own event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ersim.routing import ExpertProfile, Policy, create_policy
from testbed.expert_server import free_port
from testbed.gateway.app import Gateway, build_gateway
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings
from testbed.stub_upstream import Stub


@dataclass
class Setup:
    """A running gateway with stubs behind it; each is one server: the experts' replicas in order."""

    url: str
    gateway: Gateway
    stubs: list[Stub]
    session: aiohttp.ClientSession
    stop_stub: Callable[[int], Any]
    start_stub: Callable[[int], Any]
    access_log: Path


async def serve(stack: AsyncExitStack, app: web.Application, port: int = 0) -> web.AppRunner:
    """Run an application on loopback until the stack closes; port 0 takes a free one."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    return runner


def port_of(runner: web.AppRunner) -> int:
    """Where a running application listens."""
    return int(runner.addresses[0][1])


@pytest.fixture
async def make_gateway(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Factory: `await make_gateway(experts=2, policy=name_or_fitted, **settings)`; experts are e0, e1 ...

    replicas: so many of each expert, one when None. urls: other servers than stubs, one for each expert.
    """
    async with AsyncExitStack() as stack:

        async def make(
            experts: int = 2,
            policy: str | Policy = "round_robin",
            slots: int = 64,
            replicas: Sequence[int] | None = None,
            urls: Sequence[str] | None = None,
            **options: Any,
        ) -> Setup:
            owners = [f"e{i}" for i, count in enumerate(replicas or [1] * experts) for _ in range(count)]
            stubs = [Stub() for _ in owners]
            ports = [0] * len(owners)  # what a client or another test has taken meanwhile cannot be asked for
            runners: dict[int, web.AppRunner] = {}

            async def start(index: int) -> None:
                runners[index] = await serve(stack, stubs[index].app(), ports[index])
                ports[index] = port_of(runners[index])

            async def stop(index: int) -> None:
                await runners[index].cleanup()

            for index in range(len(stubs)):
                await start(index)
            places: dict[str, list[str]] = {}
            for owner, url in zip(
                owners, urls or [f"http://127.0.0.1:{port}" for port in ports], strict=True
            ):
                places.setdefault(owner, []).append(url)
            endpoints = [ExpertEndpoint(owner, its, slots=slots) for owner, its in places.items()]
            path = tmp_path / "policy.bin"
            if isinstance(policy, str):
                policy = create_policy(policy, [ExpertProfile(e.name, "m") for e in endpoints], {})
            policy.save(path)
            log = tmp_path / "access.jsonl"
            settings = GatewaySettings(
                experts=endpoints, policy_path=str(path), port=free_port(), access_log=str(log),
                **{"health_period_s": 0.1, "health_timeout_s": 0.1, **options},
            )  # fmt: skip
            gateway = build_gateway(settings)
            port = port_of(await serve(stack, gateway.app()))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Setup(f"http://127.0.0.1:{port}", gateway, stubs, session, stop, start, log)

        yield make
