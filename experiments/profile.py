"""The `ersim-profile` command: real servers, a designed grid, calibrations with their doubt."""

# ruff: noqa: E402 (threads are limited before anything imports numpy)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig

from ersim.config import FleetConfig, SimulationConfig
from ersim.errors import ConfigError
from ersim.prepare import Preparations
from ersim.steptime import Calibration, ExpertModel, build_expert_model
from ersim.steptime.calibration import CALIBRATION_DIR, file_name, save
from ersim.types import StepTime
from ersim.util.files import WHOLE, set_earlier_aside, to_json, write_json
from experiments.live_schema import (
    LiveConfig,
    again_s,
    home,
    one_line_errors,
    run_task,
    say,
    simulation,
    to_live,
)
from experiments.live_tracking import failures_logged, log_profile
from testbed.calmly import Calmly
from testbed.contention import Contention, fit_contention
from testbed.core_time import stretch
from testbed.expert_server import ServerSpec
from testbed.fleet import LiveFleet, check_servers, replica_name
from testbed.fleet_calibration import FILE, FleetCalibration, calibration_digests, with_calibrations
from testbed.fleet_calibration import save as save_fleet
from testbed.foreign_work import MOST_CORES, CpuUse, Disturbance
from testbed.front_end import FrontEnd
from testbed.gateway.process import GatewayProcess
from testbed.gateway.settings import GatewaySettings
from testbed.live_run import LiveRun, gateway_settings, level_config, run_level, steps_stolen, vocabulary
from testbed.live_settings import read_live
from testbed.plan import ProfilePlan, check_common_load, check_plan
from testbed.power import IDLE_S, PowerLog, PowerSampler
from testbed.profile_fit import Profiled, check_kv_cache, cleared_steps, fit
from testbed.profiling import Profiler, ProfileRun
from testbed.sensitivity import Sensitivity, one_row_share
from testbed.speed_probe import Probes, UsualProbe, slowness
from testbed.standing import Standing, check_all, together
from testbed.step_log import StepLog, read_step_log
from testbed.waits import extra_waits, gateway_medians, recorded_ways


def profile(job: LiveConfig) -> dict[str, Any]:
    """Profile every expert of the job's fleet; returns the figures that the command prints.

    All is made in profile/, and calibrations come to their place when the last is there: what an earlier
    profile left stays usable until then.
    """
    assert job.fleet is not None  # to_live has checked it
    began_s = time.monotonic()
    folder, made = home(job), home(job) / "profile"
    calmly = Calmly(again_s(job, job.fleet), say)
    for name, expert in job.fleet.experts.items():
        check_plan(job.plan, expert.engine.max_model_len)
        check_kv_cache(expert, f"fleet.experts.{name}")
    check_common_load(job.plan)
    with failures_logged(job, "profile"):
        check_servers(job.fleet)  # before anything that an earlier profile left is moved
        with _said_what_is_kept(folder), _started(job.fleet, made) as live:
            calibrations = {name: _one_expert(job, live, name, made) for name in job.fleet.experts}
            known = _together(job, live, calibrations, made, calmly)
    _publish(known, folder, calmly.failed)
    figures: dict[str, Any] = {
        "command": "ersim-profile",
        "fleet": job.fleet.name,
        "folder": str(folder),
        "experts": {name: summary(item) for name, item in calibrations.items()},
        "contention": {name: contention_summary(item) for name, item in known.contention.items()},
        "gateway": known.gateway,
        "seconds": round(time.monotonic() - began_s, 1),
    }
    write_json(folder / "profile.json", figures)
    _log(job, folder, figures)
    return figures


def _started(fleet: FleetConfig, made: Path) -> LiveFleet:
    """The fleet's servers, to be entered; what an earlier profile left in their folder is set aside."""
    set_earlier_aside(made, WHOLE, "*.steps.jsonl")
    return LiveFleet(fleet, made, say)


