"""`make validate-published`: simulate published real runs and lay prediction beside measurement.

Coefficients come from operator tables and layer profiles, corrected by published runs other than the
one judged (of a series: other than the rows of the same TP). Intervals (90 %) hold the coefficients'
covariance, step noise, the frontend's doubt and the workload's randomness.
"""

from __future__ import annotations

# ruff: noqa: E402 (threads are limited before anything imports numpy)
import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from ersim.errors import ErsimError
from ersim.steptime import ExpertModel
from ersim.steptime.expert import FRONTEND_REL_STD, estimate
from experiments.observe_runs import expert_model, fold, with_overheads
from experiments.overheads import Observation, load_observations, load_overheads
from experiments.published_runs import Case, read_runs
from experiments.simulate_published import figures, simulate_case

DEFAULT_RUNS = Path("../shared/data/vllm-runs")
LEVEL = 0.90
WIDEST = 0.25  # no interval may be wider than this share of its middle, to either side
# Published errors of other simulators on the same run and figure, percent (median or mean absolute).
PEERS: Mapping[tuple[str, str], str] = {
    ("rtx4090_llama3.1-8b_tp1", "mean_ttft_ms"): "LLMServingSim 0.6 (KV blocks fitted; else 20.7)",
    ("rtx4090_llama3.1-8b_tp1", "mean_tpot_ms"): "LLMServingSim 0.2 (fitted; else 12.9)",
    ("rtx4090_llama3.1-8b_tp1", "mean_e2el_ms"): "LLMServingSim 0.5 (fitted; else 12.5)",
    ("h200_llama3.1-70b_fp8", "mean_tpot_ms"): "AIConfigurator 4.7, DynoSim 4.4",
    ("h200_llama3.1-70b_fp8", "mean_ttft_ms"): "AIConfigurator 37.6, DynoSim 22.5",
    ("h100_llama3.1-8b_prefix_cached", "mean_e2el_ms"): "BLIS 6.7",
    ("h100_llama3.1-8b_prefix_cached", "mean_ttft_ms"): "BLIS 6",
}


@dataclass(frozen=True)
class Comparison:
    """One measured figure and its prediction with a 90 % interval, all in the figure's own unit."""

    run: str
    row: str
    group: str
    metric: str
    measured: float
    predicted: float
    low: float
    high: float
    calibration: str
    peers: str

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool:
        """Whether the measurement lies in the interval."""
        return self.low <= self.measured <= self.high

    @property
    def half_width(self) -> float:
        """The interval's larger half as a share of the prediction."""
        return max(self.high - self.predicted, self.predicted - self.low) / self.predicted


def judged_expert(case: Case, other_gpus: bool = False) -> ExpertModel:
    """The expert with coefficients that never saw the rows it is judged on.

    other_gpus: also without every calibration of the case's own GPU, and without all of its run.
    """
    own = {(row.run, row.group) for row in load_observations() if _is_of(row, case, whole_run=other_gpus)}
    overheads = load_overheads(leave_out=lambda row: (row.run, row.group) in own)
    expert = expert_model(case.expert, overheads)
    if not other_gpus or expert.gpu is None:
        return expert
    gpu, known = expert.gpu, expert.calibration
    carried = estimate(expert.model, gpu, known.precision, known.tp, leave_out=(gpu.name,))
    return dataclasses.replace(expert, calibration=with_overheads(carried, overheads))


def _is_of(row: Observation, case: Case, whole_run: bool) -> bool:
    """Whether an observation comes from the case's own rows, under this folder's name or another."""
    if row.run == case.run:
        return whole_run or row.group == fold(case)
    measured = [figures.get("mean_tpot_ms") for figures in case.measured.values()]
    return any(value is not None and abs(value / row.tpot_ms - 1) < 1e-5 for value in measured)


