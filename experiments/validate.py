"""The `ersim-validate` command: the same load live and simulated, side by side."""

# ruff: noqa: E402 (threads are limited before anything imports numpy)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ersim.config import FleetConfig, SimulationConfig
from ersim.errors import ConfigError, DataError, bad_value
from ersim.prepare import Preparations
from ersim.results import COMPLETED, Window
from ersim.results.compare import VALIDATED, compare
from ersim.steptime import Calibration
from ersim.util.files import WHOLE, set_aside, set_earlier_aside, to_json, write_atomically, write_json
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
from experiments.live_tracking import failures_logged, log_validation
from testbed.calmly import Calmly
from testbed.fleet import LiveFleet, check_servers, replica_name
from testbed.fleet_calibration import (
    FleetCalibration,
    calibration_digests,
    check_digests,
    with_calibrations,
)
from testbed.fleet_calibration import load as load_fleet
from testbed.foreign_work import Disturbance
from testbed.gateway.process import GatewayProcess
from testbed.gateway.settings import GatewaySettings
from testbed.host_speed import SpeedTrace
from testbed.live_run import (
    LiveRun,
    check_answered,
    gateway_settings,
    level_config,
    run_level,
    steps_stolen,
)
from testbed.measured import power_figures
from testbed.measured_run import (
    KIND,
    check_files,
    check_measured_with,
    read_power,
    read_record,
    read_run,
    read_span_s,
    read_speed,
    read_standings,
    read_versions,
    stolen_from,
    write_power,
    write_run,
)
from testbed.pooled import IdArray, Run, answered, pooled_figures
from testbed.power import PowerLog, PowerSampler
from testbed.predict import predicted_summary, with_shares
from testbed.probe_works import TODAY
from testbed.replay import replay
from testbed.speed_probe import UsualProbe, probed_work
from testbed.standing import Standing, check_all
from testbed.step_log import read_step_log

BARS_CPU: Mapping[str, float] = {
    "output_throughput": 0.05,
    "median_tpot_ms": 0.08,
    "median_e2el_ms": 0.08,
    "median_ttft_ms": 0.15,
}
BARS_GPU: Mapping[str, float] = {
    "output_throughput": 0.03,
    "median_tpot_ms": 0.03,
    "median_e2el_ms": 0.03,
    "median_ttft_ms": 0.08,
}
BAR_HELD_OUT = 0.05  # of the profile's steps that were held out, medians of like steps
METRICS = (*VALIDATED, "p99_gateway_ms")
FROM_PROFILE = (
    "workers", "base_s", "routing_s", "routing_per_char_s", "network_s", "backend_network_s",
)  # fmt: skip
"""Of the gateway's settings those that a fleet's profile sets (`FleetCalibration.gateway_config`)."""


def check_loads(job: LiveConfig, known: FleetCalibration) -> None:
    """Raise ConfigError for a load that the calibration was made with."""
    used = sorted(set(job.users) & set(known.users))
    if used:
        raise bad_value("users", f"loads that did not calibrate (not {known.users})", used)


def validate(job: LiveConfig) -> dict[str, Any]:
    """Run live, simulate, compare, write, log; returns the figures that the command prints."""
    assert job.fleet is not None  # to_live has checked it
    began_s = time.monotonic()
    folder = home(job)
    known = load_fleet(folder)
    check_loads(job, known)
    fleet = with_calibrations(job.fleet, known, folder)
    base = simulation(job, fleet, 1)
    base.gateway = known.gateway_config(job.gateway)
    shared = Preparations()
    digests = calibration_digests(fleet, shared)
    check_digests(known, digests, folder)
    shared.routing(base)  # a budget that no expert's price meets is refused before a server starts
    if job.measure:
        with failures_logged(job, "validate"):
            _measure(job, base, shared, known, folder)
    check_measured_with(_run_folders(job, folder), digests)
    _check_stored(job, base, shared, folder)
    runs = _stored_runs(job, folder)
    check_versions(read_versions([folder / "runs" / f"u{users}r0" for users in job.users]), known)
    power = read_power(folder / "runs")
    rows, summaries = _compare(job, base, shared, known, runs, power, folder)
    replays = _replays(folder)
    calibrations = _calibrations(base.fleet, shared)
    figures = _figures(job, folder, rows, replays, power, calibrations, time.monotonic() - began_s)
    for name in ("failed_requests", "foreign_cores", "stolen_share"):
        figures[name] = {users: item[name] for users, item in summaries.items()}
    write_atomically(folder / "validation.csv", lambda path: rows.to_csv(path, index=False))
    write_json(folder / "validation.json", {**figures, "summaries": summaries})
    _draw_and_log(job, folder, rows, figures, summaries)
    return figures


