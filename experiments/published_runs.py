"""Reads folders of published vLLM runs (``run.yaml`` and its table) into cases to simulate.

Three kinds: `per_request` (requests at recorded times), `closed_loop_rows` (users without think
time, one row per measurement) and `open_loop_stages` (Poisson stages back to back on one server).
What a run leaves unrecorded is filled in by `UNRECORDED`, the same for every row, and said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ersim.config import EngineSettings, ExpertConfig
from ersim.errors import DataError
from ersim.types import Request, Segment
from ersim.workload.base import Workload
from ersim.workload.replay import ReplayWorkload

GPU_PATTERNS = (
    (r"h200", "h200-141gb"),
    (r"h100", "h100-80gb"),
    (r"b200", "b200"),
    (r"a100.*40", "a100-40gb"),
    (r"a100", "a100-80gb"),
    (r"4090", "rtx4090"),
    (r"pro[ _-]*6000", "rtxpro6000"),
    (r"l40s", "l40s"),
    (r"a10g", "a10g"),
    (r"\bl4\b", "l4"),
)
TEMPLATE_TOKENS = 28  # the chat template's own: 575 tokens arrive where 547 are configured
ASYNC_SINCE = (0, 14)  # vLLM releases from this one schedule asynchronously by default
FULL_ISL_SINCE = (0, 17)  # and from this one admit a request only if its whole prompt fits
GRAPHS_PROFILED_SINCE = (0, 21)


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


@dataclass(frozen=True)
class Case:
    """One simulation to run, and what was measured on it.

    measured: figures in milliseconds by group ("" where there is one group only) and metric name.
    ttft_from_queue: whether TTFT counts from the engine's queue instead of the client's sending.
    """

    run: str
    row: str
    expert: ExpertConfig
    kind: str
    workload: Mapping[str, Any]
    users: int
    measured: Mapping[str, Mapping[str, float]]
    ttft_from_queue: bool = False
    unrecorded: str = ""
    groups: Sequence[str] = field(default_factory=tuple)


def read_runs(folder: Path) -> list[Case]:
    """All cases of a folder of runs, or of one run's own folder. Raises DataError naming file and field."""
    if (folder / "run.yaml").is_file():
        return read_run(folder)
    files = sorted(folder.glob("*/run.yaml"))
    if not files:
        raise DataError(f"{folder}: no run.yaml in it or in its folders; give a folder of published runs")
    return [case for file in files for case in read_run(file.parent)]


def read_run(folder: Path) -> list[Case]:
    """The cases of one run's folder."""
    path = folder / "run.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in READERS:
        raise DataError(f"{path}: kind must be one of {', '.join(READERS)}, got {kind!r}")
    cases: list[Case] = READERS[kind](folder, data)
    return cases


def gpu_name(text: str, where: str) -> str:
    """The name in conf/gpu that a GPU's marketing name means."""
    for pattern, name in GPU_PATTERNS:
        if re.search(pattern, text.lower()):
            return name
    raise DataError(f"{where}: gpu {text!r} is not known; describe it in conf/gpu and name it there")


def model_name(text: str, where: str) -> str:
    """The name in conf/model that a checkpoint's name means (Llama 3, 3.1 and 3.3 share their shapes)."""
    match = re.search(r"llama-?3(?:\.\d)?-(\d+)b", text.lower())
    sizes = {"8": "llama3.1-8b", "70": "llama3.1-70b", "1": "llama3.2-1b", "3": "llama3.2-3b"}
    if match is None or match.group(1) not in sizes:
        raise DataError(f"{where}: model {text!r} is not known; Llama 3 models of 1, 3, 8 and 70 billion are")
    return sizes[match.group(1)]


def precision_name(text: str) -> str:
    """bf16, fp8, int8 or int4 from however the run writes it."""
    lowered = text.lower()
    for mark, name in (("fp8", "fp8"), ("w8a8", "int8"), ("int8", "int8"), ("awq", "int4"), ("gptq", "int4")):
        if mark in lowered:
            return name
    return "int4" if "int4" in lowered or "w4" in lowered else "bf16"


