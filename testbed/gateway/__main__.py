"""Run the gateway: ``python -m testbed.gateway settings.json``."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from ersim.errors import ErsimError
from testbed.gateway.app import build_gateway
from testbed.gateway.settings import GatewaySettings, read_settings


async def serve(settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM."""
    gateway = build_gateway(settings)
    runner = web.AppRunner(gateway.app(), handler_cancellation=True, access_log=None, keepalive_timeout=75)
    await runner.setup()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        gc.collect()
        gc.freeze()  # the policy's objects are here to stay: full collections need not walk them
        await web.TCPSite(runner, settings.host, settings.port, backlog=4096).start()
        print(f"gateway on http://{settings.host}:{settings.port}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where there is one; the standard loop is somewhat slower."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def main() -> int:
    """Entry point; 2 for bad settings, 1 for a port in use."""
    if len(sys.argv) != 2:
        print("usage: python -m testbed.gateway settings.json", file=sys.stderr)
        return 2
    try:
        settings = read_settings(Path(sys.argv[1]))
    except ErsimError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(settings))
    except ErsimError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gateway.port {settings.port}: cannot listen ({error}); choose another", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
