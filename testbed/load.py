"""The load: users that draw from the simulator's own workload object and ask a real server.

Closed loops and open arrivals, streaming, every request recorded with the clock readings of the
client (`time.monotonic()`), whatever becomes of it. A user sends, reads the answer to its end,
thinks, and sends again, exactly as the simulator's users do.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from ersim.results import COMPLETED, FAILED, REJECTED
from ersim.types import Prompt, Request
from ersim.workload import Workload
from testbed.prompt_tokens import PromptTokens
from testbed.sse import TokenStream

EXPERT_HEADER = "X-Ersim-Expert"
REPLICA_HEADER = "X-Ersim-Replica"


@dataclass(frozen=True)
class LoadSettings:
    """How the load is put on.

    requests: stop after so many have ended; max_duration_s: or after this time. prompt_form: tokens
    (ids, nothing to tokenise; the routing text travels in `metadata`) or text. Requests
    under way at the end are cut off and recorded nowhere, as in the simulator.
    """

    url: str
    requests: int
    max_duration_s: float | None = None
    prompt_form: str = "tokens"
    model: str = "auto"
    api_key: str | None = None
    request_timeout_s: float = 600.0


@dataclass
class RequestRecord:
    """One request as its client saw it; times are monotonic seconds."""

    request: Request
    tag: str
    send_s: float
    expert: str | None = None
    replica: int = -1
    first_s: float | None = None
    last_s: float | None = None
    output_tokens: int = 0
    status: str = FAILED
    error: str | None = None
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)


@dataclass
class LoadResult:
    """All requests that ended, in the order in which they ended, and the run's own clock.

    under_way: requests cut off by the run's end; the tokens they got count for throughput, as a
    simulated run counts them.
    """

    records: list[RequestRecord]
    start_s: float
    end_s: float
    under_way: list[RequestRecord]

    @property
    def unfinished(self) -> int:
        """How many requests were cut off."""
        return len(self.under_way)


class Client:
    """Sends one request at a time for whoever calls, and measures it."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: LoadSettings,
        prompts: Sequence[Prompt] | None,
        tokens: PromptTokens,
        tag: str,
    ) -> None:
        self._session = session
        self._settings = settings
        self._prompts = prompts
        self._tokens = tokens
        self._tag = tag
        self.under_way: dict[int, RequestRecord] = {}

    def body(self, request: Request) -> dict[str, Any]:
        """The completion request: exact prompt and answer lengths, token ids in the stream."""
        text = self._prompts[request.prompt_index].text if self._prompts is not None else ""
        as_text = self._settings.prompt_form == "text"
        return {
            "model": self._settings.model,
            "prompt": self._tokens.text(request) if as_text else self._tokens.ids(request),
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "return_token_ids": True,
            "priority": request.priority,
            "metadata": {"routing_text": text},
        }

    async def send(self, request: Request) -> RequestRecord:
        """Send, read to the end, return the record; never raises for what a server can do wrong."""
        tag = f"{self._tag}-{request.request_id}"
        headers = {"X-Request-Id": tag, "Content-Type": "application/json"}
        if self._settings.api_key:
            headers["Authorization"] = f"Bearer {self._settings.api_key}"
        payload = json.dumps(self.body(request)).encode()
        record = RequestRecord(request, tag, time.monotonic())
        self.under_way[request.request_id] = record
        try:
            async with self._session.post(
                f"{self._settings.url}/v1/completions", data=payload, headers=headers
            ) as answer:
                await self._read(answer, record)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            record.status, record.error = FAILED, f"{type(error).__name__}: {error}"[:200]
        del self.under_way[request.request_id]
        if record.last_s is None:
            record.last_s = time.monotonic()
        return record

    async def _read(self, answer: aiohttp.ClientResponse, record: RequestRecord) -> None:
        record.expert = answer.headers.get(EXPERT_HEADER)
        record.replica = int(answer.headers.get(REPLICA_HEADER, "0"))
        if answer.status != 200:
            record.status = REJECTED if answer.status in (400, 413, 429) else FAILED
            text = await answer.text(errors="replace")
            record.error = f"HTTP {answer.status}: {text[:160]}"
            return
        stream = TokenStream()
        async for data in answer.content.iter_any():
            now = time.monotonic()
            count = stream.feed(data)
            if count:
                if record.first_s is None:
                    record.first_s = now
                record.last_s = now
                record.chunk_s.append(now)
                record.chunk_tokens.append(count)
        record.output_tokens = stream.output_tokens
        self._judge(record, stream)

    def _judge(self, record: RequestRecord, stream: TokenStream) -> None:
        if stream.error:
            record.error = stream.error
        elif not stream.done:
            record.error = "the stream ended without [DONE]"
        elif record.output_tokens != record.request.output_tokens:
            record.error = (
                f"{record.output_tokens} tokens came, {record.request.output_tokens} were asked for"
            )
        else:
            record.status = COMPLETED
            self._tokens.remember_answer(record.request, stream.token_ids)


