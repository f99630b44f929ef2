"""Results into MLflow: one run per job under one parent per sweep, written by one process.

Logging is idempotent: a sweep that is logged again replaces its earlier runs, and one that has not
changed since is left alone. MLflow is imported late, since that alone takes more than a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ersim.errors import ConfigError
from experiments.comparison import SHOWN, numbers
from experiments.paths import tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

SWEEP_TAG, JOB_TAG, SIGNATURE_TAG = "ersim.sweep", "ersim.job", "ersim.signature"
BATCH_METRICS, BATCH_PARAMS = 1000, 100  # MLflow's limits on one log_batch
CURVES = (
    *(column for column, *_ in SHOWN),
    "request_throughput",
    "request_goodput",
    "goodput_share",
    "p99_tpot_ms",
    "p99_e2el_ms",
)
JOB_FILES = ("summary.json", "config.yaml", "calibration.json", "error.json")


def connect(uri: str | None) -> MlflowClient:
    """A client of the store, which is made if it is a new sqlite file.

    Only one process at a time may make the schema: others wait. Raises ConfigError if the store
    cannot be reached.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    import logging

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    chosen = uri or tracking_uri()
    try:
        with _schema_lock(chosen):
            client = MlflowClient(tracking_uri=chosen)
            client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"tracking.uri {chosen!r} cannot be used: {str(error).splitlines()[0]}; start the server, "
            "or set tracking.enabled=false"
        ) from error
    return client


@contextlib.contextmanager
def _schema_lock(uri: str) -> Iterator[None]:
    """Hold a lock beside a sqlite store while its schema may be made; write-ahead logging on."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    import fcntl

    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f"{path.name}-lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        yield


def experiment_id(client: MlflowClient, name: str, uri: str | None) -> str:
    """The experiment's id; made if new, its artifacts beside a sqlite store."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    chosen = uri or tracking_uri()
    location = None
    if chosen.startswith("sqlite:///"):
        location = (Path(chosen.removeprefix("sqlite:///")).parent / "artifacts").resolve().as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def log_sweep(
    folder: Path,
    manifest: Mapping[str, Any],
    jobs: list[dict[str, Any]],
    frame: pd.DataFrame,
    figures: list[Path],
) -> dict[str, str]:
    """Log a sweep, replacing what was logged of it before; {experiment_id, parent_run_id, state}.

    Jobs that never ran are left out; a parent with failed or missing jobs is FAILED.
    """
    settings = manifest["tracking"]
    client = connect(settings["uri"])
    experiment = experiment_id(client, settings["experiment"], settings["uri"])
    signature = _signature(jobs)
    old = _runs_of(client, experiment, manifest["sweep_id"])
    for run in old:
        if run.data.tags.get(SIGNATURE_TAG) == signature:
            return {"experiment_id": experiment, "parent_run_id": run.info.run_id, "state": "unchanged"}
    for run in old:
        client.delete_run(run.info.run_id)
    parent = _log_parent(client, experiment, manifest, frame, [*figures, *_sweep_files(folder)])
    for job in jobs:
        if job["status"] != "missing":
            _log_job(client, experiment, parent, manifest["sweep_id"], job)
    from experiments.mlflow_view import save_view

    save_view(client, experiment, manifest["sweep_id"], SWEEP_TAG, sorted({job["line"] for job in jobs}))
    ended = all(job["status"] == "finished" for job in jobs)
    client.set_tag(parent, SIGNATURE_TAG, signature)  # last: an interrupted logging is done again
    client.set_terminated(parent, "FINISHED" if ended else "FAILED")
    return {"experiment_id": experiment, "parent_run_id": parent, "state": "logged"}


