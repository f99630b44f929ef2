"""Reads folders of published vLLM runs (``run.yaml`` and its table) into cases to simulate.

Three kinds: `per_request` (requests at recorded times), `closed_loop_rows` (users without think
time, one row per measurement) and `open_loop_stages` (Poisson stages back to back on one server).
What a run leaves unrecorded is filled in by `UNRECORDED`, the same for every row, and said.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ersim.config import EngineSettings, ExpertConfig, validate_expert
from ersim.errors import DataError, DoesNotFitError, ErsimError
from ersim.steptime import build_expert_model
from ersim.workload.base import Workload
from experiments.published_names import (
    engine_fields,
    engine_settings,
    gpu_name,
    is_recorded,
    model_name,
    precision_name,
    unmodelled,
    version,
)
from experiments.published_workloads import (
    TEMPLATE_TOKENS,
    pooled_count,
    pooled_users,
    recorded_requests,
    staged_requests,
)

METRIC = re.compile(r"(ttft|tpot|e2el?)(?:_(mean|median|p\d\d?))?(?:_derived)?_ms$")
ALIASES: Mapping[str, Sequence[str]] = {  # other names of a table's columns and of run.yaml's fields
    "isl": ("input_tokens", "prompt_tokens", "input_len"),
    "osl": ("output_tokens", "output_len"),
    "concurrency": ("users", "num_users", "max_concurrency"),
    "question_tokens": ("prompt_tokens", "input_tokens", "isl"),
    "output_tokens": ("osl", "output_len"),
    "prompt_tokens": ("isl", "input_tokens"),
    "arrival_dataset_s": ("arrival_s", "arrival_wall_s", "send_s"),
    "rate_rps": ("request_rate", "rate"),
    "gpu": ("hardware",),
    "tp": ("tensor_parallel_size", "tensor_parallel"),
}
ROOMIER_UTILIZATION = 0.95  # tried where none was recorded and the usual one is too small


@dataclass(frozen=True)
class Unrecorded:
    """What closed-loop rows usually leave out.

    The values are those of the public InferenceMAX benchmark, whose grid of lengths and concurrencies
    the H200 rows match: lengths drawn evenly from 80 to 100 % of nominal, ten requests per user all
    sent as fast as the concurrency allows, 8,192 tokens a step, max_num_seqs = concurrency,
    utilization 0.9, no prefix cache, asynchronous scheduling, fp8 checkpoints with an fp8 KV cache.
    """

    length_low: float = 0.8
    requests_per_user: int = 10
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9


UNRECORDED = Unrecorded()


EXACT_MS = 5.1e-5  # half of the last digit kept in observations.yaml


@dataclass(frozen=True)
class Case:
    """One simulation to run, and what was measured on it.

    workload: the plan that `published_workloads` turns into requests. measured: figures in
    milliseconds by group ("" where there is one group only) and metric name. sessions: of a staged run
    the session that each group's requests have; a group that is missing means all requests.
    ttft_from_queue: whether TTFT counts from the engine's queue instead of the client's sending.
    variant: what this case does otherwise than the run says, for an extra prediction of it.
    known_within_ms: how exactly the measured figures were published.
    """

    run: str
    row: str
    expert: ExpertConfig
    kind: str
    workload: Mapping[str, Any]
    users: int
    measured: Mapping[str, Mapping[str, float]]
    ttft_from_queue: bool = False
    notes: tuple[str, ...] = ()
    sessions: Mapping[str, int] = field(default_factory=dict)
    variant: str = ""
    known_within_ms: float = EXACT_MS


def read_runs(folder: Path, skipped: list[str] | None = None) -> list[Case]:
    """All cases of a folder of runs, or of one run's own folder.

    A run or row that cannot be read raises DataError naming file and field; with `skipped` its message
    is appended there instead and the others are read.
    """
    files = [folder / "run.yaml"] if (folder / "run.yaml").is_file() else sorted(folder.rglob("run.yaml"))
    if not files:
        raise DataError(f"{folder}: no run.yaml in it or in its folders; give a folder of published runs")
    cases: list[Case] = []
    for file in files:
        try:
            cases += read_run(file.parent, skipped)
        except (ErsimError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if skipped is None:
                raise
            said = str(error) if isinstance(error, (ErsimError, OSError)) else f"{file}: {error!r}"
            skipped.append(said)
    return cases


def read_run(folder: Path, skipped: list[str] | None = None) -> list[Case]:
    """The cases of one run's folder; `skipped` as in `read_runs`."""
    path = folder / "run.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({error})") from error
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in READERS:
        raise DataError(f"{path}: kind must be one of {', '.join(READERS)}, got {kind!r}")
    folder = folder.resolve()
    cases = READERS[kind](folder, data, [] if skipped is None else skipped, skipped is None)
    within_ms = float(data.get("known_within_ms", EXACT_MS))
    return [replace(case, known_within_ms=within_ms) for case in cases]


