"""What a sweep found, side by side: comparison.csv and the table in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from ersim.errors import DataError
from ersim.util.files import write_atomically
from experiments.job import ERROR, SUMMARY
from experiments.pairs import DIFFERENCES, against_best, differences, vs_best

MANIFEST = "sweep.json"
COMPARISON = "comparison.csv"

# Column, heading, format, whether more is better: the figures that the terminal shows.
SHOWN: tuple[tuple[str, str, str, bool], ...] = (
    ("output_throughput", "output tokens/s", ",.0f", True),
    ("median_ttft_ms", "median TTFT, ms", ",.0f", False),
    ("p99_ttft_ms", "p99 TTFT, ms", ",.0f", False),
    ("median_tpot_ms", "median TPOT, ms", ",.1f", False),
    ("median_e2el_ms", "median E2E, ms", ",.0f", False),
    ("usd_per_mtok_output", "US$ per million output tokens", ",.2f", False),
    ("mean_score", "answer quality (share correct)", ".3f", True),
    ("usd_per_correct_answer", "US$ per correct answer", ".5f", False),
)

# Shown as well where a sweep compares routers.
SHOWN_OF_ROUTERS: tuple[tuple[str, str, str, bool], ...] = (
    ("misroute_rate_by_domain", "share sent to another domain's expert", ".3f", False),
    ("strong_call_share", "share sent to the largest model", ".3f", False),
    ("load_imbalance", "busiest expert over an even share", ".2f", False),
    ("quality_given_up", "score given up by spilling", ".4f", False),
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The sweep's sweep.json. Raises DataError if `folder` is not a sweep."""
    path = folder / MANIFEST
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a sweep's manifest ({error}); name a sweep's folder"
        ) from error
    if "jobs" not in loaded:
        raise DataError(f"{path} has no jobs: not a sweep's manifest")
    return loaded


def read_jobs(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Every job with its `status` (finished, failed, missing), `summary` and `error`, None where absent."""
    jobs = []
    for entry in manifest["jobs"]:
        home = folder / entry["folder"]
        summary, error = _read_json(home / SUMMARY), _read_json(home / ERROR)
        status = "failed" if error else "finished" if summary else "missing"
        jobs.append({**entry, "home": home, "status": status, "summary": summary, "error": error})
    return jobs


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); delete the folder and run the job again") from error
    return loaded


def numbers(summary: dict[str, Any]) -> dict[str, float]:
    """The summary's scalar figures, flags as 0 and 1."""
    return {key: float(value) for key, value in summary.items() if isinstance(value, (int, float))}


def more_is_better() -> dict[str, bool]:
    """The figures that lines are compared by, and which way."""
    return {column: more for column, _, _, more in (*SHOWN, *SHOWN_OF_ROUTERS)}


def judge(jobs: list[dict[str, Any]]) -> pd.DataFrame:
    """The paired differences of all lines at each load, at the level of the jobs' intervals."""
    levels = {job["summary"].get("interval_level") for job in jobs if job["status"] == "finished"} - {None}
    return differences(jobs, more_is_better(), max(levels, default=0.90))


def compare(jobs: list[dict[str, Any]], judged: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per job, finished or not: what was varied, its status, all scalar figures.

    With `judged` (from `judge`) also each figure's difference to the best line at its load.
    """
    to_best = {} if judged is None else against_best(judged)
    rows = []
    for job in jobs:
        row = {
            key: job[key] for key in ("job", "line", "label", "fleet", "users", "seed", "status", "folder")
        }
        row.update({f"override:{key}": value for key, value in job["overrides"].items() if key not in row})
        if job["status"] == "finished":
            summary = job["summary"]
            row.update({key: summary[key] for key in ("router", "calibrated", "steady") if key in summary})
            row.update({key: value for key, value in numbers(summary).items() if key not in row})
            row.update(to_best.get((job["line"], job["users"]), {}))
        elif job["error"]:
            row["error"] = job["error"]["error"]
        rows.append(row)
    return pd.DataFrame(rows)


def write_comparison(folder: Path, frame: pd.DataFrame) -> Path:
    """Write comparison.csv into the sweep's folder, atomically."""
    path = folder / COMPARISON
    write_atomically(path, lambda temporary: frame.to_csv(temporary, index=False))
    return path


def show(frame: pd.DataFrame) -> str:
    """The comparison as text: one block per figure, lines down, users across, best marked.

    Seeds are averaged. `*` marks the best at that load and every line whose paired difference to it
    may be zero: they cannot be told apart.
    """
    done = frame[frame["status"] == "finished"]
    if done.empty:
        return "no job finished"
    blocks = []
    routers = done.get("override:router")
    extra = SHOWN_OF_ROUTERS if routers is not None and routers.nunique() > 1 else ()
    for column, heading, form, _ in (*SHOWN, *extra):
        if column in done and done[column].notna().any():
            blocks.append(_block(done, column, heading, form))
    if (done["line"].nunique() > 1) and blocks:
        blocks.append(_legend(done))
    return "\n\n".join(blocks)


def _block(done: pd.DataFrame, column: str, heading: str, form: str) -> str:
    lines = list(dict.fromkeys(done["line"]))
    users = sorted(done["users"].unique())
    values = done.pivot_table(index="line", columns="users", values=column)
    marks = alike(done, column) if len(lines) > 1 else set()
    rows = [[heading, *(f"{count} users" if i == 0 else str(count) for i, count in enumerate(users))]]
    for line in lines:
        cells = [_cell(values, line, count, form, (line, count) in marks) for count in users]
        rows.append([line, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = []
    for row in rows:
        first, *rest = (
            cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)
        )
        text.append("  ".join([first, *rest]).rstrip())
    return "\n".join(text)


def _cell(values: pd.DataFrame, line: str, users: int, form: str, best: bool) -> str:
    if line not in values.index or users not in values.columns or pd.isna(values.loc[line, users]):
        return "- "
    return f"{values.loc[line, users]:{form}}{'*' if best else ' '}"


def _legend(done: pd.DataFrame) -> str:
    """What the star means, and how it was judged."""
    if not any(name.endswith("_vs_best") for name in done):
        return "* best at this load; single replications: whether others can be told apart is not known"
    levels = done["interval_level"].dropna() if "interval_level" in done else pd.Series([0.9])
    return (
        f"* best at this load, or not to be told apart from it: the {100 * float(levels.max()):g} % interval "
        "of the difference,\n  paired by replication (same users, lengths and calibration draws), holds "
        f"zero; all pairs: {DIFFERENCES}"
    )


def alike(done: pd.DataFrame, column: str) -> set[tuple[str, int]]:
    """(line, users) of the best line at each load and of those that cannot be told apart from it.

    Judged by the paired differences; where there are none (single replications) only the best counts.
    """
    more = more_is_better().get(column, False)
    _, low, high = vs_best(column)
    marks: set[tuple[str, int]] = set()
    for users, group in done.groupby("users"):
        means = group.groupby("line")[column].mean().dropna()
        if means.empty:
            continue
        load = int(str(users))
        marks.add((str(means.idxmax() if more else means.idxmin()), load))
        if low in group:
            zero = group[(group[low] <= 0.0) & (group[high] >= 0.0)]
            marks.update((str(line), load) for line in zero["line"])
    return marks
