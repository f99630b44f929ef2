"""Run the gateway: ``python -m testbed.gateway settings.json``.

On SIGINT (Ctrl-C) or SIGTERM it takes no more requests and lets those under way end, for a while; on a
second signal it cuts them and ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from ersim.errors import ErsimError, bad_value
from testbed.gateway.app import build_gateway
from testbed.gateway.settings import GatewaySettings, read_settings

DRAIN_S = 30.0


class CannotListen(ErsimError):
    """The port is taken, or not ours to take."""


async def serve(settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError for bad settings, CannotListen for the port."""
    gateway = build_gateway(settings)
    runner = web.AppRunner(
        gateway.app(), handler_cancellation=True, access_log=None, keepalive_timeout=75,
        shutdown_timeout=2 * DRAIN_S,  # `_end` cuts what is left long before
    )  # fmt: skip
    stop, cut = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lambda: (cut if stop.is_set() else stop).set())
    await runner.setup()
    try:
        gc.collect()
        gc.freeze()  # the policy's objects are here to stay: full collections need not walk them
        await _listen(runner, settings)
        print(f"gateway on {settings.url}", flush=True)
        await stop.wait()
        under_way = sum(replica.in_flight for replica in gateway.fleet.replicas)
        if under_way:
            said = f"waiting up to {DRAIN_S:g} s for {under_way} requests under way; once more to cut them"
            print(said, file=sys.stderr, flush=True)
    finally:
        await _end(runner, cut)


async def _listen(runner: web.AppRunner, settings: GatewaySettings) -> None:
    """Open the socket, and tell a bad host from a bad port."""
    try:
        await web.TCPSite(runner, settings.host, settings.port, backlog=4096).start()
    except (OSError, UnicodeError) as error:  # the second for what can be no host's name at all
        no_host = isinstance(error, socket.gaierror | UnicodeError)
        if no_host or (isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL):
            raise bad_value("gateway.host", f"an address of this machine ({error})", settings.host) from error
        raise CannotListen(
            f"gateway.port {settings.port}: cannot listen ({error}); choose another"
        ) from error


async def _end(runner: web.AppRunner, cut: asyncio.Event) -> None:
    """Close the gateway; what is under way may end, for DRAIN_S or until `cut` is set."""

    async def cut_the_rest() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(cut.wait(), DRAIN_S)
        for connection in runner.server.connections if runner.server else ():
            if connection.transport is not None:
                connection.transport.abort()

    cutter = asyncio.create_task(cut_the_rest())
    try:
        await runner.cleanup()
    finally:
        cutter.cancel()


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
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(settings))
    except ErsimError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, CannotListen) else 2
    except KeyboardInterrupt:  # before it served
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
