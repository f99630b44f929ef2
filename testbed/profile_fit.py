"""Turns what a profile recorded of one expert into a calibration."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.config import ExpertConfig
from ersim.errors import DataError, bad_value
from ersim.steptime import Calibration, fit_live_calibration, load_model
from ersim.steptime.evaluate import PreparedStepTime
from ersim.types import Batch, StepTime
from testbed.core_time import front_end_of, undisturbed_s
from testbed.front_end import KEY as FRONT_END_KEY
from testbed.front_end import FrontEnd
from testbed.load import RequestRecord
from testbed.power import PowerLog, power_model
from testbed.probe_works import FORMER
from testbed.profiling import ProfileRun
from testbed.sensitivity import KEY, Sensitivity, fit_sensitivity, one_row_share
from testbed.speed_probe import KEY as PROBE_KEY
from testbed.speed_probe import Probes, UsualProbe, probed_work, slowness
from testbed.step_log import StepLog, request_tag
from testbed.weightless import model_shape

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Profiled:
    """One expert's server and what was recorded while it was driven through a plan.

    name: of the calibration to make. device: cpu or gpu. seed: of the fit's resampling. power: of the
    server's GPUs, None where none was sampled.
    """

    expert: ExpertConfig
    name: str
    log: StepLog
    run: ProfileRun
    device: str
    seed: int
    power: PowerLog | None = None


def profile_steps(
    log: StepLog, run: ProfileRun, usual: UsualProbe | None, own: FrontEnd | None = None
) -> tuple[list[Batch], FloatArray, FloatArray]:
    """Batches of all steps of the plan's phases (warm-up excluded), their seconds, the host's slowness.

    In recorded order; seconds without what others took of the core (see `core_time`). usual: what the speed
    probe takes at slowness 1. own: what the server's front end takes of its core.
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
    return batches, undisturbed_s(log, own)[inside], slowness(Probes.of(log), usual)[inside]


def cleared_steps(
    log: StepLog, run: ProfileRun, calibration: Calibration, alone: StepTime
) -> tuple[list[Batch], FloatArray]:
    """Batches of the plan's steps, and their seconds as they would be at slowness 1, in recorded order."""
    batches, measured_s, slow = profile_steps(log, run, UsualProbe.of(calibration), FrontEnd.of(calibration))
    told_s = np.array([alone.step_s(batch) for batch in batches])
    return batches, measured_s / Sensitivity.of(calibration).slowed_each(slow, one_row_share(alone, told_s))


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


def cache_settings(expert: ExpertConfig) -> dict[str, Any]:
    """What the recorded number of KV blocks rests on, beyond what the engine told."""
    return {name: getattr(expert.engine, name) for name in ("gpu_memory_utilization", "kv_cache_dtype")}


def check_kv_cache(expert: ExpertConfig, key: str) -> None:
    """Raise ConfigError for a profile with a narrow KV cache.

    A calibration holds what 16 bits cost; the simulator makes fp8's time of it (`ersim.steptime.evaluate`),
    and would do so to figures that were measured with fp8 as well.
    """
    if expert.engine.kv_cache_dtype != "auto":
        must = "auto for a profile (a validation may have fp8)"
        raise bad_value(f"{key}.engine.kv_cache_dtype", must, expert.engine.kv_cache_dtype)


def fit(profiled: Profiled) -> Calibration:
    """The calibration of one profiled expert; its provenance says how it came about.

    Where the host's speed was probed it is fitted twice: to steps cleared of the probe's own slowness, and
    to steps cleared of what they themselves make of it, which the first fit shows (see `sensitivity`).
    """
    usual = UsualProbe.fit(Probes.of(profiled.log), probed_work(profiled.log.meta) or FORMER)
    own = front_end_of(profiled.log)
    batches, measured_s, slow = profile_steps(profiled.log, profiled.run, usual, own)
    first = _calibration(profiled, batches, measured_s / slow, Sensitivity(), usual, own)
    if usual is None:
        return first
    alone = _alone(first)
    told_s = np.array([alone.step_s(batch) for batch in batches])
    share = one_row_share(alone, told_s)
    felt = fit_sensitivity(measured_s, told_s, share, slow)
    return _calibration(profiled, batches, measured_s / felt.slowed_each(slow, share), felt, usual, own)


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
    profiled: Profiled,
    batches: Sequence[Batch],
    cleared_s: FloatArray,
    felt: Sensitivity,
    usual: UsualProbe | None,
    own: FrontEnd | None,
) -> Calibration:
    """The fit to steps cleared of the host's slowness, seconds."""
    expert, log, run = profiled.expert, profiled.log, profiled.run
    spec = load_model(expert.model)
    on_cpu = profiled.device == "cpu"
    return fit_live_calibration(
        batches,
        cleared_s,
        name=profiled.name,
        model=expert.model,
        precision=expert.precision,
        gpu="cpu" if on_cpu else expert.gpu,
        tp=expert.tp,
        vllm_version=str(log.meta["vllm_version"]),
        kv_blocks=int(log.meta["num_blocks"]),
        engine=engine_settings(log.meta, eager=on_cpu) | cache_settings(expert),
        provenance={
            "made_by": "ersim-profile",
            "date": datetime.date.today().isoformat(),
            "phases": [dataclasses.asdict(phase) for phase in run.phases],
            "requests": len(run.records),
            "recorder_overhead": round(log.record_overhead(), 5),
            PROBE_KEY: None if usual is None else dataclasses.asdict(usual),
            KEY: dataclasses.asdict(felt),
            FRONT_END_KEY: None if own is None else dataclasses.asdict(own),
            "model_config": {**model_shape(spec), "max_position_embeddings": spec.max_position},
        },
        seed=profiled.seed,
        frontend=frontend_delays_s(run.records, log),
        power={} if on_cpu else power_model(profiled.power, log),
    )
