"""Sends a request to an expert and its answer back, byte for byte.

Before the first byte of the answer everything may be tried again: on another replica, and, when the
chosen expert has none left or only one attempt is, on another expert. What a request has tried in
vain is not healthy in that request's eyes, so that the policy itself chooses among the rest. After
the first byte nothing is tried: a broken stream stays broken, is cut where it broke, and is counted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from ersim.errors import ErsimError
from ersim.routing import NoHealthyReplica, Policy
from ersim.types import Decision
from testbed.gateway.exchange import Exchange
from testbed.gateway.metrics import Metrics
from testbed.gateway.refusal import Unanswered, header_text
from testbed.gateway.settings import GatewaySettings
from testbed.gateway.upstreams import FAILS_DOWN, Expert, Fleet, QueueFull, Replica

LOG = logging.getLogger(__name__)
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
     "transfer-encoding", "upgrade", "host", "content-length", "expect")
)  # fmt: skip
CLIENTS_OWN = ("Accept", "Accept-Encoding", "User-Agent")  # the client's, or none: never the gateway's
FAILURES = (aiohttp.ClientError, asyncio.TimeoutError, OSError)


class BrokenAttempt(Exception):
    """One attempt failed before the first byte of the answer."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Proxy:
    """Routes and forwards; one object serves all requests of a gateway."""

    def __init__(
        self, settings: GatewaySettings, fleet: Fleet, policy: Policy, metrics: Metrics,
        session: aiohttp.ClientSession,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._fleet = fleet
        self._policy = policy
        self._metrics = metrics
        self._session = session

    def decide(self, exchange: Exchange) -> None:
        """Set the exchange's expert: the one asked for by name, or the policy's choice."""
        begin = time.perf_counter()
        if exchange.automatic:
            decision = self._routed(exchange)
        elif exchange.wanted in self._fleet.by_name:
            decision = Decision(self._fleet.by_name[exchange.wanted], "asked for by name")
        else:
            raise Unanswered(
                404, "unknown_model", f"model {exchange.wanted!r} does not exist; see /v1/models"
            )
        took_s = time.perf_counter() - begin
        exchange.routing_s += took_s
        exchange.expert, exchange.reason = decision.expert, decision.reason
        self._metrics.routing_s.labels(self._fleet.experts[decision.expert].name).observe(took_s)

    def _routed(self, exchange: Exchange) -> Decision:
        """The policy's choice; it may be anybody's code, so whatever it raises ends this request alone."""
        try:
            decision = self._policy.route(exchange.query, self._fleet.state_left(exchange.tried))
            expert, reason = int(decision.expert), str(decision.reason)
            if not 0 <= expert < len(self._fleet.experts):
                raise IndexError(f"expert {expert} of {len(self._fleet.experts)}")
        except ErsimError as error:
            raise Unanswered(503, "no_replica", str(error)) from error
        except Exception as error:
            LOG.exception("policy %s failed on request %r", self._policy.name, exchange.request_id)
            why = f"policy {self._policy.name} failed ({type(error).__name__}); the gateway's log says where"
            raise Unanswered(500, "policy", why) from error
        return Decision(expert, reason)

    async def answer(self, request: web.Request, exchange: Exchange) -> web.StreamResponse:
        """The whole life of one request. Raises Unanswered while nothing has been sent."""
        self.decide(exchange)
        while True:
            expert = self._fleet.experts[exchange.expert]
            begin = time.monotonic()
            try:
                await expert.take_slot()
            except QueueFull as full:
                raise Unanswered(429, "queue_full", str(full)) from full
            exchange.queued_s += time.monotonic() - begin
            try:
                return await self._with_expert(request, exchange, expert)
            except BrokenAttempt as broken:
                self._elsewhere(exchange, expert, broken)
            finally:
                expert.give_slot()

    def _elsewhere(self, exchange: Exchange, expert: Expert, broken: BrokenAttempt) -> None:
        """Let the policy choose another expert after one failed, or give up."""
        if exchange.attempts < self._settings.attempts and self._others_left(exchange):
            exchange.tried.update((exchange.expert, replica.index) for replica in expert.replicas)
            self.decide(exchange)
            if self._has_left(exchange, exchange.expert):
                exchange.reason = f"failover from {expert.name}: {exchange.reason}"
                self._metrics.failovers.labels(expert.name, self._fleet.experts[exchange.expert].name).inc()
                return
        status = 504 if broken.kind == "timeout" else 503 if broken.kind == "no_replica" else 502
        raise Unanswered(status, broken.kind, f"expert {expert.name}: {broken}") from broken

    def _has_left(self, exchange: Exchange, expert: int) -> bool:
        """Whether the expert has a healthy replica that this request has not tried."""
        return any(one.healthy for one in self._fleet.replicas_left(expert, exchange.tried))

    def _others_left(self, exchange: Exchange) -> bool:
        """Whether an expert other than the present one may be asked."""
        if not (self._settings.failover and exchange.automatic):
            return False
        others = (index for index in range(len(self._fleet.experts)) if index != exchange.expert)
        return any(self._has_left(exchange, index) for index in others)

    def _pick(self, exchange: Exchange, expert: Expert) -> Replica:
        """The replica for the next attempt; a tried one again only when nothing else may be asked.

        Raises NoHealthyReplica when the request had better go to another expert, or none is healthy.
        """
        if not exchange.tried:
            return expert.replicas[expert.balancer.pick(expert.replicas)]
        others = self._others_left(exchange)
        if others and exchange.attempts == self._settings.attempts - 1 and self._was_tried(exchange):
            raise NoHealthyReplica(f"the last attempt is not for {expert.name}")
        if others or self._has_left(exchange, exchange.expert):
            left = self._fleet.replicas_left(exchange.expert, exchange.tried)
            return expert.replicas[expert.balancer.pick(left)]
        return expert.replicas[expert.balancer.pick(expert.replicas)]

    @staticmethod
    def _was_tried(exchange: Exchange) -> bool:
        """Whether any replica of the present expert has failed this request."""
        return any(index == exchange.expert for index, _ in exchange.tried)

    async def _with_expert(
        self, request: web.Request, exchange: Exchange, expert: Expert
    ) -> web.StreamResponse:
        """Try the expert until a replica begins to answer, or the request had better go elsewhere."""
        last: BrokenAttempt | None = None
        while exchange.attempts < self._settings.attempts:
            try:
                replica = self._pick(exchange, expert)
            except NoHealthyReplica as none:
                raise last or BrokenAttempt("no_replica", str(none)) from none
            exchange.attempts += 1
            if exchange.attempts > 1:
                self._metrics.retries.labels(expert.name).inc()
            replica.in_flight += 1
            try:
                return await self._attempt(request, exchange, expert, replica)
            except BrokenAttempt as broken:
                self._metrics.errors.labels(expert.name, broken.kind).inc()
                exchange.tried.add((exchange.expert, replica.index))
                last = broken
            finally:
                replica.in_flight -= 1
        raise last or BrokenAttempt("no_replica", "no attempt was left")

    def _upstream_headers(self, request: web.Request, exchange: Exchange) -> CIMultiDict[str]:
        dropped = HOP_BY_HOP | {"content-encoding"}  # the body was decoded when it was read
        if self._settings.api_keys:
            dropped |= {"authorization"}
        headers = CIMultiDict(
            (key, value) for key, value in request.headers.items() if key.lower() not in dropped
        )
        headers["X-Request-Id"] = exchange.request_id
        for key, value in headers.items():
            if not _utf8(value):
                raise Unanswered(400, "bad_request", f"the header {key} is not UTF-8, it cannot be passed on")
        return headers

    def _payload(self, exchange: Exchange, expert: Expert) -> bytes:
        """The client's own bytes; only a different upstream model name makes a new body."""
        name = expert.endpoint.upstream_model
        if name is None:
            return exchange.raw
        return json.dumps({**exchange.body, "model": name}).encode()

    async def _attempt(
        self, request: web.Request, exchange: Exchange, expert: Expert, replica: Replica
    ) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        began = False
        try:
            async with asyncio.timeout(self._settings.first_byte_timeout_s) as limit:
                exchange.submitted_s = time.monotonic()
                async with self._session.post(
                    URL(replica.url + exchange.target, encoded=True),
                    data=self._payload(exchange, expert),
                    headers=self._upstream_headers(request, exchange),
                    skip_auto_headers=CLIENTS_OWN,
                    allow_redirects=False,
                ) as upstream:
                    data = await self._first_bytes(upstream)
                    limit.reschedule(loop.time() + self._settings.idle_timeout_s)
                    exchange.first_in_s = exchange.last_in_s = time.monotonic()
                    response = self._response(upstream, exchange, expert, replica)
                    began = True
                    await response.prepare(request)
                    if data:
                        await response.write(data)
                    exchange.first_out_s = time.monotonic()
                    self._metrics.ttft_s.labels(expert.name).observe(
                        exchange.first_in_s - exchange.received_s
                    )
                    self._metrics.overhead_s.observe(exchange.inbound_s)
                    async for data in upstream.content.iter_any():
                        exchange.last_in_s = time.monotonic()
                        limit.reschedule(loop.time() + self._settings.idle_timeout_s)
                        await response.write(data)
                    await response.write_eof()
                    exchange.last_out_s = time.monotonic()
                    return response
        except FAILURES as error:
            if began:
                return self._cut(request, response, exchange, expert, error)
            raise self._broken(replica, error) from error

    async def _first_bytes(self, upstream: aiohttp.ClientResponse) -> bytes:
        """The first piece of the body; an error status of the server is a broken attempt."""
        data = await upstream.content.readany()
        if upstream.status >= 500:
            raise BrokenAttempt("upstream_status", f"HTTP {upstream.status}: {data[:120]!r}")
        return data

    def _response(
        self, upstream: aiohttp.ClientResponse, exchange: Exchange, expert: Expert, replica: Replica
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
        for key, value in upstream.headers.items():
            if key.lower() not in HOP_BY_HOP:
                response.headers.add(key, value)
        if "Content-Length" in upstream.headers:
            response.content_length = int(upstream.headers["Content-Length"])
        exchange.status, exchange.replica = upstream.status, replica.index
        response.headers["X-Request-Id"] = exchange.request_id
        response.headers["X-Ersim-Expert"] = expert.name
        response.headers["X-Ersim-Replica"] = str(replica.index)
        response.headers["X-Ersim-Reason"] = header_text(exchange.reason)
        response.headers["X-Ersim-Routing-Ms"] = f"{exchange.routing_s * 1e3:.3f}"
        response.headers["X-Ersim-Gateway-Ms"] = f"{exchange.inbound_s * 1e3:.3f}"
        return response

    def _broken(self, replica: Replica, error: BaseException) -> BrokenAttempt:
        """Name a failure before the first byte; who refuses connections is down until its health returns.

        A connection that ends is no such sign: servers close those that have been idle.
        """
        if isinstance(error, asyncio.TimeoutError):
            return BrokenAttempt("timeout", "no answer in time")
        if isinstance(error, aiohttp.ClientConnectorError):
            replica.healthy, replica.fails = False, FAILS_DOWN
        return BrokenAttempt("connect", f"{type(error).__name__}: {error}"[:160])

    def _cut(
        self, request: web.Request, response: web.StreamResponse, exchange: Exchange, expert: Expert,
        error: BaseException,
    ) -> web.StreamResponse:  # fmt: skip
        """End a stream that has begun and cannot go on; the client sees it break, not finish."""
        gone = request.transport is None or request.transport.is_closing()
        kind = "client_gone" if gone else "mid_stream"
        self._metrics.errors.labels(expert.name, kind).inc()
        exchange.error = f"{kind}: {type(error).__name__}: {error}"[:200]
        response.force_close()
        if request.transport is not None:
            request.transport.abort()
        return response


def _utf8(header: str) -> bool:
    """Whether a header's bytes were UTF-8; others arrive as halves of surrogate pairs."""
    try:
        header.encode()
    except UnicodeEncodeError:
        return False
    return True