def _replays(folder: Path) -> dict[str, Any]:
    """Every server's whole log through the simulator's engine: share of identical batches."""
    logs = sorted((folder / "runs").glob("*.steps.jsonl"))
    return {path.name.removesuffix(".steps.jsonl"): replay(read_step_log(path)).to_dict() for path in logs}


def _measure(
    job: LiveConfig, base: SimulationConfig, shared: Preparations, known: FleetCalibration, folder: Path
) -> None:
    """All loads, then all again, on one fleet and one gateway, into runs/u<users>r<repeat>/.

    Before each round every server answers a few requests alone (see `testbed.standing`). What others
    disturbed is measured again in the end.
    """
    check_servers(base.fleet)  # before anything that an earlier measurement left is moved
    calibrations = _calibrations(base.fleet, shared)
    for name, calibration in calibrations.items():
        check_probe(calibration, TODAY, f"expert {name}")
    set_earlier_aside(folder / "runs", WHOLE, "*/run.json")
    digests = calibration_digests(base.fleet, shared)
    calmly = Calmly(again_s(job, base.fleet), say)
    with LiveFleet(base.fleet, folder / "runs", say) as live, _power_kept(folder / "runs", live.gpus):
        settings = gateway_settings(base, shared, live, folder / "runs")
        started = [server.spec for server in live.all_servers]
        check_versions({spec.name: logged_version(spec.steps_path) for spec in started}, known)
        for name, servers in live.servers.items():
            for server in servers:
                work = probed_work(read_step_log(server.spec.steps_path).meta)
                check_probe(calibrations[name], [work], f"expert {server.spec.name}")
        with GatewayProcess(settings, folder / "runs") as gateway:
            for repeat in range(job.repeats):
                standings = check_all(live, base.fleet, shared, job.workload, job.seed + repeat, calmly, say)
                for users in job.users:
                    say(f"live: {users} users for {job.seconds:g} s")
                    level = level_config(base, users, job.seconds)
                    tag = f"u{users}r{repeat}"
                    kept = partial(_keep, level, folder / "runs" / tag, standings, digests, repeat)
                    run_once = partial(_run_once, job, level, shared, live, settings, gateway.url, repeat)
                    calmly.first(tag, run_once, kept, steps_stolen)
            calmly.rest()
    whole = {"users": list(job.users), "repeats": job.repeats, "failed_again": calmly.failed}
    write_json(folder / "runs" / WHOLE, whole)


def _calibrations(fleet: FleetConfig, shared: Preparations) -> dict[str, Calibration]:
    """By expert."""
    experts = fleet.experts.items()
    return {name: shared.expert(expert, f"fleet.experts.{name}").calibration for name, expert in experts}


def _keep(
    level: SimulationConfig,
    folder: Path,
    standings: Mapping[str, Standing],
    digests: Mapping[str, str],
    repeat: int,
    run: LiveRun,
    taken: Disturbance,
) -> None:
    """Write a load's run, in the place of an attempt that was disturbed more; a killed command leaves one."""
    check_answered(run)
    new = folder.with_name(f"{folder.name}.new")
    write_run(run, level, new, standings, digests, repeat, taken.cores)
    if folder.exists():
        set_aside(folder, "*", "before")
    new.rename(folder)
    shutil.rmtree(folder.with_name(f"{folder.name}.before"), ignore_errors=True)


def _run_once(
    job: LiveConfig,
    level: SimulationConfig,
    shared: Preparations,
    live: LiveFleet,
    settings: GatewaySettings,
    url: str,
    repeat: int,
    attempt: int,
) -> LiveRun:
    """One load, once. Another attempt sends the same requests in other words: none may be cached."""
    again = f"t{attempt}" if attempt else ""
    tag = f"u{level.users}r{repeat}{again}"
    return run_level(level, shared, live, settings, url, job.seconds, tag, repeat)


@contextlib.contextmanager
def _power_kept(folder: Path, gpus: Sequence[int] | None) -> Iterator[None]:
    """Sample GPUs inside, and write what was sampled even when the measurement fails.

    gpus: see `LiveFleet.gpus`; those of a host whose servers use none are somebody else's.
    """
    if gpus is None:
        write_power(PowerLog(absent="no expert runs on a GPU"), folder)
        yield
        return
    with PowerSampler(gpus=gpus) as power:
        try:
            yield
        finally:
            write_power(power.log, folder)


