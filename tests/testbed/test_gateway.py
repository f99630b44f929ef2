"""The gateway's promises, each against stub upstreams: what passes, what is retried, what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from ersim.errors import ConfigError
from ersim.routing import ExpertProfile, Policy
from ersim.types import Decision, FleetState, RoutingQuery
from testbed.gateway.app import KEEP_IDLE_S
from testbed.gateway.kv_share import KvShare, kv_share
from testbed.gateway.query import routing_query
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings, check
from testbed.gateway.upstreams import Expert, Fleet
from testbed.stub_upstream import _event

BODY: dict[str, Any] = {"model": "auto", "prompt": "w5 w6", "max_tokens": 5, "stream": True}


async def post(setup: Any, body: Any, path: str = "/v1/completions", **kwargs: Any) -> tuple[int, bytes, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with setup.session.post(setup.url + path, data=data, **kwargs) as answer:
        return answer.status, await answer.read(), answer.headers


async def test_streams_pass_byte_for_byte_with_headers(make_gateway: Any) -> None:
    setup = await make_gateway()
    expected = b"".join(_event(n) for n in range(5)) + b"data: [DONE]\n\n"
    seen = []
    for _ in range(4):
        status, data, headers = await post(setup, BODY)
        assert (status, data) == (200, expected)
        assert headers["Content-Type"] == "text/event-stream"
        assert headers["X-Ersim-Reason"] and float(headers["X-Ersim-Routing-Ms"]) >= 0
        seen.append(headers["X-Ersim-Expert"])
    assert sorted(seen) == ["e0", "e0", "e1", "e1"]


async def test_unknown_fields_and_tools_reach_the_expert_untouched(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1)
    setup.stubs[0].keep_bodies = True
    raw = b'{ "model":"auto",  "messages":[{"role":"user","content":"hi"}], "tools":[{"x":1}],"new":1.50 }'
    status, _, _ = await post(setup, raw, "/v1/chat/completions")
    assert status == 200 and setup.stubs[0].bodies == [raw]


async def test_an_expert_can_be_asked_by_name_and_unknown_models_are_404(make_gateway: Any) -> None:
    setup = await make_gateway()
    for _ in range(3):
        _, _, headers = await post(setup, {**BODY, "model": "e1"})
        assert headers["X-Ersim-Expert"] == "e1"
    status, data, _ = await post(setup, {**BODY, "model": "nobody"})
    assert status == 404 and "nobody" in json.loads(data)["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', b"[" * 200_000])
async def test_bad_bodies_are_400(make_gateway: Any, raw: bytes) -> None:
    status, data, _ = await post(await make_gateway(), raw)
    assert status == 400 and json.loads(data)["error"]["type"] == "invalid_request_error"


async def test_too_large_bodies_are_413(make_gateway: Any) -> None:
    setup = await make_gateway(max_body_bytes=1000)
    assert (await post(setup, {**BODY, "prompt": "w " * 1000}))[0] == 413


async def test_failure_before_the_first_byte_is_retried_elsewhere(make_gateway: Any) -> None:
    setup = await make_gateway(health_period_s=30.0)
    await asyncio.sleep(0.05)
    await setup.stop_stub(0)
    for _ in range(6):
        status, _, headers = await post(setup, BODY)
        assert status == 200 and headers["X-Ersim-Expert"] == "e1"
    errors = setup.gateway.metrics.errors.labels("e0", "connect")._value.get()
    assert errors == 1  # the first failure marks it as down


async def test_a_restarted_expert_comes_back_without_a_gateway_restart(make_gateway: Any) -> None:
    setup = await make_gateway()
    await setup.stop_stub(0)
    await asyncio.sleep(0.8)
    async with setup.session.get(setup.url + "/ready") as answer:
        assert answer.status == 503 and (await answer.json())["down"] == ["e0"]
    await setup.start_stub(0)
    await asyncio.sleep(0.8)
    seen = {(await post(setup, BODY))[2]["X-Ersim-Expert"] for _ in range(4)}
    assert seen == {"e0", "e1"}


async def test_all_experts_down_is_a_clear_503_with_retry_after(make_gateway: Any) -> None:
    setup = await make_gateway()
    await setup.stop_stub(0)
    await setup.stop_stub(1)
    await asyncio.sleep(0.8)
    status, data, headers = await post(setup, BODY)
    assert status == 503 and headers["Retry-After"] == "1"
    assert "e" in json.loads(data)["error"]["message"]


async def test_server_errors_are_retried_and_then_reported(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1)
    status, data, _ = await post(setup, {**BODY, "fail": "500"})
    assert status == 502 and setup.stubs[0].requests == 3
    assert "HTTP 500" in json.loads(data)["error"]["message"]


def counted(setup: Any, counter: str, *labels: str) -> float:
    return float(getattr(setup.gateway.metrics, counter).labels(*labels)._value.get())


@pytest.mark.parametrize("refused", [500, 503])
async def test_an_expert_that_answers_5xx_though_healthy_is_replaced_by_another(
    make_gateway: Any, refused: int
) -> None:
    setup = await make_gateway(experts=3, policy="round_robin")
    setup.stubs[0].refuses = refused
    answered = [await post(setup, BODY) for _ in range(6)]
    assert [status for status, _, _ in answered] == [200] * 6
    moved = [headers for _, _, headers in answered if "failover from e0" in headers["X-Ersim-Reason"]]
    assert moved and {headers["X-Ersim-Expert"] for _, _, headers in answered} == {"e1", "e2"}
    failed = setup.stubs[0].requests
    assert failed == len(moved), "each request asks the failing expert once"
    assert counted(setup, "errors", "e0", "upstream_status") == failed
    assert sum(counted(setup, "failovers", "e0", to) for to in ("e1", "e2")) == failed
    assert setup.gateway.fleet.replicas[0].healthy, "its health check is still passed"
    async with setup.session.get(setup.url + "/metrics") as answer:
        assert 'ersim_failovers_total{expert="e0",to="e' in await answer.text()
    setup.stubs[0].refuses = None
    assert "e0" in {(await post(setup, BODY))[2]["X-Ersim-Expert"] for _ in range(3)}, "masked once"


async def test_the_policy_itself_chooses_who_takes_over(make_gateway: Any) -> None:
    setup = await make_gateway(experts=3, policy="least_loaded")
    setup.stubs[0].refuses = 500
    setup.gateway.fleet.replicas[1].in_flight = 5
    status, _, headers = await post(setup, BODY)
    assert (status, headers["X-Ersim-Expert"]) == (200, "e2"), "the least loaded of those that are left"
    assert headers["X-Ersim-Reason"] == "failover from e0: least_loaded"


async def test_when_every_expert_fails_the_last_error_is_told(make_gateway: Any) -> None:
    setup = await make_gateway(attempts=5)
    for stub in setup.stubs:
        stub.refuses = 500
    status, data, _ = await post(setup, BODY)
    assert status == 502 and "HTTP 500" in json.loads(data)["error"]["message"]
    assert [stub.requests for stub in setup.stubs] in ([1, 4], [4, 1]), "both, then what is left to try"
    assert all(expert._free == 64 for expert in setup.gateway.fleet.experts)


async def test_who_asks_for_an_expert_by_name_gets_no_other(make_gateway: Any) -> None:
    setup = await make_gateway()
    setup.stubs[0].refuses = 500
    assert (await post(setup, {**BODY, "model": "e0"}))[0] == 502
    assert [stub.requests for stub in setup.stubs] == [3, 0]


async def test_without_failover_no_other_expert_is_asked(make_gateway: Any) -> None:
    setup = await make_gateway(policy="fixed", failover=False)
    setup.stubs[0].refuses = 500
    assert (await post(setup, BODY))[0] == 502 and setup.stubs[1].requests == 0


@pytest.mark.parametrize("refused", [400, 404, 422])
async def test_a_refusal_of_the_request_itself_is_passed_on_and_never_retried(
    make_gateway: Any, refused: int
) -> None:
    setup = await make_gateway(policy="fixed")
    setup.stubs[0].refuses = refused
    status, data, headers = await post(setup, BODY)
    assert status == refused and b"asked to fail" in data and headers["X-Ersim-Expert"] == "e0"
    assert [stub.requests for stub in setup.stubs] == [1, 0]


@pytest.mark.parametrize(("attempts", "asked"), [(3, [1, 1, 1]), (2, [1, 0, 1]), (1, [1, 0, 0])])
async def test_other_replicas_are_tried_first_and_the_last_attempt_is_for_another_expert(
    make_gateway: Any, attempts: int, asked: list[int]
) -> None:
    setup = await make_gateway(attempts=attempts, policy="fixed", replicas=[2, 1])
    setup.stubs[0].refuses = setup.stubs[1].refuses = 500
    status, _, headers = await post(setup, BODY)
    assert [stub.requests for stub in setup.stubs] == asked
    assert (status, headers["X-Ersim-Expert"]) == ((200, "e1") if attempts > 1 else (502, "e0"))


async def test_a_broken_stream_stays_broken_and_is_counted(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1)
    with pytest.raises(aiohttp.ClientError):
        await post(setup, {**BODY, "fail": "cut"})
    assert setup.stubs[0].requests == 1, "nothing is retried after the first byte"
    assert setup.gateway.metrics.errors.labels("e0", "mid_stream")._value.get() == 1


async def test_client_disconnect_closes_the_upstream(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1)
    body = json.dumps({**BODY, "max_tokens": 1000, "pace_s": 0.01}).encode()
    answer = await setup.session.post(setup.url + "/v1/completions", data=body)
    await answer.content.readany()
    answer.close()
    for _ in range(50):
        await asyncio.sleep(0.02)
        if setup.stubs[0].aborted:
            break
    assert setup.stubs[0].aborted == 1
    assert setup.gateway.fleet.replicas[0].in_flight == 0
    assert setup.gateway.metrics.errors.labels("e0", "client_gone")._value.get() == 1


async def test_the_queue_is_bounded_in_order_and_says_when_to_retry(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, slots=1, queue_limit=2)
    body = {**BODY, "max_tokens": 3, "pace_s": 0.1}
    tasks = []
    for _ in range(5):
        tasks.append(asyncio.create_task(post(setup, body)))
        await asyncio.sleep(0.02)
    answers = await asyncio.gather(*tasks)
    assert [status for status, _, _ in answers] == [200, 200, 200, 429, 429]
    assert answers[3][2]["Retry-After"] == "1"
    assert setup.gateway.fleet.experts[0]._free == 1, "every slot is given back"


async def test_who_waits_in_the_gateway_counts_for_the_load_that_policies_see(make_gateway: Any) -> None:
    """Full experts alike, but for their queues: all would go to the first one's if those were not seen."""
    setup = await make_gateway(experts=3, policy="least_loaded", slots=1, queue_limit=2)
    tasks = []
    for _ in range(10):
        tasks.append(asyncio.create_task(post(setup, {**BODY, "max_tokens": 3, "pace_s": 0.1})))
        await asyncio.sleep(0.01)
    assert [expert.queued for expert in setup.gateway.fleet.experts] == [2, 2, 2]
    answers = await asyncio.gather(*tasks)
    assert [status for status, _, _ in answers] == [200] * 9 + [429], "only the tenth is refused"
    load = setup.gateway.fleet.state_left({(0, 0)}).experts[1].replicas
    assert [replica.healthy for replica in load] == [True, False], "the queue itself takes no request"


