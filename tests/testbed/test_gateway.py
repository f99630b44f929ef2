"""The gateway's promises, each against stub upstreams: what passes, what is retried, what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from ersim.errors import ConfigError
from testbed.gateway.app import KEEP_IDLE_S
from testbed.gateway.query import routing_query
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings, check
from testbed.gateway.upstreams import Expert
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
    async with setup.session.get(setup.url + "/metrics") as answer:
        text = await answer.text()
    assert 'ersim_requests_total{expert="e0",status="200"} 2.0' in text
    assert 'ersim_routing_seconds_count{expert="e1"} 2.0' in text
    assert 'ersim_ttft_seconds_count{expert="e1"} 2.0' in text
    assert 'ersim_replica_healthy{expert="e0",replica="0"} 1.0' in text
    async with setup.session.get(setup.url + "/v1/models") as answer:
        names = [entry["id"] for entry in (await answer.json())["data"]]
    assert names == ["auto", "e0", "e1"]


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
