"""A stand-in for an expert that answers at once: for the gateway's benchmark and its tests alone.

It computes nothing, so that what is measured is the gateway. Never used to predict or validate.
``python -m testbed.stub_upstream PORT`` serves; answers hold `max_tokens` one-token events, spaced
by `pace_s` of the body (0 by default), and `fail` of the body asks for a fault: "500", "cut". A stub whose
`refuses` is a status answers every completion with it while its health stays good; with `kv_used` set its
`/metrics` tells that share as vLLM does, without it has none, and `ill` is the status of its health.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from aiohttp import web

from testbed.arguments import whole


def _event(number: int) -> bytes:
    choice = {"index": 0, "text": f" w{number}", "token_ids": [number + 3], "finish_reason": None}
    return b"data: " + json.dumps({"object": "text_completion", "choices": [choice]}).encode() + b"\n\n"


class Stub:
    """Counts what it was asked; `aborted` are requests whose client went away."""

    def __init__(self) -> None:
        self.requests = 0
        self.aborted = 0
        self.bodies: list[bytes] = []
        self.keep_bodies = False
        self.refuses: int | None = None
        self.kv_used: float | None = None
        self.metrics_read = 0
        self.ill: int | None = None

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        return app

    async def health(self, request: web.Request) -> web.Response:
        """Well, unless it is to be ill."""
        return web.Response(status=self.ill or 200)

    async def metrics(self, request: web.Request) -> web.Response:
        """The share of KV blocks in use, where it is known."""
        self.metrics_read += 1
        if self.kv_used is None:
            raise web.HTTPNotFound
        gauge = f'vllm:kv_cache_usage_perc{{engine="0",model_name="a b"}} {self.kv_used}'
        return web.Response(text=f"# TYPE vllm:kv_cache_usage_perc gauge\n{gauge}\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer with a stream, or with one JSON document."""
        raw = await request.read()
        body = json.loads(raw)
        self.requests += 1
        if self.keep_bodies:
            self.bodies.append(raw)
        status = 500 if body.get("fail") == "500" else self.refuses
        if status is not None:
            return web.json_response({"error": {"message": "asked to fail"}}, status=status)
        if not body.get("stream"):
            return web.json_response({"choices": [{"index": 0, "text": "w3"}], "model": body.get("model")})
        return await self._stream(request, body)

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        pace_s = float(body.get("pace_s", 0.0))
        try:
            for number in range(int(body.get("max_tokens", 1))):
                if pace_s:
                    await asyncio.sleep(pace_s)
                await response.write(_event(number))
                if body.get("fail") == "cut" and number == 1:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionResetError, asyncio.CancelledError):
            self.aborted += 1
            raise
        return response


def main() -> int:
    """Serve on loopback until interrupted; 2 for no port, 1 for one that is taken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("port", type=whole(1, 65535), help="TCP port on 127.0.0.1")
    port = parser.parse_args().port
    try:
        web.run_app(Stub().app(), host="127.0.0.1", port=port, handler_cancellation=True, print=None)
    except OSError as error:
        print(f"stub_upstream: port {port}: cannot listen ({error}); choose another", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