async def test_a_waiter_that_leaves_does_not_lose_the_slot(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, slots=1)
    slow = asyncio.create_task(post(setup, {**BODY, "max_tokens": 10, "pace_s": 0.03}))
    await asyncio.sleep(0.05)
    leaver = asyncio.create_task(post(setup, BODY))
    await asyncio.sleep(0.05)
    leaver.cancel()
    assert (await slow)[0] == 200
    assert (await asyncio.wait_for(post(setup, BODY), 2))[0] == 200


async def test_queue_time_out_is_429(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, slots=1, queue_timeout_s=0.1)
    slow = asyncio.create_task(post(setup, {**BODY, "max_tokens": 10, "pace_s": 0.05}))
    await asyncio.sleep(0.05)
    assert (await post(setup, BODY))[0] == 429
    assert (await slow)[0] == 200


async def test_first_byte_time_out_is_504(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, first_byte_timeout_s=0.2, attempts=1)
    status, _, _ = await post(setup, {**BODY, "pace_s": 5.0})
    assert status == 504


async def test_from_the_first_byte_on_the_idle_limit_counts(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, first_byte_timeout_s=0.4, idle_timeout_s=5.0)
    status, data, _ = await post(setup, {**BODY, "max_tokens": 4, "pace_s": 0.2})
    assert status == 200 and data.endswith(b"data: [DONE]\n\n"), "0.8 s in all, 0.2 s to each piece"
    setup = await make_gateway(experts=1, first_byte_timeout_s=60.0, idle_timeout_s=0.2)
    began_s = time.monotonic()
    with pytest.raises(aiohttp.ClientError):
        await post(setup, {**BODY, "pace_s": 0.5})
    assert time.monotonic() - began_s < 2.0
    assert counted(setup, "errors", "e0", "mid_stream") == 1