def version(text: object) -> tuple[int, ...] | None:
    """(0, 15, 1) of "v0.15.1"; None when unrecorded."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", str(text))
    return tuple(int(part) for part in match.groups() if part) if match else None


def engine_settings(recorded: Mapping[str, Any], release: tuple[int, ...] | None) -> dict[str, Any]:
    """Recorded engine settings under `EngineSettings`' names, and defaults that the release changed."""
    settings: dict[str, Any] = {}
    for name in EngineSettings.__dataclass_fields__:
        value = recorded.get(name)
        if value is not None and value == value and not isinstance(value, str):  # neither NaN nor "per row"
            settings[name] = value
    if recorded.get("policy") in ("fcfs", "priority"):
        settings["policy"] = recorded["policy"]
    if isinstance(recorded.get("num_gpu_blocks"), (int, float)):
        settings["kv_blocks"] = int(recorded["num_gpu_blocks"])
    if release is not None:
        settings.setdefault("async_scheduling", release >= ASYNC_SINCE)
        settings.setdefault("scheduler_reserve_full_isl", release >= FULL_ISL_SINCE)
        settings.setdefault("gpu_memory_utilization", 0.9 if release < GRAPHS_PROFILED_SINCE else 0.92)
    return settings


def _expert(
    data: Mapping[str, Any], row: Mapping[str, Any], engine: Mapping[str, Any], where: str
) -> ExpertConfig:
    """The expert of a run, each field from the row where the run says "per row"."""

    def pick(name: str, *columns: str) -> Any:
        value = data.get(name)
        if value is None or value == "per row":
            value = next((row[column] for column in (name, *columns) if column in row), None)
        if value is None:
            raise DataError(f"{where}: {name} is neither in run.yaml nor a column of its table")
        return value

    gpu = data.get("gpu")
    gpu_text = gpu.get("name") if isinstance(gpu, dict) else pick("gpu", "hardware")
    return ExpertConfig(
        model=model_name(str(pick("model")), where),
        precision=precision_name(str(pick("precision"))),
        gpu=gpu_name(str(gpu_text), where),
        tp=int(pick("tp")),
        engine=EngineSettings(**engine),
    )


def _table(folder: Path, name: str, columns: Sequence[str]) -> pd.DataFrame:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path} is missing; run.yaml names it")
    frame = pd.read_csv(path)
    for column in columns:
        if column not in frame:
            raise DataError(f"{path}: column {column} is missing, found {', '.join(frame.columns)}")
    return frame


# ---- per_request --------------------------------------------------------------------------------


def _per_request(folder: Path, data: Mapping[str, Any]) -> list[Case]:
    columns = ("prompt_tokens", "output_tokens", "arrival_dataset_s", "ttft_ms", "tpot_ms", "e2e_ms")
    frame = _table(folder, str(data.get("requests", "requests.csv")), columns)
    engine = engine_settings(data.get("engine") or {}, version(data.get("vllm")))
    blocks = None
    if data.get("prefix_blocks"):
        blocks = json.loads((folder / str(data["prefix_blocks"])).read_text(encoding="utf-8"))
        if len(blocks) != len(frame):
            raise DataError(
                f"{folder / str(data['prefix_blocks'])}: {len(blocks)} entries for {len(frame)} requests"
            )
    measured = {
        "": {
            "mean_ttft_ms": float(frame.ttft_ms.mean()),
            "p99_ttft_ms": float(frame.ttft_ms.quantile(0.99)),
            "mean_tpot_ms": float(frame.tpot_ms.mean()),
            "mean_e2el_ms": float(frame.e2e_ms.mean()),
            "p99_e2el_ms": float(frame.e2e_ms.quantile(0.99)),
        }
    }
    plan = {"frame": frame, "blocks": blocks}
    expert = _expert(data, {}, engine, str(folder / "run.yaml"))
    from_queue = "queued" in str(data.get("ttft_definition", ""))
    return [Case(folder.name, "all", expert, "per_request", plan, 1, measured, from_queue)]


def _recorded_requests(plan: Mapping[str, Any]) -> Workload:
    frame = plan["frame"].sort_values("arrival_dataset_s", kind="stable")
    requests = []
    for index, row in frame.iterrows():
        blocks = plan["blocks"]
        requests.append(
            Request(
                request_id=int(index),
                user=int(index),
                prompt_index=0,
                prompt_tokens=int(row.prompt_tokens),
                output_tokens=int(row.output_tokens),
                max_tokens=int(row.output_tokens),
                output_content_id=int(index),
                block_keys=None if blocks is None else blocks[int(index)],
                arrival_s=float(row.arrival_dataset_s),
            )
        )
    return ReplayWorkload(requests)


