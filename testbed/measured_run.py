"""A measured run as a folder: small files, with everything needed to simulate it again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ersim.config import SimulationConfig
from ersim.errors import DataError
from ersim.results import Gaps, check_requests
from ersim.steptime import Calibration
from ersim.util.files import write_atomically, write_json
from testbed.core_time import stretch
from testbed.host_speed import SpeedTrace
from testbed.live_run import LiveRun
from testbed.power import COLUMNS, PowerLog
from testbed.sensitivity import Sensitivity
from testbed.speed_probe import Probes, UsualProbe, kind_of, slowness
from testbed.standing import Standing, together
from testbed.step_log import StepLog
from testbed.stored_json import FileKind, StoredJson

FORMAT = "ersim-measured-run"
VERSION = 3
"""Of run.json. 1, which said neither, had step-time factors where `Standing.factor` now is a slowness; 2 had
stolen time in the probe."""
FILE = "run.json"
KIND = FileKind("the run.json of a measured run", FORMAT, VERSION, "measure it again")
KEYS = (
    "start_s", "end_s", "users", "repeat", "standings", "unfinished", "engines", "calibrations", "config",
    "foreign_cores",
)  # fmt: skip
SPEED_COLUMNS = ("end_s", "period_s", "decode_seqs", "prefill_tokens", "probe_s", "stretch")


def steps_frame(log: StepLog, start_s: float) -> pd.DataFrame:
    """One row per engine step: when, how long, and what ran; times on the run's clock.

    probe_s: what the speed probe after the step took, NaN where there was none; stretch: factor of stolen
    time (see `speed_probe`, `core_time`).
    """
    batches = [step.batch() for step in log.steps]
    rows: dict[str, Any] = {
        "end_s": log.ends_s() - start_s,
        "period_s": log.periods_s(),
        "tokens": [batch.tokens for batch in batches],
        "decode_seqs": [batch.decode_seqs for batch in batches],
        "decode_context_tokens": [batch.decode_context_tokens for batch in batches],
        "decode_context_max": [batch.decode_context_max for batch in batches],
        "prefill_tokens": [sum(chunk for chunk, _ in batch.prefills) for batch in batches],
        "prefill_chunks": [str(list(batch.prefills)) if batch.prefills else "" for batch in batches],
        "running": [step.running for step in log.steps],
        "waiting": [step.waiting for step in log.steps],
        "blocks_used": [step.blocks_used for step in log.steps],
        "preempted": [len(step.preempted) for step in log.steps],
        "probe_s": Probes.of(log).took_s,
        "stretch": stretch(log),
    }
    return pd.DataFrame(rows)


def check_files(folder: Path, servers: Sequence[str]) -> None:
    """Raise DataError for a table of a run that is not there. servers: names of the experts' replicas."""
    wanted = {
        "requests.parquet": "the requests and when they were answered",
        "gaps.parquet": "the times between their tokens",
        **{f"steps_{name}.parquet": f"the engine steps of server {name}" for name in servers},
    }
    for name, what in wanted.items():
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing ({what}); measure again with ersim-validate")


def read_run(folder: Path) -> tuple[pd.DataFrame, Gaps]:
    """Requests and gaps of a run that `write_run` wrote. Raises DataError naming what is missing."""
    try:
        requests = pd.read_parquet(folder / "requests.parquet")
        stored = _table(folder / "gaps.parquet", [one.name for one in dataclasses.fields(Gaps)])
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a whole measured run ({error}); measure it again") from error
    frame = check_requests(requests, str(folder / "requests.parquet"))
    return frame, Gaps(**{str(name): column.to_numpy() for name, column in stored.items()})


@dataclass(frozen=True)
class RunRecord:
    """What run.json says of a measured run, checked.

    start_s, end_s: monotonic seconds of the machine that measured it. repeat: see `write_run`. standings
    and versions (of vLLM): by server. calibrations: digest of each expert's (`Calibration.digest`), which
    the standings are relative to and the gateway's policy was made with. config: the simulation's, as
    plain values. foreign_cores: see `foreign_work`.
    """

    start_s: float
    end_s: float
    repeat: int
    standings: Mapping[str, Standing]
    versions: Mapping[str, str]
    calibrations: Mapping[str, str]
    config: Mapping[str, Any]
    foreign_cores: float