async def test_a_client_that_leaves_while_another_expert_is_asked_leaves_nothing_behind(
    make_gateway: Any,
) -> None:
    setup = await make_gateway(policy="fixed")
    setup.stubs[0].refuses = 500
    leaver = asyncio.create_task(post(setup, {**BODY, "pace_s": 5.0}))
    await asyncio.sleep(0.3)
    fleet = setup.gateway.fleet
    assert [replica.in_flight for replica in fleet.replicas] == [0, 1]
    assert [expert._free for expert in fleet.experts] == [64, 63], "the first expert's slot is free again"
    leaver.cancel()
    await asyncio.sleep(0.3)
    assert [replica.in_flight for replica in fleet.replicas] == [0, 0]
    assert [expert._free for expert in fleet.experts] == [64, 64]
    assert counted(setup, "errors", "e1", "client_gone") == 1


async def test_failover_into_a_full_queue_is_429_and_gives_every_slot_back(make_gateway: Any) -> None:
    setup = await make_gateway(policy="fixed", slots=1, queue_limit=0)
    setup.stubs[0].refuses = 500
    slow = asyncio.create_task(post(setup, {**BODY, "model": "e1", "pace_s": 0.1}))
    await asyncio.sleep(0.1)
    status, _, headers = await post(setup, BODY)
    assert status == 429 and headers["Retry-After"] == "1" and headers["X-Ersim-Expert"] == "e1"
    assert headers["X-Ersim-Reason"].startswith("failover from e0")
    assert (await slow)[0] == 200
    assert [expert._free for expert in setup.gateway.fleet.experts] == [1, 1]


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def bare_server(setup: Any, answer: Answer) -> AsyncIterator[None]:
    """A server of plain sockets in place of the first replica."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    setup.gateway.fleet.replicas[0].url = f"http://127.0.0.1:{port}"
    try:
        yield
    finally:
        server.close()


async def test_a_closed_idle_connection_does_not_mark_a_replica_as_down(make_gateway: Any) -> None:
    setup = await make_gateway(policy="fixed", health_period_s=30.0)
    await asyncio.sleep(0.1)

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.read(1)  # the next request is under way when the connection ends
        writer.close()

    async with bare_server(setup, answer_once):
        seen = [(await post(setup, BODY))[2]["X-Ersim-Expert"] for _ in range(3)]
    assert seen == ["e0", "e1", "e0"]
    assert KEEP_IDLE_S < 5.0, "vLLM's own limit, so that this is rare"


async def test_the_expert_sees_the_clients_headers_and_no_others(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, health_period_s=30.0)
    await asyncio.sleep(0.1)
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).lower())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    none = ("Accept", "Accept-Encoding", "User-Agent")
    async with bare_server(setup, answer):
        await post(setup, BODY, skip_auto_headers=none)
        await post(setup, BODY, headers={"X-Trace": "7", "Accept-Encoding": "br"})
    assert b"accept" not in seen[0] and b"user-agent" not in seen[0], "a body asked for plain stays plain"
    assert b"x-trace: 7\r\n" in seen[1] and b"accept-encoding: br\r\n" in seen[1]


async def test_a_compressed_request_reaches_the_expert_decoded(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1)
    setup.stubs[0].keep_bodies = True
    raw = json.dumps(BODY).encode()
    assert (await post(setup, gzip.compress(raw), headers={"Content-Encoding": "gzip"}))[0] == 200
    assert setup.stubs[0].bodies == [raw]


async def test_keys_are_asked_for_and_not_passed_on(make_gateway: Any) -> None:
    setup = await make_gateway(api_keys=["secret"])
    assert (await post(setup, BODY))[0] == 401
    assert (await post(setup, BODY, headers={"Authorization": "Bearer wrong"}))[0] == 401
    assert (await post(setup, BODY, headers={"Authorization": "Bearer secret"}))[0] == 200
    async with setup.session.get(setup.url + "/health") as answer:
        assert answer.status == 200
    place = setup.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(*place)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
    assert b" 401 " in await reader.readline(), "a key may be any bytes"
    writer.close()


async def test_keys_do_not_go_to_the_experts_but_without_keys_the_clients_do(make_gateway: Any) -> None:
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).lower())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    for keys in (["secret"], []):
        setup = await make_gateway(experts=1, health_period_s=30.0, api_keys=keys)
        await asyncio.sleep(0.1)
        async with bare_server(setup, answer):
            await post(setup, BODY, headers={"Authorization": "Bearer secret"})
    assert b"authorization" not in seen[0] and b"authorization: bearer secret" in seen[1]


async def test_metrics_and_models(make_gateway: Any) -> None:
    setup = await make_gateway()
    for _ in range(4):
        await post(setup, BODY)
    under_way = asyncio.create_task(post(setup, {**BODY, "model": "e1", "pace_s": 0.1}))
    await asyncio.sleep(0.2)
    async with setup.session.get(setup.url + "/metrics") as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = await answer.text()
    await under_way
    assert 'ersim_in_flight{expert="e0"} 0.0' in text and 'ersim_in_flight{expert="e1"} 1.0' in text
    assert 'ersim_in_flight{expert="e1"} 0.0' in await metrics_text(setup)
    assert 'ersim_requests_total{expert="e0",status="200"} 2.0' in text
    assert 'ersim_routing_seconds_count{expert="e0"} 2.0' in text
    assert 'ersim_ttft_seconds_count{expert="e0"} 2.0' in text
    assert 'ersim_replica_healthy{expert="e0",replica="0"} 1.0' in text
    async with setup.session.get(setup.url + "/v1/models") as answer:
        entries = (await answer.json())["data"]
    assert [entry["id"] for entry in entries] == ["auto", "e0", "e1"]
    assert all(isinstance(one["created"], int) and abs(one["created"] - time.time()) < 60 for one in entries)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "one two"}, "one two"),
        ({"prompt": ["a", "b"]}, "a\nb"),
        ({"prompt": [1, 2, 3], "metadata": {"routing_text": "seen"}}, "seen"),
        ({"prompt": [1, 2, 3]}, ""),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}, "u"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "p"}, {"type": "image_url"}]}
                ]
            },
            "p",
        ),
        ({"messages": "nonsense"}, ""),
        ({}, ""),
    ],
)
def test_the_router_reads_text_and_nothing_else(body: dict[str, Any], text: str) -> None:
    assert routing_query(body).text == text


async def test_a_setting_that_no_policy_can_have_is_400(make_gateway: Any) -> None:
    status, data, _ = await post(await make_gateway(), b'{"self": 1}', "/policy")
    assert status == 400 and json.loads(data)["error"]["type"] == "invalid_request_error"


def test_a_public_address_needs_keys() -> None:
    endpoint = ExpertEndpoint("e", ["http://127.0.0.1:1"])
    with pytest.raises(ConfigError, match=r"api_keys\[0\] must be a non-empty string"):
        check(GatewaySettings(experts=[endpoint], policy_path="p", host="0.0.0.0", api_keys=[""]))
    with pytest.raises(ConfigError, match="loopback"):
        check(GatewaySettings(experts=[endpoint], policy_path="p", host="0.0.0.0"))


async def test_a_slot_handed_over_as_time_runs_out_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on `wait_for` may time out though its future has just been set."""
    settings = GatewaySettings(experts=[], policy_path="", queue_timeout_s=0.01)
    expert = Expert(ExpertEndpoint("e", ["http://127.0.0.1:1"], "m", [], 1), settings, 0)
    await expert.take_slot()

    async def set_and_late(waiter: asyncio.Future[None], timeout_s: float) -> None:
        expert.give_slot()
        raise TimeoutError

    monkeypatch.setattr(asyncio, "wait_for", set_and_late)
    await expert.take_slot()
    monkeypatch.undo()
    expert.give_slot()
    await asyncio.wait_for(expert.take_slot(), 1.0)