# ---- closed_loop_rows ---------------------------------------------------------------------------


class PooledUsers(Workload):
    """Users who take turns at one pool of requests, as load generators with a concurrency cap do.

    When the pool is empty a user who is done stays idle, so the run drains.
    """

    closed = True

    def __init__(self, users: int, prompts: Sequence[int], outputs: Sequence[int]) -> None:
        self._lengths = list(zip(prompts, outputs, strict=True))
        self._planned, self._sent = users, 0

    def next_request(self, user: int) -> Request:
        prompt, output = self._lengths[min(self._sent, len(self._lengths) - 1)]
        request = Request(self._sent, user, 0, prompt, output, output)
        self._sent += 1
        return request

    def think_s(self, user: int) -> float:
        self._planned += 1
        return 0.0 if self._planned <= len(self._lengths) else 1e12

    def start_s(self, user: int) -> float:
        return 0.0


def _closed_loop(folder: Path, data: Mapping[str, Any]) -> list[Case]:
    frame = _table(
        folder, str(data.get("rows", "rows.csv")), ("isl", "osl", "concurrency", "ttft_ms", "tpot_ms")
    )
    recorded = dict(data.get("engine") or {})
    release = version(data.get("vllm"))
    cases = []
    for index, row in frame.iterrows():
        users, isl, osl = int(row.concurrency), int(row.isl), int(row.osl)
        engine = engine_settings({**recorded, **_present(row, recorded)}, release)
        expert = _expert(data, dict(row), {}, f"{folder.name} row {index}")
        engine.setdefault("max_num_batched_tokens", UNRECORDED.max_num_batched_tokens)
        engine.setdefault("max_num_seqs", users)
        engine.setdefault("gpu_memory_utilization", UNRECORDED.gpu_memory_utilization)
        engine.setdefault("max_model_len", isl + osl + 256)
        engine.setdefault("enable_prefix_caching", False)
        engine.setdefault("async_scheduling", True)
        if expert.precision == "fp8":
            engine.setdefault("kv_cache_dtype", "fp8")
        expert.engine = EngineSettings(**engine)
        measured = {"": {"mean_ttft_ms": float(row.ttft_ms), "mean_tpot_ms": float(row.tpot_ms)}}
        name = f"tp{expert.tp} {isl}/{osl} x{users}"
        plan = {"isl": isl, "osl": osl, "jitter": str(data.get("lengths", "")) != "fixed"}
        cases.append(
            Case(
                folder.name,
                name,
                expert,
                "closed_loop_rows",
                plan,
                users,
                measured,
                False,
                _missing(recorded),
            )
        )
    return cases