@contextlib.contextmanager
def _said_what_is_kept(folder: Path) -> Iterator[None]:
    """When a profile breaks off, say where its own files are, and that an earlier one is as it was."""
    try:
        yield
    except BaseException:
        made = folder / "profile"
        kept = [f"what it recorded is in {made}"] if any(made.glob("*.steps.jsonl")) else []
        kept += [f"the earlier profile in {folder} is as it was"] if (folder / FILE).is_file() else []
        if kept:
            say(f"the profile broke off; {'; '.join(kept)}")
        raise


def _publish(known: FleetCalibration, folder: Path, failed_again: Sequence[str]) -> None:
    """Move the calibrations and their figures from profile/ to the fleet's folder; fleet.json is the last."""
    made = folder / "profile"
    for name in known.calibrations:
        for file in (f"{name}.png", f"{name}.json"):
            os.replace(made / file, folder / file)
    save_fleet(known, folder)
    write_json(made / WHOLE, {"experts": list(known.calibrations), "failed_again": list(failed_again)})


def _one_expert(job: LiveConfig, live: LiveFleet, name: str, folder: Path) -> Calibration:
    """The plan on one expert while the others idle, and the calibration fitted to it."""
    assert job.fleet is not None
    expert, server = job.fleet.experts[name], live.servers[name][0]
    profiler = Profiler(
        server.spec.url,
        name,
        vocabulary(job.fleet),
        job.workload,
        job.seed,
        lambda text: say(f"{name}: {text}"),
        live.check_alive,
    )
    device = read_live(expert.live, expert.precision, name, expert.gpu).device
    began = CpuUse.now()
    run, power = _driven(profiler, job.plan, expert.engine.max_num_seqs or 512, device, server.spec)
    _warn_of_others(name, expert.gpu, began)
    time.sleep(1.0)  # the recorder writes twice a second
    live.check_alive()
    log = read_step_log(server.spec.steps_path)
    check_precision(expert.precision, log.meta.get("quantization"), f"fleet.experts.{name}")
    kept = f"{name}_{expert.precision}_live"
    calibration = fit(Profiled(expert, kept, log, run, device, job.seed, power))
    _warn_of_power(name, device, calibration, power)
    path = folder / f"{name}.json"
    save(calibration, path)
    if job.install:
        gpu = "cpu" if device == "cpu" else expert.gpu
        save(
            calibration, CALIBRATION_DIR / gpu / file_name(expert.model, expert.precision, expert.tp, "steps")
        )
    _figure(job, calibration, name, log, run, folder)
    say(f"{name}: {held_out_words(calibration.fit)}, {path}")
    return calibration


def _driven(
    profiler: Profiler, plan: ProfilePlan, max_num_seqs: int, device: str, spec: ServerSpec
) -> tuple[ProfileRun, PowerLog]:
    """The plan on one server and the power of its GPUs, which rest first, to show what they draw idle."""
    with PowerSampler(gpus=spec.gpus) as power:
        if device == "gpu":
            time.sleep(IDLE_S)
        run = asyncio.run(profiler.run(plan, max_num_seqs))
    sampled = len({row[1] for row in power.log.rows})
    if device == "gpu" and sampled != spec.tp:  # of others, or not of all: no power of a replica
        seen = f"{sampled} GPUs were sampled, the server has {spec.tp}; give {spec.key}.live.gpus"
        return run, PowerLog(absent=power.log.absent or seen)
    return run, power.log


def _warn_of_others(what: str, gpu: str, began: CpuUse) -> None:
    """Say so when others worked on the machine while CPU experts were profiled."""
    cores = CpuUse.now().foreign_cores(began)
    if gpu == "cpu" and cores > MOST_CORES:
        say(f"{what}: other work on this machine used {cores:.2f} cores; profile again when it is quiet")


def _warn_of_power(name: str, device: str, calibration: Calibration, power: PowerLog) -> None:
    """Say so when a GPU expert's calibration has no power: simulations with it tell no energy."""
    if device == "gpu" and not calibration.power:
        why = power.absent or "no reading while it ran, or none while it rested"
        say(f"{name}: its calibration has no power ({why})")