def read_record(folder: Path) -> RunRecord:
    """The run.json of a run. Raises DataError naming file, key, value and remedy: damaged, old or foreign."""
    file = StoredJson(KIND, folder / FILE)
    data = file.read()
    file.only(data, KEYS)
    start_s = file.number("start_s", data["start_s"])
    standings = file.mapping("standings", data["standings"])
    engines = file.mapping("engines", data["engines"])
    metas = {name: file.mapping(f"engines.{name}", meta) for name, meta in engines.items()}
    return RunRecord(
        start_s,
        file.number("end_s", data["end_s"], start_s),
        file.integer("repeat", data["repeat"]),
        {name: _standing(file, f"standings.{name}", item) for name, item in standings.items()},
        {name: _version(file, name, meta) for name, meta in metas.items()},
        file.texts("calibrations", data["calibrations"]),
        file.mapping("config", data["config"]),
        file.number("foreign_cores", data["foreign_cores"], 0.0),
    )


def _version(file: StoredJson, name: str, meta: Mapping[str, Any]) -> str:
    """The vLLM of one server."""
    version = meta.get("vllm_version")
    if not isinstance(version, str) or not version:
        raise file.bad(f"engines.{name}.vllm_version", "a non-empty string", version)
    return version


def _standing(file: StoredJson, key: str, item: object) -> Standing:
    """All its figures are numbers >= 0, the factor above it."""
    data = file.mapping(key, item)
    names = [one.name for one in dataclasses.fields(Standing)]
    file.only(data, names, key)
    for name in names:
        file.number(f"{key}.{name}", data[name], least=0.0)
    file.number(f"{key}.factor", data["factor"], above=0.0)
    return Standing(**data)


def read_span_s(folder: Path) -> tuple[float, float]:
    """When a run began and ended, monotonic seconds of the machine that measured it."""
    record = read_record(folder)
    return record.start_s, record.end_s


def read_standings(folders: Sequence[Path]) -> dict[str, Standing]:
    """How every server stood alone, by name: all checks of one measurement as one (see `standing`).

    folders: of its runs; those of one repeat share a check. Raises DataError when a file is damaged.
    """
    checks: dict[str, dict[int, Standing]] = {}
    for record in map(read_record, folders):
        for name, item in record.standings.items():
            checks.setdefault(name, {})[record.repeat] = item
    return {name: together(list(by_repeat.values())) for name, by_repeat in checks.items()}


def read_versions(folders: Sequence[Path]) -> dict[str, str]:
    """The vLLM that every server ran, by name. Raises DataError when a run.json is damaged."""
    return {name: version for one in folders for name, version in read_record(one).versions.items()}


def check_measured_with(folders: Sequence[Path], digests: Mapping[str, str]) -> None:
    """Raise DataError for a run that was measured with another calibration than it is to be predicted with.

    digests: by expert, of the calibrations now (see `fleet_calibration.calibration_digests`). On GPUs too,
    where there are no standings: a policy that counts prices has them from the calibration.
    """
    for folder in folders:
        stored = read_record(folder).calibrations
        for name in sorted({*stored, *digests}):
            was, now = stored.get(name, "none"), digests.get(name, "none")
            if was != now:
                raise DataError(
                    f"{folder / FILE}: measured with another calibration of expert {name} ({was[:12]}) "
                    f"than there is now ({now[:12]}); measure again"
                )


def read_speed(
    folder: Path, servers: Sequence[str], standings: Mapping[str, Standing], calibration: Calibration
) -> SpeedTrace:
    """How fast one expert's servers ran during a run: the steps of all of them together.

    servers: names of the expert's replicas, whose doubts are independent of each other; those without a
    standing are as their calibration says. Raises DataError when a file is missing or old.
    """
    steps = [_steps(folder / f"steps_{name}.parquet") for name in servers]
    usual = UsualProbe.of(calibration)
    slow = [slowness(_probes(frame), usual) for frame in steps]
    stand = [standings.get(name, Standing()) for name in servers]
    factor = float(np.mean([one.factor for one in stand]))
    doubt = float(np.linalg.norm([one.doubt for one in stand])) / len(stand)
    wander = float(np.linalg.norm([one.wander for one in stand])) / len(stand)
    share = float(np.mean([one.share for one in stand]))
    start = SpeedTrace((1.0,), factor, doubt, wander, Sensitivity.of(calibration), share)
    ends_s, stretches = (np.concatenate([frame[key] for frame in steps]) for key in ("end_s", "stretch"))
    return start.with_steps(ends_s, np.concatenate(slow), stretches)