async def test_redirects_reach_the_client_and_the_query_and_repeated_headers_the_expert(
    make_gateway: Any,
) -> None:
    setup = await make_gateway(experts=1, health_period_s=30.0)
    await asyncio.sleep(0.1)
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        where = b"Location: http://127.0.0.1:9/elsewhere\r\nX-Twice: 1\r\nX-Twice: 2\r\n"
        writer.write(b"HTTP/1.1 307 Temporary Redirect\r\n" + where + b"Content-Length: 0\r\n\r\n")
        writer.close()

    path = "/v1/completions?api-version=1%2B2&empty="
    async with bare_server(setup, answer):
        headers = [("X-Tag", "one"), ("X-Tag", "two")]
        status, data, got = await post(setup, BODY, path, headers=headers, allow_redirects=False)
    assert (status, data, got["Location"]) == (307, b"", "http://127.0.0.1:9/elsewhere")
    assert got.getall("X-Twice") == ["1", "2"]
    assert len(seen) == 1 and seen[0].startswith(b"POST " + path.encode() + b" HTTP/1.1\r\n")
    assert b"\r\nX-Tag: one\r\n" in seen[0] and b"\r\nX-Tag: two\r\n" in seen[0]
    record = json.loads(setup.access_log.read_text())
    assert record["path"] == "/v1/completions", "what a query holds is not logged"