def _run_folders(job: LiveConfig, folder: Path) -> list[Path]:
    """Of every measured run of the job."""
    return [folder / "runs" / f"u{users}r{repeat}" for users in job.users for repeat in range(job.repeats)]


def _check_stored(job: LiveConfig, base: SimulationConfig, shared: Preparations, folder: Path) -> None:
    """Raise before anything is simulated for runs that lack a file, are damaged, or measured otherwise."""
    for run in _run_folders(job, folder):
        check_files(run, server_names(base.fleet))
    for users in job.users:
        level = level_config(base, users, job.seconds)
        for repeat in range(job.repeats):
            check_recorded(folder / "runs" / f"u{users}r{repeat}" / "run.json", level)
        _speeds(job, base, shared, folder, users)


def server_names(fleet: FleetConfig) -> list[str]:
    """Every replica of every expert, by name."""
    experts = fleet.experts.items()
    return [replica_name(name, index, one.replicas) for name, one in experts for index in range(one.replicas)]


def _stored_runs(job: LiveConfig, folder: Path) -> dict[tuple[int, int], Run]:
    """The measured runs, by (users, repeat)."""
    keys = [(users, repeat) for repeat in range(job.repeats) for users in job.users]
    return {key: read_run(folder / "runs" / f"u{key[0]}r{key[1]}") for key in keys}


def recorded_config(path: Path) -> SimulationConfig:
    """The simulation that a run.json describes: what it takes to predict a measured run again."""
    stored = read_record(path.parent).config
    schema = OmegaConf.structured(SimulationConfig)
    try:
        config: SimulationConfig = OmegaConf.to_object(OmegaConf.merge(schema, stored))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        raise DataError(f"{path}: config cannot be used ({why}); {KIND.remedy}") from error
    for expert in config.fleet.experts.values():
        beside = path.parent / expert.calibration
        if beside.is_file():  # `write_run` names it from the run's folder
            expert.calibration = str(beside.resolve())
    return config


def check_recorded(path: Path, level: SimulationConfig) -> None:
    """Raise ConfigError when a stored run had another seed, workload, router, fleet or gateway than wanted.

    Where calibrations lie and which ports servers have may differ; calibrations are told by their digests.
    """
    stored = recorded_config(path)
    profiled = {f"gateway.{name}" for name in FROM_PROFILE}
    for name in ("seed", "users", "workload", "router", "fleet", "gateway"):
        was = _flat(name, getattr(stored, name))
        now = _flat(name, getattr(level, name))
        for key in sorted({*was, *now} - profiled):
            if not key.endswith((".calibration", ".live.port")) and was.get(key) != now.get(key):
                raise bad_value(key, f"as in the measured run ({was.get(key)!r}, {path})", now.get(key))


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Dotted keys and plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(f"{name}.{key}", item).items()}
    return {name: value}


def logged_version(step_log: Path) -> str:
    """The vLLM of a server. Its recorder writes it when the engine starts, before the server is ready."""
    return str(read_step_log(step_log).meta["vllm_version"])


def check_versions(versions: Mapping[str, str], known: FleetCalibration) -> None:
    """Raise ConfigError when a server runs another vLLM than the calibration was made with.

    versions: by server; of a stored run those that it was measured with.
    """
    for name, version in versions.items():
        if version != known.vllm_version:
            raise ConfigError(
                f"expert {name} runs vLLM {version}, its calibration was made with {known.vllm_version}: "
                "measure or profile again, so that both run the same"
            )


def check_probe(calibration: Calibration, works: Collection[int | None], who: str) -> None:
    """Raise ConfigError for a profile beside a speed probe that did none of these works (see `probe_works`).

    None among them: nothing is probed, and the host's speed is taken as the profile's.
    """
    usual = UsualProbe.of(calibration)
    if usual is not None and None not in works and usual.work not in works:
        now = " or ".join(map(str, works))
        raise ConfigError(
            f"{who}: its calibration {calibration.name} was made beside another speed probe "
            f"(provenance.speed_probe.work {usual.work}, now {now}): profile again"
        )


