"""The gateway's HTTP surface: routes, keys, errors, access log."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO

import aiohttp
from aiohttp import web

from ersim.errors import ConfigError, ErsimError
from ersim.routing import Policy, load_policy
from testbed.gateway.exchange import Exchange
from testbed.gateway.metrics import Metrics
from testbed.gateway.proxy import Proxy, Unanswered, error_body, header_text
from testbed.gateway.query import routing_query
from testbed.gateway.settings import GatewaySettings
from testbed.gateway.upstreams import Fleet

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
NOT_JSON = (ValueError, RecursionError)  # the second for arrays in arrays in arrays
OPEN_PATHS = ("/health", "/ready", "/metrics")
KEEP_IDLE_S = 4.0  # less than the 5 s after which vLLM closes an idle connection, perhaps under a request


class Gateway:
    """Handlers and what they share."""

    def __init__(self, settings: GatewaySettings, policy: Policy) -> None:
        names = [expert.name for expert in settings.experts]
        if list(policy.experts) != names:
            raise ConfigError(
                f"gateway.policy_path: the policy was made for experts {list(policy.experts)}, the fleet has "
                f"{names}; fit it for this fleet"
            )
        self.settings = settings
        self.fleet = Fleet(settings)
        self.metrics = Metrics(self.fleet)
        self.policy = policy
        self._proxy: Proxy | None = None
        self._log: TextIO | None = None

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._check_key], client_max_size=self.settings.max_body_bytes)
        app.router.add_post("/v1/chat/completions", self.completion)
        app.router.add_post("/v1/completions", self.completion)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/policy", self.adjust_policy)
        app.router.add_get("/health", self.health)
        app.router.add_get("/ready", self.ready)
        app.router.add_get("/metrics", self.metrics_text)
        app.cleanup_ctx.append(self._run)
        return app

    async def _run(self, app: web.Application) -> AsyncIterator[None]:
        """Upstream session, health watch and access log for as long as the app lives."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.settings.connect_timeout_s)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_IDLE_S)
        if self.settings.access_log:
            Path(self.settings.access_log).parent.mkdir(parents=True, exist_ok=True)
            self._log = open(self.settings.access_log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False
        ) as session:
            self._proxy = Proxy(self.settings, self.fleet, self.policy, self.metrics, session)
            watch = asyncio.create_task(self.fleet.watch(session))
            try:
                yield
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
                if self._log is not None:
                    self._log.close()

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        keys = self.settings.api_keys
        if keys and request.path not in OPEN_PATHS:
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            given = key.strip().encode(errors="surrogateescape")  # a header may hold any bytes
            allowed = [hmac.compare_digest(given, known.encode()) for known in keys]
            if scheme.lower() != "bearer" or not any(allowed):
                return web.json_response(error_body(401, "a valid bearer key is needed"), status=401)
        return await handler(request)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """Route and forward one chat or text completion."""
        try:
            raw = await request.read()
            body = json.loads(raw)
        except web.HTTPRequestEntityTooLarge:
            return web.json_response(error_body(413, "the request is too large"), status=413)
        except NOT_JSON as error:
            return web.json_response(error_body(400, f"the body is not JSON: {error}"), status=400)
        if not isinstance(body, dict):
            return web.json_response(error_body(400, "the body must be a JSON object"), status=400)
        exchange = Exchange(
            request.headers.get("X-Request-Id") or uuid.uuid4().hex,
            request.path, raw, body, routing_query(body), time.monotonic(),
        )  # fmt: skip
        try:
            assert self._proxy is not None  # set before the first request is taken
            return await self._proxy.answer(request, exchange)
        except Unanswered as problem:
            return self._refuse(exchange, problem)
        except asyncio.CancelledError:
            exchange.error = "client_gone"
            self.metrics.errors.labels(self._name(exchange), "client_gone").inc()
            raise
        finally:
            self._finish(exchange)

    async def adjust_policy(self, request: web.Request) -> web.Response:
        """Change run-time settings of the policy, ``{"share": 0.2}`` say, without training or restart."""
        try:
            settings = json.loads(await request.read())
        except NOT_JSON as error:
            return web.json_response(error_body(400, f"the body is not JSON: {error}"), status=400)
        if not isinstance(settings, dict):
            return web.json_response(error_body(400, "the body must be a JSON object"), status=400)
        try:
            self.policy.adjust(**settings)
        except (ErsimError, TypeError) as error:  # TypeError: a name that no setting can have
            return web.json_response(error_body(400, str(error)), status=400)
        return web.json_response({"policy": self.policy.name, "settings": settings})

    def _name(self, exchange: Exchange) -> str:
        return self.fleet.experts[exchange.expert].name if exchange.expert >= 0 else "none"

    def _refuse(self, exchange: Exchange, problem: Unanswered) -> web.Response:
        exchange.status, exchange.error = problem.status, str(problem)
        if problem.kind in ("queue_full", "no_replica"):  # other kinds were counted by attempt
            self.metrics.errors.labels(self._name(exchange), problem.kind).inc()
        headers = {"X-Request-Id": exchange.request_id, "X-Ersim-Expert": self._name(exchange)}
        if exchange.reason:
            headers["X-Ersim-Reason"] = header_text(exchange.reason)
        if problem.status in (429, 503):
            headers["Retry-After"] = str(self.settings.retry_after_s)
        return web.json_response(
            error_body(problem.status, str(problem)), status=problem.status, headers=headers
        )

    def _finish(self, exchange: Exchange) -> None:
        self.metrics.requests.labels(self._name(exchange), str(exchange.status)).inc()
        if self._log is not None:
            self._log.write(json.dumps(exchange.log_record(), separators=(",", ":")) + "\n")

    async def models(self, request: web.Request) -> web.Response:
        """The experts, and `auto` for the router."""
        entries: list[dict[str, Any]] = [{"id": "auto", "object": "model", "owned_by": "ersim"}]
        for expert in self.fleet.experts:
            entries.append(
                {"id": expert.name, "object": "model", "owned_by": "ersim", "root": expert.endpoint.model}
            )
        return web.json_response({"object": "list", "data": entries})

    async def health(self, request: web.Request) -> web.Response:
        """The gateway itself lives."""
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """200 when every expert has a healthy replica, else 503 with who has not."""
        down = [expert.name for expert in self.fleet.experts if not expert.healthy]
        return web.json_response({"ready": not down, "down": down}, status=503 if down else 200)

    async def metrics_text(self, request: web.Request) -> web.Response:
        """Prometheus metrics."""
        return web.Response(body=self.metrics.text(), content_type="text/plain")


def build_gateway(settings: GatewaySettings) -> Gateway:
    """Load the policy and make the gateway."""
    names = [expert.name for expert in settings.experts]
    return Gateway(settings, load_policy(Path(settings.policy_path), names))