async def test_an_experts_cookies_are_the_clients_and_not_the_gateways(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, health_period_s=30.0)
    await asyncio.sleep(0.1)
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).lower())
        writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: who=first\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with bare_server(setup, answer):
        replica = setup.gateway.fleet.replicas[0]
        replica.url = replica.url.replace("127.0.0.1", "localhost")  # jars ignore addresses
        for _ in range(2):
            async with (
                aiohttp.ClientSession() as session,
                session.post(setup.url + "/v1/completions", json=BODY) as got,
            ):
                assert got.headers["Set-Cookie"] == "who=first"
    assert len(seen) == 2 and b"cookie" not in seen[1]


async def metrics_text(setup: Any) -> str:
    async with setup.session.get(setup.url + "/metrics") as answer:
        return str(await answer.text())


def refused(answer: tuple[int, bytes, Any], status: int) -> str:
    """The message of an error in OpenAI's shape."""
    error = json.loads(answer[1])["error"]
    assert (answer[0], error["code"]) == (status, status)
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return str(error["message"])


@pytest.mark.parametrize(
    ("coding", "raw", "status"),
    [
        ("gzip", b"nonsense", 400),
        ("gzip", b"", 400),
        ("gzip", gzip.compress(b"{}" * 10)[:-12], 400),
        ("gzip", gzip.compress(b"{}") + b"more", 400),
        ("deflate", b"zz", 400),
        ("gzip", gzip.compress(b" " * 100_000), 413),
        ("br", b"zz", 415),
        ("zstd", b"zz", 415),
    ],
)
async def test_bodies_that_cannot_be_decoded_are_refused_without_a_traceback(
    make_gateway: Any, caplog: pytest.LogCaptureFixture, coding: str, raw: bytes, status: int
) -> None:
    setup = await make_gateway(experts=1, max_body_bytes=10_000)
    refused(await post(setup, raw, headers={"Content-Encoding": coding}), status)
    refused(await post(setup, raw, "/policy", headers={"Content-Encoding": coding}), status)
    assert (await post(setup, BODY))[0] == 200
    assert not caplog.records
    assert f'ersim_requests_total{{expert="none",status="{status}"}} 2.0' in await metrics_text(setup)