# ---- what all kinds share -----------------------------------------------------------------------


def _pick(name: str, data: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """A field from run.yaml, or from the row where the run leaves it to the rows; None when in neither."""
    for source in (data, row):
        for key in (name, *ALIASES.get(name, ())):
            if is_recorded(source.get(key)):
                return source[key]
    return None


def _need(name: str, data: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Any:
    value = _pick(name, data, row)
    if value is None:
        raise DataError(f"{where}: {name} is neither in run.yaml nor a column of its table")
    return value


def _expert(
    data: Mapping[str, Any], row: Mapping[str, Any], engine: Mapping[str, Any], where: str
) -> ExpertConfig:
    """The expert of a run, each field from the row where the run says "per row"."""
    gpu = data.get("gpu")
    fields = gpu if isinstance(gpu, dict) else {}
    gpu_text = fields.get("name") or _need("gpu", {} if isinstance(gpu, dict) else data, row, where)
    model = str(_need("model", data, row, where))
    recorded = _pick("precision", data, row)
    tp = _pick("tp", data, row) or fields.get("count") or 1
    expert = ExpertConfig(
        model=model_name(model, where),
        precision=precision_name(model if recorded is None else str(recorded), where),
        gpu=gpu_name(str(gpu_text), where),
        tp=int(float(tp)),
        engine=EngineSettings(**engine),
    )
    validate_expert(expert, f"{where}: expert")
    return expert


def _recorded(data: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Engine settings of run.yaml, overruled by those that the row itself gives."""
    settings = engine_fields(data.get("engine"))
    return settings | {str(key): value for key, value in row.items() if is_recorded(value)}


def _table(folder: Path, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """A run's table with our names for its columns."""
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path} is missing; run.yaml names it")
    frame = pd.read_csv(path)
    for column in columns:
        found = next((name for name in (column, *ALIASES.get(column, ())) if name in frame), None)
        if found is None:
            raise DataError(f"{path}: column {column} is missing, found {', '.join(frame.columns)}")
        frame[column] = frame[found]
    if frame.empty:
        raise DataError(f"{path}: holds no rows")
    return frame


def metric_name(column: str, statistic: str = "mean") -> str | None:
    """`mean_ttft_ms` of the column ttft_ms or ttft_mean_ms; None for what is not compared."""
    match = METRIC.fullmatch(column)
    if match is None:
        return None
    base, stat = ("e2el" if match.group(1).startswith("e2e") else match.group(1)), match.group(2) or statistic
    return f"{'median' if stat == 'p50' else stat}_{base}_ms"


def _statistic(data: Mapping[str, Any]) -> str:
    """Which statistic unmarked columns hold: the median where run.yaml says so and no mean, else the mean."""
    text = str(data.get("statistic", "")).lower()
    return "median" if re.search(r"median|p50", text) and "mean" not in text else "mean"


def _measured(row: Mapping[str, Any], statistic: str) -> dict[str, float]:
    """The latencies a row gives, in milliseconds by metric name."""
    found: dict[str, float] = {}
    for column, value in row.items():
        name = metric_name(str(column), statistic)
        number = pd.to_numeric(value, errors="coerce") if name else None
        if name and number is not None and np.isfinite(number) and number > 0:
            found.setdefault(name, float(number))
    return found


def _from_queue(data: Mapping[str, Any]) -> bool:
    return "queued" in str(data.get("ttft_definition", ""))


def _fitting(expert: ExpertConfig, recorded: bool) -> tuple[ExpertConfig, str]:
    """The expert with more memory where utilization was not recorded and it does not fit otherwise."""
    try:
        build_expert_model(expert, "expert")
    except DoesNotFitError:
        roomier = dataclasses.replace(
            expert, engine=dataclasses.replace(expert.engine, gpu_memory_utilization=ROOMIER_UTILIZATION)
        )
        if recorded:
            raise
        build_expert_model(roomier, "expert")
        return roomier, f"does not fit at the usual gpu_memory_utilization: {ROOMIER_UTILIZATION} assumed"
    return expert, ""


def _notes(*found: str) -> tuple[str, ...]:
    return tuple(note for note in found if note)


# ---- per_request --------------------------------------------------------------------------------


def _per_request(folder: Path, data: Mapping[str, Any], skipped: list[str], strict: bool) -> list[Case]:
    where = str(folder / "run.yaml")
    columns = ("prompt_tokens", "output_tokens", "arrival_dataset_s")
    frame = _table(folder, str(data.get("requests", "requests.csv")), columns)
    frame["keys"] = pd.Series(_block_keys(folder, data, len(frame)), index=frame.index, dtype=object)
    frame["arrival_s"] = pd.to_numeric(frame.arrival_dataset_s, errors="coerce")
    usable = frame.arrival_s.notna() & (frame.prompt_tokens >= 1) & (frame.output_tokens >= 1)
    recorded = _recorded(data, {})
    engine = engine_settings(recorded, version(data.get("vllm")), where)
    longest = int((frame.prompt_tokens + frame.output_tokens)[usable].max()) if usable.any() else 1
    engine.setdefault("max_model_len", longest + 256)
    expert = _expert(data, {}, engine, where)
    size = build_expert_model(expert, where).engine.block_size
    frame["keys"] = [_wider(keys, size) for keys in frame["keys"]]
    dropped = int((~usable).sum())
    return [
        Case(
            run=folder.name,
            row="all",
            expert=expert,
            kind="per_request",
            workload={"frame": frame[usable][["prompt_tokens", "output_tokens", "arrival_s", "keys"]]},
            users=1,
            measured={"": _request_figures(frame[usable], where)},
            ttft_from_queue=_from_queue(data),
            notes=_notes(
                f"{dropped} requests without lengths or arrival left out" if dropped else "",
                unmodelled(recorded),
            ),
        )
    ]


def _block_keys(folder: Path, data: Mapping[str, Any], count: int) -> list[list[int] | None]:
    """Ids of each prompt's full blocks of 16 tokens, None for each where the run gives none."""
    if not data.get("prefix_blocks"):
        return [None] * count
    path = folder / str(data["prefix_blocks"])
    if not path.is_file():
        raise DataError(f"{path} is missing; run.yaml names it")
    blocks = json.loads(path.read_text(encoding="utf-8"))
    blocks = list(blocks.values()) if isinstance(blocks, dict) else blocks
    if len(blocks) != count:
        raise DataError(f"{path}: {len(blocks)} entries for {count} requests")
    return list(blocks)


def _wider(keys: list[int] | None, block_size: int) -> list[int] | None:
    """Ids of blocks of `block_size` tokens: that of the last 16-token block in each names its prefix."""
    if keys is None or block_size == 16:
        return keys
    return None if block_size % 16 else keys[block_size // 16 - 1 :: block_size // 16]


def _request_figures(frame: pd.DataFrame, where: str) -> dict[str, float]:
    """Mean and p99 of what was measured per request; TPOT from TTFT and E2E where it is not given."""
    columns = {name: pd.to_numeric(frame[name], errors="coerce") for name in frame if METRIC.match(str(name))}
    if "e2e_ms" not in columns and "e2el_ms" in columns:
        columns["e2e_ms"] = columns["e2el_ms"]
    if "tpot_ms" not in columns and {"ttft_ms", "e2e_ms"} <= set(columns):
        gaps = (frame.output_tokens - 1).where(frame.output_tokens > 1)
        columns["tpot_ms"] = (columns["e2e_ms"] - columns["ttft_ms"]) / gaps
    found = {}
    for column, statistics in (("ttft", ("mean", "p99")), ("tpot", ("mean",)), ("e2e", ("mean", "p99"))):
        values = columns.get(f"{column}_ms", pd.Series(dtype=float))
        if column == "tpot":
            values = values[frame.output_tokens > 1] if len(values) else values
        if values.notna().any():
            for statistic in statistics:
                name = metric_name(f"{column}_{statistic}_ms")
                assert name is not None
                found[name] = float(values.mean() if statistic == "mean" else values.quantile(0.99))
    if not found:
        raise DataError(f"{where}: its requests hold none of ttft_ms, tpot_ms and e2e_ms")
    return found


# ---- closed_loop_rows ---------------------------------------------------------------------------


def _closed_loop(folder: Path, data: Mapping[str, Any], skipped: list[str], strict: bool) -> list[Case]:
    frame = _table(folder, str(data.get("rows", "rows.csv")), ("isl", "osl", "concurrency"))
    cases, bad = [], []
    for index, row in frame.iterrows():
        where = f"{folder.name} row {index}"
        try:
            cases.append(_closed_loop_row(folder.name, data, dict(row), where))
        except (ErsimError, ValueError) as error:
            if strict:
                raise
            bad.append(str(error) if str(error).startswith(folder.name) else f"{where}: {error}")
    skipped += _said_once(bad)
    return cases


def _said_once(messages: Sequence[str]) -> list[str]:
    """One message for rows that differ in nothing but their number."""
    alike: dict[str, list[str]] = {}
    for message in messages:
        alike.setdefault(re.sub(r" row \d+", "", message), []).append(message)
    return [
        found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} more rows likewise)"
        for found in alike.values()
    ]


def _closed_loop_row(run: str, data: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Case:
    users, isl, osl = (_positive(name, row[name], where) for name in ("concurrency", "isl", "osl"))
    recorded = _recorded(data, row)
    release = version(data.get("vllm") if is_recorded(data.get("vllm")) else row.get("vllm"))
    engine = engine_settings(recorded, release, where)
    precision = _expert(data, row, {}, where).precision
    asked = "gpu_memory_utilization" in engine_settings(recorded, None, where)
    if release is None:
        engine.setdefault("max_num_batched_tokens", UNRECORDED.max_num_batched_tokens)
        engine.setdefault("max_num_seqs", users)
        engine.setdefault("gpu_memory_utilization", UNRECORDED.gpu_memory_utilization)
        engine.setdefault("async_scheduling", True)
        if precision == "fp8":
            engine.setdefault("kv_cache_dtype", "fp8")
    engine.setdefault("max_model_len", isl + osl + 256)
    engine.setdefault("enable_prefix_caching", False)
    expert, tight = _fitting(_expert(data, row, engine, where), asked)
    low, jitter = _shortest(data, release)
    measured = _measured(row, _statistic(data))
    if not measured:
        raise DataError(f"{where}: holds no latency (ttft_ms, tpot_ms, ...)")
    assumed = "engine settings unrecorded: those of InferenceMAX assumed" if release is None else ""
    return Case(
        run=run,
        row=f"tp{expert.tp} {isl}/{osl} x{users}",
        expert=expert,
        kind="closed_loop_rows",
        workload={
            "isl": isl,
            "osl": osl,
            "length_low": low,
            "requests_per_user": UNRECORDED.requests_per_user,
        },
        users=users,
        measured={"": measured},
        ttft_from_queue=_from_queue(data),
        notes=_notes(assumed, jitter, unmodelled(recorded), tight),
    )


def _positive(name: str, value: Any, where: str) -> int:
    number = pd.to_numeric(value, errors="coerce")
    if not number >= 1:
        raise DataError(f"{where}: {name} must be a whole number >= 1, got {value}")
    return int(number)


def _shortest(data: Mapping[str, Any], release: tuple[int, ...] | None) -> tuple[float, str]:
    """The shortest length as a share of nominal, and what was assumed about it."""
    text = str(data.get("lengths", "")).lower()
    span = re.search(r"(\d+)\s*(?:-|to)\s*100", text)
    if "unrecorded" not in text and span is not None:
        return int(span.group(1)) / 100, ""
    if "unrecorded" not in text and re.search(r"fixed|constant|exact", text):
        return 1.0, ""
    low = UNRECORDED.length_low
    return low, f"length jitter unrecorded: {100 * low:.0f} to 100 % of nominal assumed"


# ---- open_loop_stages ---------------------------------------------------------------------------


def _open_loop(folder: Path, data: Mapping[str, Any], skipped: list[str], strict: bool) -> list[Case]:
    columns = ("rate_rps", "output_tokens")
    frame = _table(folder, str(data.get("stages", "stages.csv")), columns)
    keys = frame["exp_id"] if "exp_id" in frame else pd.Series(0, index=frame.index)
    cases = []
    for number, rows in frame.groupby(keys, sort=False):
        where = f"{folder.name} experiment {number}"
        try:
            cases.append(_experiment(folder.name, data, rows.reset_index(drop=True), number, where))
        except (ErsimError, ValueError) as error:
            if strict:
                raise
            skipped.append(str(error) if str(error).startswith(folder.name) else f"{where}: {error}")
    return cases


def _experiment(run: str, data: Mapping[str, Any], rows: pd.DataFrame, number: Any, where: str) -> Case:
    """One server's stages. A row whose rate is no number (8+20) sums up all of them."""
    rates = pd.to_numeric(rows.rate_rps, errors="coerce")
    single = rates.notna() & (rates > 0)
    if "stage" in rows:
        single &= rows.stage.astype(str).str.lower() != "all"
    if not single.any():
        raise DataError(f"{where}: has no stage with a rate")
    first = dict(rows[single].iloc[0])
    recorded = _recorded(data, first)
    release = version(data.get("vllm") if is_recorded(data.get("vllm")) else first.get("vllm"))
    engine = engine_settings(recorded, release, where)
    stages = [_stage(dict(row), where) for _, row in rows[single].iterrows()]
    longest = max(s["system_tokens"] + s["question_tokens"] + s["output_tokens"] for s in stages)
    engine.setdefault("max_model_len", int(longest) + 256)
    names = rows["stage"].astype(str) if "stage" in rows else pd.Series(map(str, range(len(rows))))
    statistic = _statistic(data)
    measured = {names[i]: _measured(dict(row), statistic) for i, row in rows.iterrows()}
    measured = {name: found for name, found in measured.items() if found}
    if not measured:
        raise DataError(f"{where}: holds no latency (e2e_mean_ms, ttft_mean_ms, ...)")
    return Case(
        run=run,
        row=f"exp {number}",
        expert=_expert(data, first, engine, where),
        kind="open_loop_stages",
        workload={"stages": stages},
        users=1,
        measured=measured,
        ttft_from_queue=_from_queue(data),
        notes=_notes(unmodelled(recorded)),
        sessions={name: i for i, name in enumerate(names[single])},
    )


def _stage(row: Mapping[str, Any], where: str) -> dict[str, float]:
    """One stage's load; prompts are all different unless the row counts the distinct ones."""

    def number(name: str, default: float = 0.0) -> float:
        value = _pick(name, {}, row)
        return default if value is None else float(value)

    rate, seconds, requests = number("rate_rps"), number("duration_s"), number("n_requests")
    if not seconds:
        if not requests:
            raise DataError(f"{where}: a stage has neither duration_s nor n_requests")
        seconds = requests / rate
    question = number("question_tokens")
    if not question:
        raise DataError(f"{where}: a stage has no question_tokens (or prompt_tokens)")
    template = TEMPLATE_TOKENS if is_recorded(row.get("question_tokens")) else 0
    return {
        "rate_rps": rate,
        "duration_s": seconds,
        "requests": requests,
        "distinct": number("distinct_prompts"),
        "system_tokens": number("system_prompt_tokens"),
        "question_tokens": question + template,
        "output_tokens": number("output_tokens"),
    }


READERS = {"per_request": _per_request, "closed_loop_rows": _closed_loop, "open_loop_stages": _open_loop}


def make_workload(case: Case, seed: int) -> Workload:
    """The case's requests; random ones are drawn from `seed`."""
    rng = np.random.default_rng([seed, 17])
    if case.kind == "per_request":
        return recorded_requests(case.workload)
    if case.kind == "closed_loop_rows":
        return pooled_users(case.workload, case.users, rng)
    return staged_requests(case.workload, rng)


def request_count(case: Case, workload: Workload) -> int:
    """How many requests the case sends in all."""
    if case.kind == "closed_loop_rows":
        return pooled_count(case.workload, case.users)
    return sum(1 for _ in workload.arrivals())