def check_precision(precision: str, served: str | None, key: str) -> None:
    """Raise ConfigError when the server runs quantized weights for a plain precision, or the other way round.

    served: vLLM's quantization method, None for weights as they are.
    """
    if (served is None) != (precision in ("bf16", "fp16")):
        raise ConfigError(
            f"{key}.precision is {precision}, but its server runs "
            f"{'unquantized weights' if served is None else f'weights quantized by {served}'}: "
            "give the precision of the model in live.model"
        )


def _figure(
    job: LiveConfig, calibration: Calibration, name: str, log: Any, run: ProfileRun, folder: Path
) -> None:
    """Predicted against measured, one dot per step."""
    from experiments.live_figures import predicted_against_measured

    assert job.fleet is not None
    expert = dataclasses.replace(job.fleet.experts[name], calibration=str(folder / f"{name}.json"))
    step_time = build_expert_model(expert, f"fleet.experts.{name}").step_time()
    batches, measured = cleared_steps(log, run, calibration, step_time)
    predicted = np.array([step_time.step_s(batch) for batch in batches])
    mixed = np.array([bool(batch.prefills) for batch in batches])
    predicted_against_measured(predicted, measured, mixed, calibration, folder / f"{name}.png")


def _together(
    job: LiveConfig,
    live: LiveFleet,
    calibrations: dict[str, Calibration],
    folder: Path,
    calmly: Calmly,
) -> FleetCalibration:
    """All experts under common load through the gateway: contention, gateway and front-end times."""
    assert job.fleet is not None
    fleet = calibrated_fleet(job.fleet, calibrations, folder)
    config, shared = simulation(job, fleet, 1), Preparations()
    settings = gateway_settings(config, shared, live, folder)
    profiled = [servers[0].spec.name for servers in live.servers.values()]
    standings = check_all(live, fleet, shared, job.workload, job.seed, calmly, say, profiled)
    with GatewayProcess(settings, folder) as gateway:
        runs = _common_load(job, config, shared, live, settings, gateway.url, calmly)
    time.sleep(1.0)
    spans_s = [(run.load.start_s, run.load.end_s) for run in runs]
    logs = {
        name: [read_step_log(server.spec.steps_path).within(spans_s) for server in live.servers[name]]
        for name in calibrations
    }
    rounds_s = [run.load.start_s for run in runs]
    contention = {}
    for name in calibrations:
        model = shared.expert(fleet.experts[name], f"fleet.experts.{name}")
        contention[name] = _contention(name, model, logs, standings, rounds_s, job.seed)
    ways = recorded_ways([run.load for run in runs], runs[-1].access, logs)
    return FleetCalibration(
        fleet=job.fleet.name,
        calibrations={name: f"{name}.json" for name in calibrations},
        contention=contention,
        gateway=gateway_medians(ways),
        users=list(job.plan.mixed_users),
        vllm_version=str(next(iter(logs.values()))[0].meta["vllm_version"]),
        waits=extra_waits(ways),
        digests=calibration_digests(fleet, shared),
    )


def _common_load(
    job: LiveConfig,
    config: SimulationConfig,
    shared: Preparations,
    live: LiveFleet,
    settings: GatewaySettings,
    url: str,
    calmly: Calmly,
) -> list[LiveRun]:
    """Closed-loop users of the plan's loads through the gateway, all rounds in the order of their time.

    Those that others disturbed are driven again in the end: the same requests in other words.
    """
    seconds = job.plan.mixed_s / job.plan.rounds
    driven: dict[tuple[int, int], LiveRun] = {}

    def drive(users: int, number: int, attempt: int) -> LiveRun:
        level = level_config(dataclasses.replace(config, seed=job.seed + users), users, seconds)
        tag = f"p{users}r{number}" + (f"t{attempt}" if attempt else "")
        say(f"common load: {users} users for {seconds:g} s")
        return run_level(level, shared, live, settings, url, seconds, tag, number)

    for number, users in itertools.product(range(job.plan.rounds), job.plan.mixed_users):

        def keep(run: LiveRun, _: Disturbance, key: tuple[int, int] = (number, users)) -> None:
            driven[key] = run

        what = f"common load of {users} users, round {number + 1}"
        calmly.first(what, partial(drive, users, number), keep, steps_stolen)
    calmly.rest()
    return sorted(driven.values(), key=lambda run: run.load.start_s)