@pytest.mark.parametrize("bits", [-15, 15])
async def test_deflated_requests_reach_the_expert_decoded(make_gateway: Any, bits: int) -> None:
    setup = await make_gateway(experts=1)
    setup.stubs[0].keep_bodies = True
    raw, deflate = json.dumps(BODY).encode(), zlib.compressobj(wbits=bits)
    data = deflate.compress(raw) + deflate.flush()
    assert (await post(setup, data, headers={"Content-Encoding": "deflate"}))[0] == 200
    assert setup.stubs[0].bodies == [raw]


async def test_what_no_expert_was_chosen_for_is_refused_in_one_shape_and_counted(make_gateway: Any) -> None:
    setup = await make_gateway(api_keys=["secret"], max_body_bytes=1000)
    key = {"Authorization": "Bearer secret"}
    assert "bearer key" in refused(await post(setup, BODY), 401)
    assert "not JSON" in refused(await post(setup, b"{", headers=key), 400)
    assert "1000 bytes" in refused(await post(setup, b" " * 2000, headers=key), 413)
    assert "POST /v2" in refused(await post(setup, BODY, "/v2", headers=key), 404)
    wrong = await post(setup, BODY, "/v1/models", headers=key)
    assert "POST /v1/models" in refused(wrong, 405) and wrong[2]["Allow"] == "GET,HEAD"
    text = await metrics_text(setup)
    for status in (400, 401, 404, 405, 413):
        assert f'ersim_requests_total{{expert="none",status="{status}"}} 1.0' in text