class LoadRun:
    """Users (or arrivals) until enough requests have ended or the time is over."""

    def __init__(
        self, workload: Workload, users: int, client: Client, settings: LoadSettings,
        progress: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        self._workload = workload
        self._users = users
        self._client = client
        self._settings = settings
        self._progress = progress
        self._records: list[RequestRecord] = []
        self._full = asyncio.Event()

    async def run(self) -> LoadResult:
        """Put the load on; returns when `requests` have ended or `max_duration_s` is over."""
        start_s = time.monotonic()
        work = self._closed(start_s) if self._workload.closed else self._open(start_s)
        task = asyncio.ensure_future(work)
        full = asyncio.ensure_future(self._full.wait())
        await asyncio.wait(
            {task, full}, timeout=self._settings.max_duration_s, return_when=asyncio.FIRST_COMPLETED
        )
        full.cancel()
        end_s = time.monotonic()
        under_way = [copy(record) for record in self._client.under_way.values()]
        await self._stop(task)
        return LoadResult(list(self._records), start_s, end_s, under_way)

    async def _stop(self, task: asyncio.Future[None]) -> None:
        if task.done():
            try:
                task.result()  # an exception in a user is ours: show it
            except ExceptionGroup as several:
                raise several.exceptions[0] from None
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _one(self, request: Request) -> None:
        record = await self._client.send(request)
        if self._full.is_set():
            return
        self._records.append(record)
        if self._progress is not None:
            self._progress(len(self._records))
        if len(self._records) >= self._settings.requests:
            self._full.set()

    async def _closed(self, start_s: float) -> None:
        async with asyncio.TaskGroup() as group:  # which ends all when one raises
            for user in range(self._users):
                group.create_task(self._user(user, start_s))

    async def _user(self, user: int, start_s: float) -> None:
        workload = self._workload
        await asyncio.sleep(max(0.0, start_s + workload.start_s(user) - time.monotonic()))
        while not self._full.is_set():
            await self._one(workload.next_request(user))
            await asyncio.sleep(workload.think_s(user))

    async def _open(self, start_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            for request in self._workload.arrivals():
                assert request.arrival_s is not None  # the contract of open workloads
                await asyncio.sleep(max(0.0, start_s + request.arrival_s - time.monotonic()))
                group.create_task(self._one(request))


async def run_load(
    workload: Workload,
    users: int,
    settings: LoadSettings,
    prompts: Sequence[Prompt] | None,
    tokens: PromptTokens,
    tag: str,
    progress: Callable[[int], None] | None = None,
) -> LoadResult:
    """Open a session, put the load on, close it; the result holds every request that ended."""
    timeout = aiohttp.ClientTimeout(total=settings.request_timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        client = Client(session, settings, prompts, tokens, tag)
        return await LoadRun(workload, users, client, settings, progress).run()