def _present(row: pd.Series, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Engine settings that the row itself gives."""
    names = set(EngineSettings.__dataclass_fields__) & set(row.index)
    return {name: row[name].item() if hasattr(row[name], "item") else row[name] for name in names}


def _missing(recorded: Mapping[str, Any]) -> str:
    if any(value == "unrecorded" for value in recorded.values()) or recorded.get("defaults"):
        return "engine settings and length jitter unrecorded: those of InferenceMAX assumed"
    return ""


def _pooled(plan: Mapping[str, Any], users: int, rng: np.random.Generator) -> Workload:
    count = UNRECORDED.requests_per_user * users
    low = UNRECORDED.length_low if plan["jitter"] else 1.0

    def draw(nominal: int) -> list[int]:
        return [int(x) for x in rng.integers(max(1, int(low * nominal)), nominal + 1, size=count)]

    return PooledUsers(users, draw(plan["isl"]), draw(plan["osl"]))


# ---- open_loop_stages ---------------------------------------------------------------------------

STAGE_METRICS = (
    ("e2e_mean_ms", "mean_e2el_ms"),
    ("e2e_p90_ms", "p90_e2el_ms"),
    ("e2e_p99_ms", "p99_e2el_ms"),
    ("ttft_mean_ms", "mean_ttft_ms"),
    ("ttft_p90_ms", "p90_ttft_ms"),
    ("ttft_p99_ms", "p99_ttft_ms"),
    ("tpot_mean_derived_ms", "mean_tpot_ms"),
)


def _open_loop(folder: Path, data: Mapping[str, Any]) -> list[Case]:
    columns = (
        "stage",
        "rate_rps",
        "duration_s",
        "question_tokens",
        "output_tokens",
        "e2e_mean_ms",
        "ttft_mean_ms",
    )
    frame = _table(folder, str(data.get("stages", "stages.csv")), columns)
    cases = []
    keys = frame["exp_id"] if "exp_id" in frame else pd.Series(0, index=frame.index)
    for number, rows in frame.groupby(keys, sort=False):
        rows = rows.reset_index(drop=True)
        first = rows.iloc[0]
        recorded = {**(data.get("engine") or {}), **_stage_engine(first)}
        engine = engine_settings(recorded, version(data.get("vllm") or first.get("vllm")))
        expert = _expert(data, dict(first), engine, f"{folder.name} experiment {number}")
        measured = {
            str(row["stage"]): {
                name: float(row[column])
                for column, name in STAGE_METRICS
                if column in rows and pd.notna(row[column])
            }
            for _, row in rows.iterrows()
        }
        stages = rows[pd.to_numeric(rows.stage, errors="coerce").notna()]
        if stages.empty:
            raise DataError(f"{folder.name}: experiment {number} has no numbered stage")
        cases.append(
            Case(folder.name, f"exp {number}", expert, "open_loop_stages", {"stages": stages}, 1, measured)
        )
    return cases


def _stage_engine(row: pd.Series) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column, name in (
        ("max_num_seqs", "max_num_seqs"),
        ("max_num_batched_tokens", "max_num_batched_tokens"),
        ("max_model_len", "max_model_len"),
        ("gpu_kv_blocks_16tok", "kv_blocks"),
    ):
        if column in row and pd.notna(row[column]):
            found[name] = int(float(row[column]))
    if "gpu_mem_util" in row and pd.notna(row["gpu_mem_util"]):
        found["gpu_memory_utilization"] = float(row["gpu_mem_util"])
    return found


def _staged(plan: Mapping[str, Any], rng: np.random.Generator) -> Workload:
    """Poisson stages back to back; requests repeat the distinct prompts behind one system prompt."""
    requests: list[Request] = []
    start_s = 0.0
    for _, stage in plan["stages"].iterrows():
        count = rng.poisson(float(stage.rate_rps) * float(stage.duration_s))
        times = np.sort(rng.uniform(start_s, start_s + float(stage.duration_s), size=count))
        start_s += float(stage.duration_s)
        distinct = stage.get("distinct_prompts")
        system = int(stage.get("system_prompt_tokens") or 0)
        question = int(stage.question_tokens) + TEMPLATE_TOKENS
        for time_s in times:
            number = len(requests)
            choice = number if distinct is None or pd.isna(distinct) else int(rng.integers(int(distinct)))
            requests.append(
                Request(
                    request_id=number,
                    user=number,
                    prompt_index=0,
                    prompt_tokens=system + question,
                    output_tokens=int(stage.output_tokens),
                    max_tokens=int(stage.output_tokens),
                    session=int(stage.stage),
                    segments=(Segment(0, max(1, system)), Segment(1 + choice, question)),
                    arrival_s=float(time_s),
                )
            )
    return ReplayWorkload(requests)


READERS = {"per_request": _per_request, "closed_loop_rows": _closed_loop, "open_loop_stages": _open_loop}


def make_workload(case: Case, seed: int) -> Workload:
    """The case's requests; random ones are drawn from `seed`."""
    rng = np.random.default_rng([seed, 17])
    if case.kind == "per_request":
        return _recorded_requests(case.workload)
    if case.kind == "closed_loop_rows":
        return _pooled(case.workload, case.users, rng)
    return _staged(case.workload, rng)


def request_count(case: Case, workload: Workload) -> int:
    """How many requests the case sends in all."""
    if case.kind == "closed_loop_rows":
        return UNRECORDED.requests_per_user * case.users
    return sum(1 for _ in workload.arrivals())