@pytest.mark.parametrize(("tag", "status"), [(b"\xff", b"400"), ("\u00fc".encode(), b"200")])
async def test_a_header_that_cannot_be_passed_on_is_400(
    make_gateway: Any, caplog: pytest.LogCaptureFixture, tag: bytes, status: bytes
) -> None:
    setup = await make_gateway(experts=1)
    host, port = setup.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = json.dumps(BODY).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nX-Tag: %b\r\nConnection: close\r\n"
    writer.write(head % tag + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 " + status + b" ")
    assert (b"the header X-Tag is not UTF-8" in answer) == (status == b"400")
    assert not caplog.records


@pytest.mark.parametrize("model", [{}, [], 0, False, 5, {"a": 1}])
async def test_a_model_that_is_no_string_is_400(make_gateway: Any, model: Any) -> None:
    setup = await make_gateway()
    assert "model must be a string" in refused(await post(setup, {**BODY, "model": model}), 400)
    for automatic in (None, "", "auto"):
        assert (await post(setup, {**BODY, "model": automatic}))[0] == 200


class Broken(Policy):
    """A policy of one's own, with a fault in it."""

    name = "broken"
    fault: Any = ZeroDivisionError("by nothing")

    def route(self, query: RoutingQuery, fleet: FleetState) -> Decision:
        if isinstance(self.fault, Exception):
            raise self.fault
        return self.fault  # type: ignore[no-any-return]


@pytest.mark.parametrize("fault", [ZeroDivisionError("x"), Decision(7, "x"), Decision(-1, "x"), None])
async def test_a_policy_that_fails_is_500_logged_and_counted(
    make_gateway: Any, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    setup = await make_gateway()
    broken = Broken([ExpertProfile("e0", "m"), ExpertProfile("e1", "m")])
    broken.fault = fault
    setup.gateway._proxy._policy = broken
    assert "policy broken failed" in refused(await post(setup, BODY), 500)
    assert "Traceback" in caplog.text and "policy broken failed on request" in caplog.text
    assert counted(setup, "errors", "none", "policy") == 1
    assert counted(setup, "requests", "none", "500") == 1
    assert (await post(setup, {**BODY, "model": "e1"}))[0] == 200, "who asks by name needs no policy"
    assert json.loads(setup.access_log.read_text().splitlines()[0])["status"] == 500


async def test_a_fault_of_the_gateway_itself_is_500_in_the_same_shape(
    make_gateway: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = await make_gateway()
    monkeypatch.setattr(setup.gateway._proxy, "_pick", None)
    refused(await post(setup, BODY), 500)
    assert counted(setup, "errors", "e0", "internal") == 1 and counted(setup, "requests", "e0", "500") == 1
    monkeypatch.setattr(setup.gateway.policy, "adjust", None)
    monkeypatch.setattr(setup.gateway, "_created_s", property)
    async with setup.session.get(setup.url + "/v1/models") as answer:
        assert answer.status == 500 and (await answer.json())["error"]["type"] == "server_error"
    assert caplog.text.count("Traceback") == 2


async def test_a_fault_after_the_first_byte_cuts_the_stream_and_is_counted(
    make_gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = await make_gateway()
    monkeypatch.setattr(setup.gateway.metrics, "overhead_s", None)
    with pytest.raises(aiohttp.ClientError):
        await post(setup, BODY)
    assert counted(setup, "errors", "e0", "internal") == 1 and counted(setup, "requests", "e0", "200") == 1
    assert json.loads(setup.access_log.read_text())["error"] == "internal"
    assert not any(replica.in_flight for replica in setup.gateway.fleet.replicas)


async def test_ready_means_that_a_probe_has_succeeded(make_gateway: Any) -> None:
    setup = await make_gateway(health_period_s=0.05)

    async def ready() -> tuple[int, list[str]]:
        async with setup.session.get(setup.url + "/ready") as answer:
            return answer.status, (await answer.json())["down"]

    await asyncio.sleep(0.2)
    assert await ready() == (200, [])
    silent = Fleet(setup.gateway.settings)
    setup.gateway.fleet.experts[1] = silent.experts[1]  # as it is before the first answer of a probe
    assert await ready() == (503, ["e1"]) and silent.replicas[1].healthy, "requests may be tried"


async def test_an_upstream_that_never_answers_is_never_ready(make_gateway: Any) -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    setup = await make_gateway(
        experts=1, urls=[f"http://127.0.0.1:{port}"], health_timeout_s=0.3, health_period_s=0.3
    )
    for _ in range(8):
        async with setup.session.get(setup.url + "/ready") as answer:
            assert answer.status == 503 and await answer.json() == {"ready": False, "down": ["e0"]}
        await asyncio.sleep(0.1)
    server.close()


async def test_an_ill_upstream_is_not_ready_until_it_is_well(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1)
    setup.gateway.fleet.replicas[0].seen = False
    setup.stubs[0].ill = 302
    await asyncio.sleep(0.25)
    setup.gateway.fleet.replicas[0].seen = False
    async with setup.session.get(setup.url + "/ready") as answer:
        assert answer.status == 503
    setup.stubs[0].ill = None
    await asyncio.sleep(0.3)
    async with setup.session.get(setup.url + "/ready") as answer:
        assert answer.status == 200


async def test_least_kv_sends_to_the_replica_with_the_most_free_cache(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, replicas=[3], balancer="least_kv", slots=96)
    for stub, share in zip(setup.stubs, (0.9, 0.1, 0.5), strict=True):
        stub.kv_used = share
    await asyncio.sleep(0.3)
    assert [round(one.kv_used_fraction, 6) for one in setup.gateway.fleet.replicas] == [0.9, 0.1, 0.5]
    for _ in range(6):
        assert (await post(setup, BODY))[2]["X-Ersim-Replica"] == "1"
    setup.stubs[1].kv_used, setup.stubs[0].kv_used = 0.8, 0.2
    await asyncio.sleep(0.3)
    assert (await post(setup, BODY))[2]["X-Ersim-Replica"] == "0"


async def test_without_the_gauge_least_kv_goes_by_the_batch(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, replicas=[2], balancer="least_kv")
    await asyncio.sleep(0.3)
    assert setup.stubs[0].metrics_read > 0, "asked, and told that there is none"
    tasks = [asyncio.create_task(post(setup, {**BODY, "pace_s": 0.1})) for _ in range(6)]
    await asyncio.sleep(0.15)
    assert [one.in_flight for one in setup.gateway.fleet.replicas] == [3, 3]
    assert {status for status, _, _ in await asyncio.gather(*tasks)} == {200}


async def test_nobody_is_asked_for_a_share_that_nobody_looks_at(make_gateway: Any) -> None:
    setup = await make_gateway(experts=1, replicas=[2])
    await asyncio.sleep(0.3)
    await post(setup, BODY)
    assert [stub.metrics_read for stub in setup.stubs] == [0, 0]
    setup.stubs[0].kv_used = 0.25
    assert setup.gateway.fleet.state_left({(0, 0)}).experts[0].replicas[0].kv_used_fraction == 0.0
    await asyncio.sleep(0.3)
    assert setup.gateway.fleet.replicas[0].kv_used_fraction == 0.25, "a policy has looked"
    assert setup.stubs[1].metrics_read == 0


def test_a_share_is_carried_on_between_readings() -> None:
    share = KvShare(slots=10)
    assert [share.estimate(running) for running in (0, 5, 20)] == [0.0, 0.5, 1.0]
    share.set(0.4, 2)
    assert [share.estimate(running) for running in (0, 1, 2, 3, 9)] == pytest.approx([0, 0.2, 0.4, 0.6, 1.0])
    share.set(0.0, 0)
    assert share.estimate(2) == pytest.approx(0.4), "what a request holds is remembered"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (b'# HELP vllm:kv_cache_usage_perc KV\nvllm:kv_cache_usage_perc{engine="0",m="a} b"} 0.25\n', 0.25),
        (b"vllm:kv_cache_usage_perc 1e-1 1700000000\n", 0.1),
        (b'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.4\n', 0.3),
        (b'vllm:kv_cache_usage_perc{engine="0"} 1.5\n', 1.0),
        (b'vllm:kv_cache_usage_perc{engine="0"} NaN\n', None),
        (b'vllm:kv_cache_usage_perc{engine="0"} much\n', None),
        (b"vllm:kv_cache_usage_perc_other 0.5\n", None),
        (b"\xff\xfe", None),
        (b"", None),
    ],
)
def test_the_share_is_read_as_vllm_writes_it(text: bytes, share: float | None) -> None:
    assert kv_share(text) == (None if share is None else pytest.approx(share))
