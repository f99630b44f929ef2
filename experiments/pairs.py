"""Which fleets of a sweep can be told apart: differences paired by replication, not intervals that overlap.

Replication r of every job with one seed and load sees the same users, prompts and lengths, and draws
the same doubts of what its calibrations have in common. What replications differ in therefore cancels
in the difference of two fleets; `ersim.results.difference` says how its interval is made.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ersim.errors import DataError
from ersim.results import Difference, difference
from ersim.util.files import write_atomically

REPLICATIONS, DIFFERENCES = "replications.json", "differences.csv"
ALL_PAIRS = 12  # of so many lines every pair is judged; of more, each against the best
COLUMNS = ("users", "figure", "line", "other", "relative", "low", "high", "pairs", "told_apart", "from_best")
Runs = Mapping[int, Sequence[Mapping[str, Any]]]
"""The replications' figures of one line at one load, by seed."""


def read_runs(jobs: Iterable[Mapping[str, Any]], figures: Sequence[str]) -> dict[tuple[str, int], Runs]:
    """The replications of every finished job that left some, by line and users."""
    found: dict[tuple[str, int], dict[int, list[dict[str, Any]]]] = {}
    for job in jobs:
        path = Path(job["home"]) / REPLICATIONS
        if job["status"] != "finished" or not path.is_file():
            continue
        try:
            replications = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); run the job again") from error
        kept = [{name: one.get(name) for name in figures} for one in replications]
        found.setdefault((job["line"], job["users"]), {})[job["seed"]] = kept
    return dict(found)


def apart(a: Runs, b: Runs, figure: str, level: float) -> Difference | None:
    """The paired difference of two lines at one load, over the seeds and replications that both have."""
    rows: list[Mapping[str, Any]] = []
    others: list[Mapping[str, Any]] = []
    for seed in sorted(set(a) & set(b)):
        for one, other in zip(a[seed], b[seed], strict=False):
            rows.append(one)
            others.append(other)
    return difference(rows, others, figure, level)


def best_line(runs: Mapping[str, Runs], figure: str, more: bool) -> str | None:
    """The line with the best mean over all its replications; None when no line has the figure."""
    means = {}
    for line, by_seed in runs.items():
        values = [one[figure] for one in itertools.chain(*by_seed.values()) if one.get(figure) is not None]
        if values:
            means[line] = sum(values) / len(values)
    if not means:
        return None
    return max(means, key=lambda line: means[line] if more else -means[line])


def differences(
    jobs: Sequence[Mapping[str, Any]], figures: Mapping[str, bool], level: float = 0.90
) -> pd.DataFrame:
    """One row per load, figure and pair of lines: the difference as a share of `other`, and the verdict.

    figures: whether more is better, by name. Every line is judged against the best one at its load
    (`from_best`); of at most ALL_PAIRS lines all other pairs are there too.
    """
    runs = read_runs(jobs, list(figures))
    rows = []
    for users in sorted({users for _, users in runs}):
        here = {line: by_seed for (line, at), by_seed in runs.items() if at == users}
        for figure, more in figures.items():
            best = best_line(here, figure, more)
            for line, other in _pairs(list(here), best):
                found = apart(here[line], here[other], figure, level)
                if found is not None:
                    told = (found.relative, found.low, found.high, found.pairs, found.distinguishable)
                    rows.append((users, figure, line, other, *told, other == best))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _pairs(lines: Sequence[str], best: str | None) -> Iterator[tuple[str, str]]:
    """(line, other) to judge: each against the best first, then the other pairs unless they are too many."""
    if best is None:
        return
    rest = [line for line in lines if line != best]
    yield from ((line, best) for line in rest)
    if len(lines) <= ALL_PAIRS:
        yield from itertools.combinations(rest, 2)


def against_best(found: pd.DataFrame) -> dict[tuple[str, int], dict[str, float]]:
    """Per line and load: `<figure>_vs_best` with `_low` and `_high`, the relative difference to the best.

    The best line itself has zeros. Lines that could not be paired with the best are missing.
    """
    columns: dict[tuple[str, int], dict[str, float]] = {}
    for row in found[found["from_best"]].to_dict("records"):
        for line, shares in (
            (row["other"], (0.0, 0.0, 0.0)),
            (row["line"], (row["relative"], row["low"], row["high"])),
        ):
            cell = columns.setdefault((line, row["users"]), {})
            cell |= dict(zip(vs_best(row["figure"]), shares, strict=True))
    return columns


def vs_best(figure: str) -> tuple[str, str, str]:
    """The columns of comparison.csv that hold a figure's difference to the best line and its interval."""
    return f"{figure}_vs_best", f"{figure}_vs_best_low", f"{figure}_vs_best_high"


def write_differences(folder: Path, found: pd.DataFrame) -> Path:
    """Write differences.csv into the sweep's folder, atomically."""
    path = folder / DIFFERENCES
    write_atomically(path, lambda temporary: found.to_csv(temporary, index=False))
    return path
