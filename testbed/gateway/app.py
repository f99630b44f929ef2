"""The gateway's HTTP surface: routes, keys, errors, access log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import reprlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO

import aiohttp
from aiohttp import web

from ersim.errors import ConfigError, ErsimError, bad_value
from ersim.routing import Policy, load_policy
from testbed.gateway.body import json_object
from testbed.gateway.exchange import Exchange
from testbed.gateway.metrics import CONTENT_TYPE, Metrics
from testbed.gateway.proxy import Proxy
from testbed.gateway.query import routing_query
from testbed.gateway.refusal import Unanswered, header_text, refusal
from testbed.gateway.settings import GatewaySettings
from testbed.gateway.upstreams import Fleet

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOG = logging.getLogger(__name__)
FAULT = "the gateway failed on this request; its log says where"
OPEN_PATHS = ("/health", "/ready", "/metrics")
COUNTED_HERE = ("queue_full", "no_replica", "policy", "internal")  # other kinds are counted by attempt
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
        self._created_s = int(time.time())
        self._proxy: Proxy | None = None
        self._log: TextIO | None = None

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(
            middlewares=[self._in_one_shape, self._check_key],
            client_max_size=self.settings.max_body_bytes,
            handler_args={"auto_decompress": False},  # a body that cannot be decoded is ours to refuse
        )
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
        if self.settings.access_log is not None:
            self._log = _opened(self.settings.access_log)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
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
    async def _in_one_shape(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer and count what no expert was chosen for: an error in OpenAI's shape, whatever raised it."""
        try:
            return await handler(request)
        except Unanswered as problem:
            status, message, headers = problem.status, str(problem), problem.headers
        except web.HTTPException as problem:
            if problem.status < 400:
                raise
            status, message = problem.status, f"{problem.reason}: {request.method} {request.path}"
            headers = {"Allow": problem.headers["Allow"]} if "Allow" in problem.headers else {}
        except Exception as error:
            if _begun(request) or isinstance(error, ConnectionError):
                raise
            LOG.exception("the gateway failed on %s %s", request.method, request.path)
            status, message, headers = 500, FAULT, {}
        self.metrics.requests.labels("none", str(status)).inc()
        return refusal(status, message, headers)

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        keys = self.settings.api_keys
        if keys and request.path not in OPEN_PATHS:
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            given = key.strip().encode(errors="surrogateescape")  # a header may hold any bytes
            allowed = [hmac.compare_digest(given, known.encode()) for known in keys]
            if scheme.lower() != "bearer" or not any(allowed):
                message = "a valid bearer key is needed"
                raise Unanswered(401, "bad_request", message, {"WWW-Authenticate": "Bearer"})
        return await handler(request)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """Route and forward one chat or text completion."""
        raw, body = await json_object(request, self.settings.max_body_bytes)
        if not isinstance(body.get("model"), str | None):
            message = f"model must be a string (auto for the router), got {reprlib.repr(body['model'])}"
            raise Unanswered(400, "bad_request", message)
        exchange = Exchange(
            header_text(request.headers.get("X-Request-Id", "")) or uuid.uuid4().hex,
            request.path, request.path_qs, raw, body, routing_query(body), time.monotonic(),
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
        except Exception:
            exchange.error = "internal"
            if _begun(request):
                self.metrics.errors.labels(self._name(exchange), "internal").inc()
                raise
            LOG.exception("the gateway failed on request %r", exchange.request_id)
            return self._refuse(exchange, Unanswered(500, "internal", FAULT))
        finally:
            self._finish(exchange)

    async def adjust_policy(self, request: web.Request) -> web.Response:
        """Change run-time settings of the policy, ``{"share": 0.2}`` say, without training or restart."""
        _, settings = await json_object(request, self.settings.max_body_bytes)
        try:
            self.policy.adjust(**settings)
        except (ErsimError, TypeError) as error:  # TypeError: a name that no setting can have
            raise Unanswered(400, "bad_request", str(error)) from error
        return web.json_response({"policy": self.policy.name, "settings": settings})

    def _name(self, exchange: Exchange) -> str:
        return self.fleet.experts[exchange.expert].name if exchange.expert >= 0 else "none"

    def _refuse(self, exchange: Exchange, problem: Unanswered) -> web.Response:
        exchange.status, exchange.error = problem.status, str(problem)
        if problem.kind in COUNTED_HERE:
            self.metrics.errors.labels(self._name(exchange), problem.kind).inc()
        headers = {"X-Request-Id": exchange.request_id, "X-Ersim-Expert": self._name(exchange)}
        if exchange.reason:
            headers["X-Ersim-Reason"] = header_text(exchange.reason)
        if problem.status in (429, 503):
            headers["Retry-After"] = str(self.settings.retry_after_s)
        return refusal(problem.status, str(problem), headers)

    def _finish(self, exchange: Exchange) -> None:
        self.metrics.requests.labels(self._name(exchange), str(exchange.status)).inc()
        if self._log is not None:
            self._log.write(json.dumps(exchange.log_record(), separators=(",", ":")) + "\n")

    async def models(self, request: web.Request) -> web.Response:
        """The experts, and `auto` for the router."""
        common = {"object": "model", "created": self._created_s, "owned_by": "ersim"}
        entries: list[dict[str, Any]] = [{"id": "auto", **common}]
        for expert in self.fleet.experts:
            entries.append({"id": expert.name, **common, "root": expert.endpoint.model})
        return web.json_response({"object": "list", "data": entries})

    async def health(self, request: web.Request) -> web.Response:
        """The gateway itself lives."""
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """200 when every expert has a replica that a probe found healthy, else 503 with who has not."""
        down = [expert.name for expert in self.fleet.experts if not expert.ready]
        return web.json_response({"ready": not down, "down": down}, status=503 if down else 200)

    async def metrics_text(self, request: web.Request) -> web.Response:
        """Prometheus metrics."""
        return web.Response(body=self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def build_gateway(settings: GatewaySettings) -> Gateway:
    """Load the policy and make the gateway."""
    names = [expert.name for expert in settings.experts]
    return Gateway(settings, load_policy(Path(settings.policy_path), names))


def _begun(request: web.Request) -> bool:
    """Whether the client has been sent anything: then it cannot be answered otherwise any more."""
    return request.writer.output_size > 0


def _opened(access_log: str) -> TextIO:
    path = Path(access_log)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a", buffering=1, encoding="utf-8")
    except OSError as error:
        must = f"a file that can be written ({error.strerror or error})"
        raise bad_value("gateway.access_log", must, access_log) from error
