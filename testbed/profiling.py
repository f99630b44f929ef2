"""Drives one expert through a profile plan, straight to its server; `profile_fit` makes it a calibration."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import numpy as np
import numpy.typing as npt

from ersim.config import PromptSetConfig, WorkloadConfig
from ersim.types import Request
from ersim.workload import build_workload, load_prompt_set
from testbed.expert_server import ExpertFailed
from testbed.load import Client, LoadResult, LoadRun, LoadSettings, RequestRecord
from testbed.plan import Burst, ClosedLoop, Phase, ProfilePlan, phases
from testbed.prompt_tokens import PromptTokens

UNBOUNDED = 10**9
ENDING_S = 1.0  # a server that has stopped answering takes a moment to end, and then says why
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PhaseTimes:
    """When a phase ran (monotonic seconds); `skipped` says why it did not."""

    name: str
    start_s: float
    end_s: float
    requests: int
    failed: int
    skipped: str | None = None


@dataclass
class ProfileRun:
    """All phases of one expert's profile and the client's records of them."""

    phases: list[PhaseTimes] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Errors of requests that failed, the first few."""
        return [record.error for record in self.records if record.error][:3]


def check_answered(run: ProfileRun) -> None:
    """Raise ExpertFailed when not a single request of a profile was answered."""
    if any(record.error is None for record in run.records):
        return
    seen = "; ".join(dict.fromkeys(run.failures)) or "none ended in time; raise plan.seconds"
    raise ExpertFailed(f"no request of {len(run.records)} of the profile was answered: {seen}")


class Profiler:
    """Puts a plan's phases on one server, directly (no gateway).

    check_alive: called after each phase; raises when the server has ended.
    """

    def __init__(
        self, url: str, model: str, vocab_size: int, workload: WorkloadConfig, seed: int,
        say: Callable[[str], None] | None = None, check_alive: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._settings = LoadSettings(url, UNBOUNDED, model=model)
        self._tokens = PromptTokens(vocab_size, seed)
        self._workload = dataclasses.replace(
            workload, arrivals="closed", think_s=0.0, ramp_s=0.5, requests=None
        )
        self._seed = seed
        self._say = say or (lambda text: None)
        self._check_alive = check_alive or (lambda: None)
        self._next_id = UNBOUNDED  # apart from the ids of the closed loops

    async def run(self, plan: ProfilePlan, max_num_seqs: int) -> ProfileRun:
        """All phases, one after the other, until the plan's seconds are over.

        Raises ExpertFailed once a phase has ended and no request so far was answered, or none in the end.
        """
        result = ProfileRun()
        deadline = time.monotonic() + plan.seconds
        for number, phase in enumerate(phases(plan, max_num_seqs)):
            now = time.monotonic()
            if now >= deadline:
                result.phases.append(PhaseTimes(phase.name, now, now, 0, 0, "out of time"))
                continue
            records = await self._phase(phase, deadline - now, self._seed + 1000 * number)
            failed = sum(record.error is not None for record in records)
            result.phases.append(PhaseTimes(phase.name, now, time.monotonic(), len(records), failed))
            result.records += records
            self._say(f"{phase.name}: {len(records)} requests, {failed} failed")
            if records and failed == len(records):
                await asyncio.sleep(ENDING_S)
            self._check_alive()
            if result.records:
                check_answered(result)
        check_answered(result)
        return result

    async def _phase(self, phase: Phase, left_s: float, seed: int) -> list[RequestRecord]:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            client = Client(session, self._settings, None, self._tokens, f"{phase.name}-{seed}")
            if isinstance(phase, Burst):
                return await self._burst(client, phase, left_s)
            return (await self._closed(client, phase, left_s, seed)).records

    async def _burst(self, client: Client, phase: Burst, left_s: float) -> list[RequestRecord]:
        """The jobs, `at_once` at a time; cut off when the plan's time is over."""
        records: list[RequestRecord] = []
        jobs = iter(phase.jobs)

        async def worker() -> None:
            for prompt_tokens, output_tokens in jobs:
                self._next_id += 1
                request = Request(self._next_id, 0, 0, prompt_tokens, output_tokens, output_tokens)
                records.append(await client.send(request))

        tasks = [asyncio.create_task(worker()) for _ in range(phase.at_once)]
        _, pending = await asyncio.wait(tasks, timeout=left_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in pending:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):  # ours; what a server does wrong is in its record
                raise ended
        return records

    async def _closed(self, client: Client, phase: ClosedLoop, left_s: float, seed: int) -> LoadResult:
        prompts = load_prompt_set(self._workload.prompts or PromptSetConfig())
        workload = build_workload(self._workload, prompts, phase.users, seed + phase.users, None)
        settings = dataclasses.replace(self._settings, max_duration_s=min(phase.seconds, left_s))
        return await LoadRun(workload, phase.users, client, settings).run()