def _compare(
    job: LiveConfig,
    base: SimulationConfig,
    shared: Preparations,
    known: FleetCalibration,
    runs: Mapping[tuple[int, int], Run],
    power: PowerLog,
    folder: Path,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One row per load and metric, and both summaries per load."""
    window = Window(job.warmup_s, job.seconds, True)
    rows: list[dict[str, Any]] = []
    summaries: dict[str, Any] = {}
    for users in job.users:
        repeats = [runs[users, repeat] for repeat in range(job.repeats)]
        judged = [answered(run, window) for run in repeats]
        measured = pooled_figures(repeats, window, judged, base.objective)
        level = level_config(base, users, job.seconds)
        folders = [folder / "runs" / f"u{users}r{repeat}" for repeat in range(job.repeats)]
        spans = [read_span_s(run) for run in folders]
        measured["power"] = _power(power, spans, repeats)
        say(f"simulating {users} users")
        speeds = _speeds(job, base, shared, folder, users)
        told, plain = _predictions(job, level, shared, known, judged, speeds)
        speed = [{name: trace.median for name, trace in one.items()} for one in speeds]
        records = [read_record(run) for run in folders]
        rows += _rows(users, measured, told, plain, list(base.fleet.experts))
        summaries[str(users)] = {
            "measured": measured,
            "predicted": told,
            "host_slowness": speed,
            "foreign_cores": [round(record.foreign_cores, 3) for record in records],
            "stolen_share": [round(stolen_from(run, server_names(base.fleet)), 3) for run in folders],
            "failed_requests": _failed(repeats),
        }
    return pd.DataFrame(rows), summaries


def _power(power: PowerLog, spans: Sequence[tuple[float, float]], repeats: Sequence[Run]) -> dict[str, Any]:
    """Power and energy of a load's repeats; tokens count as they arrive, those of requests cut off too."""
    tokens = int(sum(gaps.tokens.sum() for _, gaps in repeats))
    return power_figures([power.between(*span) for span in spans], tokens)


def _predictions(
    job: LiveConfig,
    level: SimulationConfig,
    shared: Preparations,
    known: FleetCalibration,
    judged: Sequence[IdArray],
    speeds: Sequence[Mapping[str, SpeedTrace]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is judged, at the speed that the host showed during the runs; and the same at slowness 1.

    The second tells how much of the agreement is owed to having measured that speed.
    """
    window = Window(job.warmup_s, job.seconds, True)
    told = predicted_summary(level, shared, known, window, job.replications, judged, speeds)
    if all(trace.is_one for one in speeds for trace in one.values()):
        return told, told
    unslowed: list[Mapping[str, SpeedTrace]] = [{} for _ in speeds]
    return told, predicted_summary(level, shared, known, window, job.replications, judged, unslowed)


def _speeds(
    job: LiveConfig, base: SimulationConfig, shared: Preparations, folder: Path, users: int
) -> list[dict[str, SpeedTrace]]:
    """How fast each expert's servers ran during each repeat of one load."""
    standings = read_standings(_run_folders(job, folder))
    found: list[dict[str, SpeedTrace]] = []
    for repeat in range(job.repeats):
        run, speeds = folder / "runs" / f"u{users}r{repeat}", {}
        for name, expert in base.fleet.experts.items():
            servers = [replica_name(name, index, expert.replicas) for index in range(expert.replicas)]
            calibration = shared.expert(expert, f"fleet.experts.{name}").calibration
            speeds[name] = read_speed(run, servers, standings, calibration)
        found.append(speeds)
    return found


def _failed(repeats: Sequence[Run]) -> int:
    """Requests of all repeats that ended live without an answer, refused ones included."""
    return sum(int((frame["status"] != COMPLETED).sum()) for frame, _ in repeats)


def _rows(
    users: int,
    measured: dict[str, Any],
    told: dict[str, Any],
    plain: dict[str, Any],
    experts: Sequence[str],
) -> list[dict[str, Any]]:
    """Measured against predicted, metric by metric, then the share per expert.

    plain: the prediction at slowness 1 throughout; its error stands beside the judged one.
    """
    metrics = (*METRICS, *(f"share_{name}" for name in experts))
    real, *both = (with_shares(one, experts) for one in (measured, told, plain))
    judged, without = (compare(real, one, metrics) for one in both)
    errors = {row.metric: row.error for row in without}
    return [
        {"users": users, **dataclasses.asdict(row), "error_at_slowness_1": errors.get(row.metric)}
        for row in judged
    ]


def _errors(rows: pd.DataFrame, column: str, metrics: Iterable[str]) -> dict[str, dict[int, float]]:
    """Relative errors by metric and load."""
    found = {}
    for metric in metrics:
        part = rows[rows["metric"] == metric]
        found[metric] = {
            int(users): round(float(error), 4)
            for users, error in zip(part["users"], part[column], strict=True)
        }
    return found


def _mean_abs(errors: Mapping[str, Mapping[int, float]]) -> dict[str, float | None]:
    return {m: round(float(np.mean(np.abs(list(e.values())))), 4) if e else None for m, e in errors.items()}


def _bars_met(
    errors: Mapping[str, Mapping[int, float]], bars: Mapping[str, float], loads: Iterable[int]
) -> str:
    """Of every bar at every load; a figure that could not be compared has not met its own."""
    wanted = [(metric, users) for metric in bars for users in dict.fromkeys(loads)]
    met = [abs(errors.get(metric, {}).get(users, math.inf)) <= bars[metric] for metric, users in wanted]
    return f"{sum(met)}/{len(met)}"


def _on_cpu(fleet: FleetConfig) -> bool:
    return all(expert.gpu == "cpu" for expert in fleet.experts.values())


def _figures(
    job: LiveConfig,
    folder: Path,
    rows: pd.DataFrame,
    replays: dict[str, Any],
    power: PowerLog,
    calibrations: Mapping[str, Calibration],
    elapsed_s: float,
) -> dict[str, Any]:
    """What the command prints: errors per load for the judged metrics, and how many bars are met."""
    assert job.fleet is not None
    bars = BARS_CPU if _on_cpu(job.fleet) else BARS_GPU
    errors = _errors(rows, "error", bars)
    plain = _errors(rows, "error_at_slowness_1", bars)
    inside = rows["inside"].dropna()
    return {
        "command": "ersim-validate",
        "fleet": job.fleet.name,
        "folder": str(folder),
        "users": list(job.users),
        "errors": errors,
        "mean_abs_error": _mean_abs(errors),
        "bars": dict(bars),
        "bars_met": _bars_met(errors, bars, job.users),
        "at_slowness_1": {"mean_abs_error": _mean_abs(plain), "bars_met": _bars_met(plain, bars, job.users)},
        "held_out": _held_out(calibrations),
        "inside_interval": f"{int(inside.astype(bool).sum())}/{len(inside)}",
        "replay": replays,
        "power": {"measured": bool(power.rows), "why": power.absent},
        "seconds": round(elapsed_s, 1),
    }


def _held_out(calibrations: Mapping[str, Calibration]) -> dict[str, Any]:
    """Errors on steps that the profiles held out, medians of like steps, by expert; None: not stated.

    Calibrations that no live profile made say nothing of it.
    """
    errors = {name: one.fit.get("held_out_median_mape") for name, one in calibrations.items()}
    met = sum(error is not None and error <= BAR_HELD_OUT for error in errors.values())
    return {"error": errors, "bar": BAR_HELD_OUT, "bars_met": f"{met}/{len(errors)}"}


def _draw_and_log(
    job: LiveConfig,
    folder: Path,
    rows: pd.DataFrame,
    figures: Mapping[str, Any],
    summaries: Mapping[str, Mapping[str, Any]],
) -> None:
    from experiments.live_figures import validation_figure

    assert job.fleet is not None
    validation_figure(rows, f"{job.fleet.name}: predicted and measured", folder / "validation.png")
    if job.tracking.enabled is not False:
        log_validation(job, folder, rows, figures, summaries)


def table(rows: pd.DataFrame) -> str:
    """The comparison as text: one line per load and metric."""
    lines = [
        f"{'users':>5}  {'metric':<22}{'measured':>12}{'predicted':>12}{'error':>8}  in interval"
        "  error at slowness 1"
    ]
    for row in rows.itertuples():
        inside = {True: "yes", False: "no"}.get(row.inside, "")
        lines.append(
            f"{row.users:>5}  {row.metric:<22}{row.measured:>12.2f}{row.predicted:>12.2f}"
            f"{100 * row.error:>7.1f}%  {inside:<11}  {100 * row.error_at_slowness_1:>18.1f}%"
        )
    return "\n".join(lines)


@one_line_errors
def _task(config: DictConfig) -> None:
    figures = validate(to_live(config))
    print(table(pd.read_csv(Path(figures["folder"]) / "validation.csv")))
    print(to_json(figures, indent=None))


def main() -> None:
    """Run the command line in sys.argv."""
    run_task(_task, "validate")


if __name__ == "__main__":
    main()