def _contention(
    name: str,
    model: ExpertModel,
    logs: Mapping[str, Sequence[StepLog]],
    standings: Mapping[str, Standing],
    rounds_s: Sequence[float],
    seed: int,
) -> Contention:
    """What common load cost one expert beyond its calibration, its servers' starts and the host's speed."""
    alone = model.step_time()
    slow = _slowed(name, logs[name], standings, model.calibration, alone)
    steady = UsualProbe.of(model.calibration) is None  # a GPU
    felt = Sensitivity.of(model.calibration)
    own = FrontEnd.of(model.calibration)
    return fit_contention(name, logs, alone, slow, seed, rounds_s, felt, steady, own)


def _slowed(
    name: str,
    logs: Sequence[StepLog],
    standings: Mapping[str, Standing],
    calibration: Calibration,
    alone: StepTime,
) -> list[npt.NDArray[np.float64]]:
    """Factor of the host's speed, the server's start and stolen time on each step, by replica."""
    found, felt = [], Sensitivity.of(calibration)
    for index, log in enumerate(logs):
        checked = standings.get(replica_name(name, index, len(logs)))
        stands = together([checked] if checked else [])
        told = np.array([alone.step_s(step.batch()) for step in log.steps])
        slow = slowness(Probes.of(log), UsualProbe.of(calibration))
        felt_here = felt.slowed_each(stands.factor * slow, one_row_share(alone, told))
        found.append(felt_here * stretch(log))
    return found


def calibrated_fleet(fleet: FleetConfig, calibrations: dict[str, Calibration], folder: Path) -> FleetConfig:
    """The fleet with the calibration files just written."""
    files = {name: f"{name}.json" for name in calibrations}
    return with_calibrations(fleet, FleetCalibration(fleet.name, files, {}, {}), folder)


def contention_summary(item: Contention) -> dict[str, Any]:
    """The fitted figures, without refits and scatter."""
    return {
        "base": item.base,
        "token_wait_s": item.token_wait_s,
        "hand_out_tokens": item.hand_out_tokens,
        "slowdowns": dict(item.slowdowns),
        "rounds": list(item.rounds),
    }


def held_out_words(fit: Mapping[str, Any]) -> str:
    """The error on steps held out, as a sentence's part."""
    single, median = 100 * fit["held_out_mape"], 100 * fit["held_out_median_mape"]
    return f"held-out error {median:.1f} % on medians of like steps, {single:.1f} % on single steps"


def summary(calibration: Calibration) -> dict[str, Any]:
    """A calibration's figures for print and MLflow."""
    return {
        "held_out_mape": calibration.fit["held_out_mape"],
        "held_out_median_mape": calibration.fit["held_out_median_mape"],
        "mape": calibration.fit["mape"],
        "steps": calibration.fit["steps"],
        "step_noise": calibration.residual_rel_std,
        "kv_blocks": calibration.kv_blocks,
        "recorder_overhead": calibration.provenance["recorder_overhead"],
        "vllm_version": calibration.vllm_version,
        "digest": calibration.digest[:12],
        "phases_skipped": [p["name"] for p in calibration.provenance["phases"] if p["skipped"]],
    }


def _log(job: LiveConfig, folder: Path, figures: dict[str, Any]) -> None:
    if job.tracking.enabled is False:
        return
    log_profile(job, folder, figures)


@one_line_errors
def _task(config: DictConfig) -> None:
    figures = profile(to_live(config))
    for name, item in figures["experts"].items():
        print(f"{name}: {item['steps']} steps, {held_out_words(item)}")
    print(to_json(figures, indent=None))


def main() -> None:
    """Run the command line in sys.argv."""
    run_task(_task, "profile")


if __name__ == "__main__":
    main()
