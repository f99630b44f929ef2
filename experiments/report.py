"""`ersim-report FOLDER`: compare, draw and log a sweep again, from the files that its jobs left.

Every sweep ends with the same function, whether its jobs succeeded or not. The command does it for
a sweep that was interrupted, ran elsewhere, or was run by another Hydra sweeper.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ersim.errors import ErsimError
from ersim.util.files import to_json, write_json
from experiments.comparison import compare, judge, read_jobs, read_manifest, show, write_comparison
from experiments.pairs import write_differences
from experiments.paths import MLFLOW
from experiments.progress import doing

LAST = "last_sweep.json"


def finish(folder: Path, elapsed_s: float | None = None) -> dict[str, Any]:
    """Write comparison.csv, differences.csv, figures; log to MLflow; print table, hints and one line of JSON.

    Returns what the JSON line holds. Raises DataError if `folder` is not a sweep.
    """
    manifest = read_manifest(folder)
    jobs = read_jobs(folder, manifest)
    judged = judge(jobs)
    frame = compare(jobs, judged)
    write_comparison(folder, frame)
    write_differences(folder, judged)
    count = {status: int((frame["status"] == status).sum()) for status in ("finished", "failed", "missing")}
    print(show(frame))
    for job in jobs:
        if job["status"] == "failed":
            print(f"FAILED {job['line']} users={job['users']}: {job['error']['error']}")
    sys.stdout.flush()
    began_s = time.perf_counter()
    with doing("drawing the figures"):
        from experiments.figures import write_figures

        figures = write_figures(frame, folder / "figures", _title(manifest, frame))
    figures_s, began_s = time.perf_counter() - began_s, time.perf_counter()
    print(f"\ncomparison and figures: {folder}", flush=True)
    with doing("logging to MLflow"):
        logged = _log(folder, manifest, jobs, frame, figures)
    if logged is not None:
        print("MLflow: `make ui` opens the comparison of this sweep in the browser")
    record = {
        "command": "sweep",
        "name": manifest["name"],
        "folder": str(folder),
        "jobs": len(jobs),
        **count,
        "elapsed_s": elapsed_s,
        "figures_s": figures_s,
        "mlflow_s": time.perf_counter() - began_s,
        "mlflow": logged,
        "results": _records(frame),
    }
    print(to_json(record, indent=None))
    return record


def _title(manifest: dict[str, Any], frame: Any) -> str:
    """One line under each figure's title: the sweep, the GPUs, how sure it is."""
    parts = [str(manifest["name"])]
    if "gpus" in frame and frame["gpus"].nunique() == 1:
        parts.append(f"{frame['gpus'].dropna().iloc[0]:.0f} GPUs per fleet")
    if "calibrated" in frame and not frame["calibrated"].dropna().astype(bool).all():
        parts.append("some experts uncalibrated")
    return ", ".join(parts)


def _log(
    folder: Path, manifest: dict[str, Any], jobs: list[dict[str, Any]], frame: Any, figures: list[Path]
) -> dict[str, str] | None:
    """Log to MLflow unless switched off; a store that cannot be reached costs a warning, not the sweep."""
    if not manifest["tracking"]["enabled"]:
        return None
    from experiments.tracking import log_sweep

    try:
        logged = log_sweep(folder, manifest, jobs, frame, figures)
    except ErsimError as error:
        print(f"not logged: {error}; later: ersim-report {folder}", file=sys.stderr)
        return None
    where = {"sweep_id": manifest["sweep_id"], "uri": manifest["tracking"]["uri"], **logged}
    write_json(MLFLOW / LAST, where)
    return logged


def _records(frame: Any) -> list[dict[str, Any]]:
    """The main figures of every job, for scripts."""
    from experiments.comparison import SHOWN

    columns = ["line", "users", "seed", "status", *(column for column, *_ in SHOWN if column in frame)]
    records: list[dict[str, Any]] = frame[columns].to_dict("records")
    return records


def main() -> None:
    """Parse the command line, finish each folder named."""
    parser = argparse.ArgumentParser(prog="ersim-report", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="a sweep's folder (it holds sweep.json)")
    arguments = parser.parse_args()
    try:
        for folder in arguments.folder:
            finish(folder.resolve())
    except ErsimError as error:
        print(f"ersim-report: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