def predict(case: Case, replications: int, other_gpus: bool = False) -> list[Comparison]:
    """Simulate one case with drawn coefficients and compare every measured figure.

    Draws come in pairs reflected at the mean, so that few of them do not shift the middle.
    """
    expert = judged_expert(case, other_gpus)
    frontend = expert.calibration.frontend
    groups: dict[str, list[dict[str, float]]] = {group: [] for group in case.measured}
    for number in range(replications):
        rng, mirrored = np.random.default_rng([number // 2, 5]), number % 2 == 1
        step_time = expert.step_time(rng, mirrored)
        doubt = float(np.exp(rng.normal(0.0, FRONTEND_REL_STD) * (-1 if mirrored else 1)))
        drawn = {name: value * doubt for name, value in frontend.items()}
        requests = simulate_case(case, expert, step_time, drawn, seed=number)
        for group, found in groups.items():
            found.append(figures(requests, case, group))
    name = expert.calibration.name
    label = name if expert.calibration.calibrated else f"uncalibrated: {name}"
    return [
        _compare(case, group, metric, value, [draw[metric] for draw in groups[group]], label)
        for group, measured in case.measured.items()
        for metric, value in measured.items()
    ]


def _compare(
    case: Case, group: str, metric: str, measured: float, draws: Sequence[float], label: str
) -> Comparison:
    """Middle and interval of the draws, on a log scale (times are products of uncertain factors).

    Draws come in reflected pairs, so that only half of them are degrees of freedom.
    """
    logs = np.log(draws)
    middle, spread = float(logs.mean()), float(logs.std(ddof=1))
    reach = (
        float(student.ppf(0.5 + LEVEL / 2, max(1, len(draws) // 2)))
        * spread
        * float(np.sqrt(1 + 1 / len(draws)))
    )
    limit = float(np.log1p(WIDEST))
    reach = min(reach, limit)
    low, high = np.exp([middle - reach, middle + reach])
    peers = PEERS.get((case.run, metric), "")
    return Comparison(
        case.run,
        case.row,
        group,
        metric,
        measured,
        float(np.exp(middle)),
        float(low),
        float(high),
        label,
        peers,
    )


def show(rows: Sequence[Comparison]) -> None:
    """The table, one line per run and figure."""
    print(
        f"{'run':32} {'row':26} {'figure':14} {'measured':>10} {'predicted':>10} {'error':>8}  90 % interval"
    )
    for row in rows:
        name = f"{row.row} {row.group}".strip()
        mark = "in" if row.inside else "OUT"
        print(
            f"{row.run:32} {name:26} {row.metric:14} {row.measured:10.2f} {row.predicted:10.2f} "
            f"{100 * row.error:+7.1f} %  {row.low:.2f} to {row.high:.2f} {mark:3} {row.peers}"
        )


def summarise(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Mean absolute error, bias and coverage by run and metric, with the peers' error beside it."""
    keys = list(dict.fromkeys((row.run, row.metric) for row in rows))
    found = []
    for run, metric in keys:
        part = [row for row in rows if (row.run, row.metric) == (run, metric)]
        errors = np.asarray([row.error for row in part])
        found.append(
            {
                "run": run,
                "metric": metric,
                "rows": len(part),
                "mape_percent": round(100 * float(np.abs(errors).mean()), 2),
                "bias_percent": round(100 * float(errors.mean()), 2),
                "inside_percent": round(100 * float(np.mean([row.inside for row in part])), 1),
                "widest_percent": round(100 * max(row.half_width for row in part), 1),
                "peers_percent": part[0].peers,
            }
        )
    return found


def show_summary(groups: Iterable[Mapping[str, Any]]) -> None:
    """One line per run and metric."""
    head = ("run", "figure", "rows", "error", "bias", "inside", "widest", "peers' error (%)")
    print("\n{:32} {:14} {:>4} {:>8} {:>8} {:>7} {:>7}  {}".format(*head))
    for group in groups:
        print(
            f"{group['run']:32} {group['metric']:14} {group['rows']:4d} {group['mape_percent']:6.1f} % "
            f"{group['bias_percent']:+6.1f} % {group['inside_percent']:5.0f} % "
            f"±{group['widest_percent']:4.0f} %  {group['peers_percent']}"
        )


def report(rows: Sequence[Comparison], skipped: Sequence[str], notes: Iterable[str]) -> dict[str, Any]:
    """Print everything; returns the last line's figures."""
    show(rows)
    groups = summarise(rows)
    show_summary(groups)
    print("\ncoefficients: fitted on the other published runs; of a series, on the rows of other TP degrees")
    for run in dict.fromkeys(row.run for row in rows):
        used = dict.fromkeys(row.calibration for row in rows if row.run == run)
        print(f"step times of {run}: {', '.join(used)}")
    for note in notes:
        print(f"note: {note}")
    for line in skipped:
        print(f"skipped: {line}")
    inside = float(np.mean([row.inside for row in rows])) if rows else 0.0
    print(f"{100 * inside:.0f} % of {len(rows)} figures lie inside their 90 % interval")
    records = [{**dataclasses.asdict(row), "error": row.error, "inside": row.inside} for row in rows]
    return {"inside_share": inside, "runs": groups, "skipped": list(skipped), "records": records}


def _predict_or_say(case: Case, replications: int, other_gpus: bool) -> tuple[list[Comparison], str | None]:
    """A case's comparisons, or why it could not be simulated."""
    try:
        return predict(case, replications, other_gpus), None
    except ErsimError as error:
        return [], f"{case.run} {case.row}: {error}"
    except Exception as error:  # a fault of ours in one run must not cost the others
        return [], f"{case.run} {case.row}: {type(error).__name__}: {error}"


def predict_all(
    cases: Sequence[Case], replications: int, other_gpus: bool = False
) -> tuple[list[Comparison], list[str]]:
    """All cases on all cores, in order, with progress on standard error."""
    rows: list[Comparison] = []
    skipped: list[str] = []
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        count = len(cases)
        results = pool.map(_predict_or_say, cases, [replications] * count, [other_gpus] * count)
        for number, (found, why) in enumerate(results, 1):
            print(f"\r{number}/{len(cases)} cases simulated", end="", file=sys.stderr, flush=True)
            rows.extend(found)
            if why is not None:
                skipped.append(why)
    print(file=sys.stderr)
    return rows, skipped


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=DEFAULT_RUNS, help="folder of runs, or one run's folder")
    parser.add_argument(
        "--replications", type=int, default=8, help="draws behind each interval (an even number)"
    )
    parser.add_argument(
        "--other-gpus",
        action="store_true",
        help="use no calibration of the run's own GPU: how well step times carry over",
    )
    options = parser.parse_args()
    unread: list[str] = []
    try:
        cases = read_runs(options.runs, unread)
    except (ErsimError, OSError) as error:
        print(f"validate-published: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    rows, skipped = predict_all(cases, options.replications, options.other_gpus)
    notes = dict.fromkeys(f"{case.run}: {note}" for case in cases for note in case.notes)
    print(json.dumps(report(rows, [*unread, *skipped], notes)))
    if not rows:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