def log_run(
    folder: Path,
    config: Mapping[str, Any],
    summary: dict[str, Any] | None,
    prompt_set: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Log one run that belongs to no sweep; {experiment_id, run_id}.

    Without a summary it failed, and error.json in its folder says why.
    """
    settings = config["tracking"]
    client = connect(settings["uri"])
    experiment = experiment_id(client, settings["experiment"], settings["uri"])
    fleet, users = str(config["fleet"]["name"]), int(config["users"])
    error = None if summary else json.loads((folder / "error.json").read_text(encoding="utf-8"))
    job = {
        "job": 0,
        "home": folder,
        "line": fleet,
        "fleet": fleet,
        "users": users,
        "seed": config["seed"],
        "overrides": {},
        "status": "finished" if summary else "failed",
        "summary": summary,
        "error": error,
        "prompt_set": prompt_set,
    }
    return {"experiment_id": experiment, "run_id": _log_job(client, experiment, None, None, job)}


def _signature(jobs: list[dict[str, Any]]) -> str:
    """A digest of all that would be logged."""
    content = [(job["job"], job["status"], job["summary"], job["error"]) for job in jobs]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _runs_of(client: MlflowClient, experiment: str, sweep_id: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            filter_string=f"tags.`{SWEEP_TAG}` = '{sweep_id}'",
            max_results=1000,
            page_token=token,
        )
        found.extend(page)
        token = page.token
        if not token:
            return found


def _sweep_files(folder: Path) -> list[Path]:
    return [folder / name for name in ("comparison.csv", "differences.csv", "multirun.yaml", "sweep.json")]


def _log_parent(
    client: MlflowClient, experiment: str, manifest: Mapping[str, Any], frame: pd.DataFrame, files: list[Path]
) -> str:
    """The sweep's own run: its curves (`sweep/<line>/<metric>`, step = users), figures and tables."""
    from mlflow.entities import Metric, Param

    note = f"`{manifest['command']}`, {len(manifest['jobs'])} jobs, {manifest['started']}"
    tags = {
        SWEEP_TAG: manifest["sweep_id"],
        "mlflow.source.name": manifest["command"],
        "mlflow.note.content": note,
    }
    run = client.create_run(experiment, run_name=manifest["sweep_id"], tags=tags)
    now = int(time.time() * 1000)
    metrics = []
    done = frame[frame["status"] == "finished"]
    for (line, users), group in done.groupby(["line", "users"], sort=False):
        for name in CURVES:
            if name in group and group[name].notna().any():
                key = f"sweep/{metric_name(str(line))}/{name}"
                metrics.append(Metric(key, float(group[name].mean()), now, int(users)))
    params = [
        Param("jobs", str(len(frame))),
        Param("finished", str(len(done))),
        Param("failed", str(int((frame["status"] == "failed").sum()))),
        Param("name", manifest["name"]),
    ]
    _log_batches(client, run.info.run_id, metrics, params, [])
    for path in files:
        if path.is_file():
            client.log_artifact(run.info.run_id, str(path), "figures" if path.suffix == ".png" else None)
    return str(run.info.run_id)


def _log_job(
    client: MlflowClient, experiment: str, parent: str | None, sweep_id: str | None, job: Mapping[str, Any]
) -> str:
    """One job's run: params, final metrics at step = users, its files, its prompt set, its end."""
    from mlflow.entities import Metric, RunTag

    name = f"{job['line']} u{job['users']}" + (f" s{job['seed']}" if job["seed"] else "")
    tags = {JOB_TAG: str(job["job"])}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    if sweep_id is not None:
        tags[SWEEP_TAG] = sweep_id
    run = client.create_run(experiment, run_name=name, tags=tags)
    run_id, now = str(run.info.run_id), int(time.time() * 1000)
    summary = job["summary"] or {}
    values = {metric_name(key): value for key, value in headline_metrics(summary).items()}
    metrics = [Metric(key, value, now, int(job["users"])) for key, value in values.items()]
    more = [RunTag("error", job["error"]["error"][:5000])] if job["error"] else []
    more += [RunTag("warning", "; ".join(summary["warnings"])[:5000])] if summary.get("warnings") else []
    _log_batches(client, run_id, metrics, job_params(job), more)
    prompt_set = summary.get("prompt_set") or job.get("prompt_set")  # a failed job has no summary
    if prompt_set:
        _log_dataset(client, run_id, prompt_set)
    for file in JOB_FILES:
        if (job["home"] / file).is_file():
            client.log_artifact(run_id, str(job["home"] / file))
    client.set_terminated(run_id, "FINISHED" if job["status"] == "finished" else "FAILED")
    return run_id


def headline_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures under vllm bench serve's names; interval ends and experts in sections of their own."""
    found: dict[str, float] = {}
    for key, value in numbers(dict(summary)).items():
        if key in ("users", "seed", "schema_version"):
            continue
        section = "interval/" if key.endswith(("_low", "_high")) else ""
        found[section + key] = value
    for expert, block in (summary.get("per_expert") or {}).items():
        for key in ("share", "busy_share", "median_ttft_ms", "median_tpot_ms", "peak_kv_used_fraction"):
            if isinstance(block.get(key), (int, float)):
                found[f"expert/{expert}/{key}"] = float(block[key])
    return {key: value for key, value in found.items() if abs(value) < 1e300}  # inf is stored as a number


def job_params(job: Mapping[str, Any]) -> list[Param]:
    """Scalars to group and filter by; a value that differs between experts is "mixed"."""
    from mlflow.entities import Param

    params: dict[str, Any] = {key: job[key] for key in ("line", "fleet", "users", "seed")}
    config_file = job["home"] / "config.yaml"
    if config_file.is_file():
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where it is built in
        config = yaml.load(config_file.read_text(encoding="utf-8"), Loader=loader)
        experts = list(config["fleet"]["experts"].values())
        for key in ("model", "precision", "gpu", "tp"):
            values = {expert[key] for expert in experts}
            params[key] = values.pop() if len(values) == 1 else "mixed"
        params["experts"] = len(experts)
        params["gpus"] = sum(expert["tp"] * expert["replicas"] for expert in experts)
        params["router"] = config["router"]["policy"]
        params["balancer"] = config["router"]["balancer"]
        params["arrivals"] = config["workload"]["arrivals"]
        params["lengths"] = config["workload"]["lengths"]["kind"]
    for key, value in job["overrides"].items():
        params.setdefault(metric_name(key), value)
    return [Param(key, str(value)) for key, value in params.items()]


def _log_dataset(client: MlflowClient, run_id: str, prompt_set: Mapping[str, Any]) -> None:
    """The prompt set as the run's dataset; MLflow allows 36 characters of digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=str(prompt_set["name"]),
        digest=str(prompt_set["digest"])[:36],
        source_type="local",
        source=json.dumps({"uri": str(prompt_set["name"])}),
        profile=json.dumps({"prompts": prompt_set.get("prompts")}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])


def _log_batches(
    client: MlflowClient, run_id: str, metrics: list[Metric], params: list[Param], tags: list[RunTag]
) -> None:
    """`log_batch` within its limits: one call for almost every run."""
    client.log_batch(run_id, metrics[:BATCH_METRICS], params[:BATCH_PARAMS], tags)
    for start in range(BATCH_METRICS, len(metrics), BATCH_METRICS):
        client.log_batch(run_id, metrics[start : start + BATCH_METRICS])


def metric_name(text: str) -> str:
    """`text` with what MLflow does not allow in names replaced by a colon or an underscore."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", text.replace("=", ":"))


def ui_url(host: str, port: int, experiment: str, sweep_id: str | None, view_key: str | None) -> str:
    """The MLflow page that compares a sweep's runs as charts (a plain link opens another page)."""
    query = "workflowType=machine_learning&compareRunsMode=CHART"
    if view_key:
        query += f"&viewStateShareKey={view_key}"
    elif sweep_id:
        from urllib.parse import quote

        wanted = f"tags.`{SWEEP_TAG}` = '{sweep_id}'"
        query += f"&searchFilter={quote(wanted)}"
    return f"http://{host}:{port}/#/experiments/{experiment}/runs?{query}"
