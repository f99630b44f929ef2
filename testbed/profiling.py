"""Drives one expert through a profile plan and turns what the recorder wrote into a calibration."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt

from ersim.config import ExpertConfig, PromptSetConfig, WorkloadConfig
from ersim.errors import DataError
from ersim.steptime import Calibration, fit_live_calibration, load_model
from ersim.steptime.evaluate import PreparedStepTime
from ersim.types import Batch, Request, StepTime
from ersim.workload import build_workload, load_prompt_set
from testbed.host_speed import reference_probe_s, slowness
from testbed.load import Client, LoadResult, LoadRun, LoadSettings, RequestRecord
from testbed.plan import Burst, ClosedLoop, Phase, ProfilePlan, phases
from testbed.power import PowerLog, power_model
from testbed.prompt_tokens import PromptTokens
from testbed.sensitivity import KEY, Sensitivity, fit_sensitivity, one_row_share, probe_s
from testbed.step_log import StepLog

UNBOUNDED = 10**9
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


class Profiler:
    """Puts a plan's phases on one server, directly (no gateway)."""

    def __init__(
        self, url: str, model: str, vocab_size: int, workload: WorkloadConfig, seed: int,
        say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self._settings = LoadSettings(url, UNBOUNDED, model=model)
        self._tokens = PromptTokens(vocab_size, seed)
        self._workload = dataclasses.replace(
            workload, arrivals="closed", think_s=0.0, ramp_s=0.5, requests=None
        )
        self._seed = seed
        self._say = say or (lambda text: None)
        self._next_id = UNBOUNDED  # apart from the ids of the closed loops

    async def run(self, plan: ProfilePlan, max_num_seqs: int) -> ProfileRun:
        """All phases, one after the other, until the plan's seconds are over."""
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
        _, pending = await asyncio.wait(tasks, timeout=left_s)
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return records

    async def _closed(self, client: Client, phase: ClosedLoop, left_s: float, seed: int) -> LoadResult:
        prompts = load_prompt_set(self._workload.prompts or PromptSetConfig())
        workload = build_workload(self._workload, prompts, phase.users, seed + phase.users, None)
        settings = dataclasses.replace(self._settings, max_duration_s=min(phase.seconds, left_s))
        return await LoadRun(workload, phase.users, client, settings).run()


def profile_steps(
    log: StepLog, run: ProfileRun, reference_s: float | None
) -> tuple[list[Batch], FloatArray, FloatArray]:
    """Batches of all steps of the plan's phases (warm-up excluded), their seconds, the host's slowness.

    In recorded order. reference_s: what the speed probe takes at slowness 1 (see `testbed.host_speed`).
    """
    spans = [(p.start_s, p.end_s) for p in run.phases if p.skipped is None and p.name != "warmup"]
    inside = np.array(
        [any(low <= step.schedule_s and step.updated_s <= high for low, high in spans) for step in log.steps],
        dtype=bool,
    )
    batches = [step.batch() for step, use in zip(log.steps, inside, strict=True) if use]
    if not batches:
        raise DataError(
            "the profile recorded no step; did the server run with the recorder (live.record_steps)?"
        )
    return batches, log.periods_s()[inside], slowness(log, reference_s)[inside]


def cleared_steps(
    log: StepLog, run: ProfileRun, calibration: Calibration, alone: StepTime
) -> tuple[list[Batch], FloatArray]:
    """Batches of the plan's steps, and their seconds as they would be at slowness 1, in recorded order."""
    batches, measured, slow = profile_steps(log, run, probe_s(calibration))
    told = np.array([alone.step_s(batch) for batch in batches])
    return batches, measured / Sensitivity.of(calibration).slowed_each(slow, one_row_share(alone, told))


def frontend_delays_s(records: Sequence[RequestRecord], log: StepLog) -> dict[str, float]:
    """Medians of what the API server adds around the engine, seconds.

    in_s: from the client's send to the engine's queue, for requests that found the engine idle.
    out_s: from the step's end that made a request's first token to the client's receipt.
    """
    added = {request_tag(request.request_id): request for request in log.requests.values()}
    ends = log.ends_s()
    starts = np.array([step.schedule_s for step in log.steps])
    inbound, outbound = [], []
    for record in records:
        request = added.get(record.tag)
        if request is None or record.first_s is None:
            continue
        index = int(np.searchsorted(ends, record.first_s)) - 1
        if index >= 0:
            outbound.append(record.first_s - ends[index])
        before = int(np.searchsorted(starts, request.added_s)) - 1
        if before < 0 or ends[before] < record.send_s:
            inbound.append(request.added_s - record.send_s)
    if not inbound or not outbound:
        return {}
    return {"in_s": float(np.median(inbound)), "out_s": float(np.median(outbound))}


def request_tag(engine_id: str) -> str:
    """The X-Request-Id inside vLLM's own id (`cmpl-<id>-<choice>-<random>`)."""
    return engine_id.removeprefix("cmpl-").removeprefix("chatcmpl-").rsplit("-", 2)[0]


def engine_settings(meta: Mapping[str, Any], eager: bool) -> dict[str, Any]:
    """The recorded engine constants under `EngineSettings`' names."""
    names = (
        "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "enable_chunked_prefill",
        "enable_prefix_caching", "long_prefill_token_threshold", "policy", "watermark",
        "scheduler_reserve_full_isl", "async_scheduling",
    )  # fmt: skip
    settings = {name: meta[name] for name in names}
    if eager:
        settings["cudagraph_sizes"] = []
    return settings


def fit(
    expert: ExpertConfig,
    name: str,
    log: StepLog,
    run: ProfileRun,
    power: PowerLog | None,
    device: str,
    seed: int,
) -> Calibration:
    """The calibration of one profiled expert; its provenance says how it came about.

    Where the host's speed was probed it is fitted twice: to steps cleared of the probe's own slowness, and
    to steps cleared of what they themselves make of it, which the first fit shows (see `sensitivity`).
    """
    reference_s = reference_probe_s(log)
    batches, measured, slow = profile_steps(log, run, reference_s)
    make = partial(_calibration, expert, name, log, run, power, device, seed, batches)
    first = make(measured / slow, Sensitivity())
    if reference_s is None:
        return first
    alone = _alone(first)
    told = np.array([alone.step_s(batch) for batch in batches])
    share = one_row_share(alone, told)
    felt = fit_sensitivity(measured, told, share, slow)
    return make(measured / felt.slowed_each(slow, share), felt)


def _alone(calibration: Calibration) -> StepTime:
    """The step time of a calibration, at the settings that it was made with."""
    engine = calibration.engine
    return PreparedStepTime(
        calibration,
        np.array(calibration.theta),
        max_tokens=engine["max_num_batched_tokens"],
        max_seqs=engine["max_num_seqs"],
        max_context=engine["max_model_len"],
        graphs=engine.get("cudagraph_sizes") or [],
        asynchronous=engine["async_scheduling"],
    )


def _calibration(
    expert: ExpertConfig,
    name: str,
    log: StepLog,
    run: ProfileRun,
    power: PowerLog | None,
    device: str,
    seed: int,
    batches: Sequence[Batch],
    cleared_s: FloatArray,
    felt: Sensitivity,
) -> Calibration:
    """The fit to steps cleared of the host's slowness, seconds."""
    spec = load_model(expert.model)
    gpu = "cpu" if device == "cpu" else expert.gpu
    return fit_live_calibration(
        batches,
        cleared_s,
        name=name,
        model=expert.model,
        precision=expert.precision,
        gpu=gpu,
        tp=expert.tp,
        vllm_version=str(log.meta["vllm_version"]),
        kv_blocks=int(log.meta["num_blocks"]),
        engine=engine_settings(log.meta, eager=device == "cpu"),
        provenance={
            "made_by": "ersim-profile",
            "date": datetime.date.today().isoformat(),
            "phases": [dataclasses.asdict(phase) for phase in run.phases],
            "requests": len(run.records),
            "recorder_overhead": round(log.record_overhead(), 5),
            "probe_s": reference_probe_s(log),
            KEY: dataclasses.asdict(felt),
            "model_config": _hf_config(spec),
        },
        seed=seed,
        frontend=frontend_delays_s(run.records, log),
        power=power_model(power, log),
    )


def _hf_config(spec: Any) -> dict[str, Any]:
    """The model's shape under config.json's names, so that the calibration stands on its own."""
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position,
        "tie_word_embeddings": spec.tie_word_embeddings,
    }