def stolen_from(folder: Path, servers: Collection[str]) -> float:
    """Share of all servers' step time in a run that the hypervisor took, as it is predicted with."""
    frames = [_steps(folder / f"steps_{name}.parquet") for name in servers]
    took_s = sum(float(frame["period_s"].sum()) for frame in frames)
    had_s = sum(float((frame["period_s"] / frame["stretch"]).sum()) for frame in frames)
    return 1.0 - had_s / took_s if took_s > 0.0 else 0.0


def _probes(steps: pd.DataFrame) -> Probes:
    kinds = [*map(kind_of, steps["decode_seqs"].tolist(), steps["prefill_tokens"].tolist())]
    ends_s, periods_s, took_s = (steps[key].to_numpy() for key in ("end_s", "period_s", "probe_s"))
    return Probes(ends_s, periods_s, took_s, np.array(kinds, dtype=str))


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """These columns of a Parquet file, in this order. Raises OSError or ValueError when it has them not."""
    frame = pd.read_parquet(path)
    if lacking := set(columns) - set(frame):
        raise ValueError(f"{path.name}: no column {', '.join(sorted(lacking))}")
    return frame[list(columns)]


def _steps(path: Path) -> pd.DataFrame:
    try:
        return _table(path, SPEED_COLUMNS)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not the steps of a measured run ({error}); measure it again") from error


def write_power(power: PowerLog, folder: Path) -> None:
    """Write power.parquet, the samples, and power.json with the reason why there are none or some miss."""
    if power.rows:
        _parquet(power.frame(), folder / "power.parquet")
    if power.absent or not power.rows:
        write_json(folder / "power.json", {"absent": power.absent})


def read_power(folder: Path) -> PowerLog:
    """What `write_power` wrote; an empty log when it wrote nothing. Raises DataError when it is damaged."""
    rows: list[Any] = []
    path, why = folder / "power.parquet", folder / "power.json"
    try:
        if path.is_file():
            rows = list(_table(path, COLUMNS).itertuples(index=False, name=None))
        absent = json.loads(why.read_text(encoding="utf-8"))["absent"] if why.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: power.parquet or power.json is damaged ({error}); measure again, or remove both to "
            "go without power"
        ) from error
    return PowerLog(rows, absent if rows or why.is_file() else "not measured")


def _parquet(frame: pd.DataFrame, path: Path) -> None:
    write_atomically(path, lambda temporary: frame.to_parquet(temporary, index=False, compression="zstd"))


def write_run(
    run: LiveRun,
    config: SimulationConfig,
    folder: Path,
    standings: Mapping[str, Standing],
    calibrations: Mapping[str, str],
    repeat: int = 0,
    foreign_cores: float = 0.0,
) -> None:
    """Write requests.parquet, gaps.parquet, steps_<server>.parquet and run.json.

    standings: by server, the check before this repeat (see `standing`); none on a GPU. calibrations: by
    expert, the digest of the one that it is measured with.
    repeat: which requests of the configuration it sent (see `predict.live_workload`). foreign_cores: that
    others kept busy meanwhile. Calibrations are named from the folder's point of view, so that a folder of
    runs may be moved with them.
    """
    plain = dataclasses.asdict(config)
    for expert in plain["fleet"]["experts"].values():
        if Path(expert["calibration"]).is_absolute():
            expert["calibration"] = Path(os.path.relpath(expert["calibration"], folder)).as_posix()
    _parquet(run.requests, folder / "requests.parquet")
    gaps = {key: np.asarray(value) for key, value in dataclasses.asdict(run.gaps).items()}
    _parquet(pd.DataFrame(gaps), folder / "gaps.parquet")
    for name, log in run.logs.items():
        steps = steps_frame(log, run.load.start_s)
        _parquet(steps, folder / f"steps_{name}.parquet")
    write_json(
        folder / FILE,
        {
            "format": FORMAT,
            "version": VERSION,
            "users": run.users,
            "repeat": repeat,
            "foreign_cores": foreign_cores,
            "start_s": run.load.start_s,
            "end_s": run.load.end_s,
            "standings": {name: dataclasses.asdict(item) for name, item in standings.items()},
            "unfinished": run.load.unfinished,
            "engines": {name: dict(log.meta) for name, log in run.logs.items()},
            "calibrations": dict(calibrations),
            "config": plain,
        },
    )
