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
from ersim.steptime import ExpertModel, build_expert_model
from ersim.steptime.expert import FRONTEND_REL_STD, estimate
from experiments.observe_runs import expert_model, fold, with_overheads
from experiments.overheads import Observation, load_observations, load_overheads
from experiments.published_runs import Case, read_runs
from experiments.simulate_published import figures, simulate_case

DEFAULT_RUNS = Path("../shared/data/vllm-runs")
LEVEL = 0.90
MIDDLES = 4  # simulations with the mean coefficients, each with a workload and step noise of its own
ALIKE = 0.002  # TPOTs of equal settings that are as close as this are taken for the same run
WIDEST = 0.25  # no interval may be wider than this share of its middle, to either side
# Published errors of other simulators on the same run and figure, percent (median or mean absolute).
PEERS: Mapping[tuple[str, str], str] = {
    ("rtx4090_llama3.1-8b_tp1", "mean_ttft_ms"): "LLMServingSim 0.6 (KV blocks fitted; else 20.7)",
    ("rtx4090_llama3.1-8b_tp1", "mean_tpot_ms"): "LLMServingSim 0.2 (fitted; else 12.9)",
    ("rtx4090_llama3.1-8b_tp1", "mean_e2el_ms"): "LLMServingSim 0.5 (fitted; else 12.5)",
    ("rtxpro6000_llama3.1-8b_tp1", "mean_ttft_ms"): "LLMServingSim 4.0",
    ("rtxpro6000_llama3.1-8b_tp1", "mean_tpot_ms"): "LLMServingSim 1.0",
    ("rtxpro6000_llama3.1-8b_tp1", "mean_e2el_ms"): "LLMServingSim 1.8",
    ("h200_llama3.1-70b_fp8", "mean_tpot_ms"): "AIConfigurator 4.7, DynoSim 4.4 (means of all rows)",
    ("h200_llama3.1-70b_fp8", "mean_ttft_ms"): "AIConfigurator 37.6, DynoSim 22.5 (means of all rows)",
    ("h100_llama3.1-8b_prefix_cached", "mean_e2el_ms"): "BLIS 6.7 (mean of its rows)",
    ("h100_llama3.1-8b_prefix_cached", "mean_ttft_ms"): "BLIS 6 (mean of its rows)",
}

# Published runs that we looked at while choosing how the model works: what that decided.
SEEN: Mapping[str, str] = {
    "h200_llama3.1-70b_fp8": (
        "that its KV cache was fp8 is not recorded; it was concluded from the checkpoint's KV scales and "
        "from 64 users of 8,192 tokens having fitted one GPU in these rows"
    ),
    "rtx4090_llama3.1-8b_tp1": (
        "none of its rows was fitted, but with it in view were chosen: the rows behind the mixed-batch fit, "
        "that asynchronous scheduling hides the host's time per sequence, counting from the end of the step "
        "in which a request is queued, from profiles and an RTX PRO 6000 run how uneven contexts cost, and "
        "the noise of runs, which says how far an earlier run on such a card corrects this one's calibration "
        "(1.5 %; with 2 % TPOT would be 1.1 % off, without that run 4.9 %)"
    ),
    "rtxpro6000_llama3.1-8b_tp1": (
        "with it in view were chosen: profiled kernel times as they are, and how uneven contexts cost"
    ),
    "rtx4090_llama3.1-8b_tp1_earlier": (
        "its KV blocks are not recorded; 2,945 fit its mean TTFT, TPOT, E2E and end at once"
    ),
}


@dataclass(frozen=True)
class Comparison:
    """One measured figure and its prediction with a 90 % interval, all in the figure's own unit.

    uncut: (low, high) of the interval before it was cut to WIDEST, None where it is not wider.
    variant: what a second prediction of the same figures does otherwise; "" for the one that is judged.
    """

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
    uncut: tuple[float, float] | None = None
    variant: str = ""

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool:
        """Whether the measurement lies in the interval."""
        return self.low <= self.measured <= self.high

    @property
    def lost_by_cut(self) -> bool:
        """Whether the measurement lies in the interval only before the cut."""
        return self.uncut is not None and not self.inside and self.uncut[0] <= self.measured <= self.uncut[1]

    @property
    def half_width(self) -> float:
        """The interval's larger half as a share of the prediction."""
        return max(self.high - self.predicted, self.predicted - self.low) / self.predicted


@dataclass(frozen=True)
class Options:
    """How to predict: draws behind each interval, and what is left out beside the rows judged.

    whole_runs: of a series, all its rows. other_gpus: also every calibration of the run's own GPU.
    """

    replications: int = 16
    whole_runs: bool = False
    other_gpus: bool = False


def judged_expert(case: Case, options: Options = Options()) -> ExpertModel:
    """The expert with coefficients that never saw the rows it is judged on."""
    own = own_rows(case, options)
    overheads = load_overheads(leave_out=lambda row: (row.run, row.group) in own)
    expert = expert_model(case.expert, overheads)
    if not options.other_gpus or expert.gpu is None:
        return expert
    gpu, known = expert.gpu, expert.calibration
    carried = estimate(expert.model, gpu, known.precision, known.tp, leave_out=(gpu.name,))
    return dataclasses.replace(expert, calibration=with_overheads(carried, overheads))


def own_rows(case: Case, options: Options = Options()) -> set[tuple[str, str]]:
    """Run and group of the observations that a judged case must not have taught its coefficients."""
    whole = options.whole_runs or options.other_gpus
    observed = load_observations()
    own = {(row.run, row.group) for row in observed if _is_of(row, case, whole_run=whole)}
    if whole:  # all rows of a series that the case is a part of, whatever its folder is called
        runs = {run for run, _ in own}
        own |= {(row.run, row.group) for row in observed if row.run in runs}
    return own


def teachers(case: Case, options: Options) -> str:
    """The published runs that the case's coefficients were fitted on, in words."""
    own, found = own_rows(case, options), dict.fromkeys(row.run for row in load_observations())
    groups = {run: {row.group for row in load_observations() if row.run == run} for run in found}
    left = {run: sorted(group for group in groups[run] if (run, group) not in own) for run in found}
    whole = [run for run in left if len(left[run]) == len(groups[run])]
    parts = [f"{run} ({', '.join(left[run])})" for run in left if 0 < len(left[run]) < len(groups[run])]
    return ", ".join([*whole, *parts])


def _is_of(row: Observation, case: Case, whole_run: bool) -> bool:
    """Whether an observation comes from the case's own rows, under this folder's name or another.

    Another folder's rows are its own when GPU, model, precision and TP are and a TPOT agrees within ALIKE
    (or to the digits published): a copy may be rounded.
    """
    if row.run == case.run:
        return whole_run or row.group == fold(case)
    expert = case.expert
    if not row.calibration.startswith(f"{expert.gpu}/{expert.model}_{expert.precision}_tp{expert.tp}_"):
        return False
    measured = [figures.get("mean_tpot_ms") for figures in case.measured.values()]
    close_ms = max(ALIKE * row.tpot_ms, row.known_within_ms, case.known_within_ms)
    return any(value is not None and abs(value - row.tpot_ms) <= close_ms for value in measured)


def with_predicted_blocks(case: Case) -> Case | None:
    """The case without its recorded number of KV blocks; None where none was recorded."""
    engine = case.expert.engine
    if engine.kv_blocks is None:
        return None
    free = dataclasses.replace(case.expert, engine=dataclasses.replace(engine, kv_blocks=None))
    blocks = build_expert_model(free, case.run).engine.kv_blocks
    return dataclasses.replace(
        case,
        expert=free,
        variant=f"with the predicted {blocks:,} KV blocks, not the recorded {engine.kv_blocks:,}",
    )


def published_name(case: Case) -> str:
    """The run's name among the observations, also where its folder has another one; else its folder's."""
    known = (row.run for row in load_observations() if _is_of(row, case, whole_run=True))
    return next(known, case.run)


def predict(case: Case, options: Options = Options()) -> list[Comparison]:
    """Simulate one case and compare every measured figure.

    The prediction is that of the mean coefficients, its interval the spread of simulations with drawn
    ones. Draws come in pairs reflected at the mean.
    """
    expert = judged_expert(case, options)
    frontend = expert.calibration.frontend
    middles: dict[str, list[dict[str, float]]] = {group: [] for group in case.measured}
    beyond: set[str] = set()
    for number in range(MIDDLES):
        mean = expert.step_time(None)
        requests = simulate_case(case, expert, mean, frontend, seed=number)
        beyond |= set(getattr(mean, "beyond", {}))
        for group, found in middles.items():
            found.append(figures(requests, case, group))
    draws: dict[str, list[dict[str, float]]] = {group: [] for group in case.measured}
    for number in range(options.replications):
        rng, mirrored = np.random.default_rng([number // 2, 5]), number % 2 == 1
        step_time = expert.step_time(rng, mirrored)
        doubt = float(np.exp(rng.normal(0.0, FRONTEND_REL_STD) * (-1 if mirrored else 1)))
        drawn = {name: value * doubt for name, value in frontend.items()}
        requests = simulate_case(case, expert, step_time, drawn, seed=number)
        for group, found in draws.items():
            found.append(figures(requests, case, group))
    name = expert.calibration.name
    label = name if expert.calibration.calibrated else f"uncalibrated: {name}"
    if beyond:
        label += f" (steps beyond its range: {', '.join(sorted(beyond))})"
    known = published_name(case)
    return [
        _compare(
            case,
            (group, metric, "" if case.variant else PEERS.get((known, metric), "")),
            value,
            [one[metric] for one in middles[group]],
            [one[metric] for one in draws[group]],
            label,
        )
        for group, measured in case.measured.items()
        for metric, value in measured.items()
        if metric in middles[group][0]  # there is no TPOT of single tokens
    ]


def _compare(
    case: Case,
    figure: tuple[str, str, str],
    measured: float,
    middles: Sequence[float],
    draws: Sequence[float],
    label: str,
) -> Comparison:
    """Prediction and interval of a figure (group, metric, peers' error), on a log scale: times multiply.

    The draws' spread holds the coefficients' doubt and one workload's randomness; the middle errs by that
    of its own few workloads alone. Draws come in reflected pairs, whose mean is the middle by construction
    and of which only half are degrees of freedom.
    """
    group, metric, peers = figure
    middle, spread = float(np.log(middles).mean()), float(np.log(draws).std())
    quantile = float(student.ppf(0.5 + LEVEL / 2, max(1, len(draws) // 2)))
    reach = quantile * float(np.sqrt(spread**2 + np.log(middles).var(ddof=1) / len(middles)))
    widest = float(np.log1p(WIDEST))
    low, high = _ends(middle, min(reach, widest))
    return Comparison(
        case.run,
        case.row,
        group,
        metric,
        measured,
        float(np.exp(middle)),
        low,
        high,
        label,
        peers,
        _ends(middle, reach) if reach > widest else None,
        case.variant,
    )


def _ends(middle: float, reach: float) -> tuple[float, float]:
    return float(np.exp(middle - reach)), float(np.exp(middle + reach))


def show(rows: Sequence[Comparison]) -> None:
    """The table, one line per run and figure."""
    print(
        f"{'run':32} {'row':26} {'figure':14} {'measured':>10} {'predicted':>10} {'error':>8}  90 % interval"
    )
    for row in rows:
        name = f"{row.row} {row.group}".strip()
        mark = ("in" if row.inside else "OUT") + (" cut" if row.uncut else "")
        print(
            f"{row.run:32} {name:26} {row.metric:14} {row.measured:10.2f} {row.predicted:10.2f} "
            f"{100 * row.error:+7.1f} %  {row.low:.2f} to {row.high:.2f} {mark:7} {row.peers}"
        )


def summarise(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Mean absolute error, bias and coverage by run and metric, with the peers' error beside it."""
    keys = list(dict.fromkeys((row.run, row.variant, row.metric) for row in rows))
    found = []
    for run, variant, metric in keys:
        part = [row for row in rows if (row.run, row.variant, row.metric) == (run, variant, metric)]
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
                "cut": sum(row.uncut is not None for row in part),
                "lost_by_cut": sum(row.lost_by_cut for row in part),
                "variant": variant,
                "peers_percent": part[0].peers,
            }
        )
    return found


def show_summary(groups: Iterable[Mapping[str, Any]]) -> None:
    """One line per run and metric."""
    head = ("run", "figure", "rows", "error", "bias", "inside", "widest", "cut", "peers' error (%)")
    print("\n{:32} {:14} {:>4} {:>8} {:>8} {:>7} {:>7} {:>4}  {}".format(*head))
    variant = ""
    for group in groups:
        if group["variant"] != variant:
            variant = group["variant"]
            print(f"the same {variant} (an extra, not among the figures judged):")
        print(
            f"{group['run']:32} {group['metric']:14} {group['rows']:4d} {group['mape_percent']:6.2f} % "
            f"{group['bias_percent']:+6.1f} % {group['inside_percent']:5.0f} % "
            f"±{group['widest_percent']:4.0f} % {group['cut']:4d}  {group['peers_percent']}"
        )


def report(
    rows: Sequence[Comparison],
    skipped: Sequence[str],
    notes: Iterable[str],
    options: Options = Options(),
) -> dict[str, Any]:
    """Print everything; returns the last line's figures."""
    judged = [row for row in rows if not row.variant]
    show(rows)
    groups = summarise([*judged, *(row for row in rows if row.variant)])
    show_summary(groups)
    print(f"\ncoefficients: {_left_out(options)}")
    for run in dict.fromkeys(row.run for row in rows):
        used = dict.fromkeys(row.calibration for row in rows if row.run == run)
        print(f"step times of {run}: {', '.join(used)}")
    for note in notes:
        print(f"note: {note}")
    for line in skipped:
        print(f"skipped: {line}")
    inside = float(np.mean([row.inside for row in judged])) if judged else 0.0
    cut = [row for row in judged if row.uncut is not None]
    lost = sum(row.lost_by_cut for row in cut)
    print(
        f"{len(cut)} of {len(judged)} intervals were wider than ±{100 * WIDEST:g} % and are cut there; "
        f"{lost} measured values lie outside only because of the cut"
    )
    print(f"{100 * inside:.0f} % of {len(judged)} figures lie inside their 90 % interval")
    records = [{**dataclasses.asdict(row), "error": row.error, "inside": row.inside} for row in rows]
    shares = {"inside_share": inside, "figures": len(judged), "cut": len(cut), "lost_by_cut": lost}
    return {**shares, "runs": groups, "skipped": list(skipped), "records": records}


def _left_out(options: Options) -> str:
    """What the coefficients of a judged run never saw, in words."""
    if options.other_gpus:
        return "fitted on the other published runs, with no calibration of the judged run's own GPU"
    if options.whole_runs:
        return "fitted on the other published runs, of a series none of its rows"
    return "fitted on the other published runs; of a series, on the rows of other TP degrees"


def _predict_or_say(case: Case, options: Options) -> tuple[list[Comparison], str | None]:
    """A case's comparisons, or why it could not be simulated."""
    try:
        return predict(case, options), None
    except ErsimError as error:
        return [], f"{case.run} {case.row}: {error}"
    except Exception as error:  # a fault of ours in one run must not cost the others
        return [], f"{case.run} {case.row}: {type(error).__name__}: {error}"


def predict_all(cases: Sequence[Case], options: Options) -> tuple[list[Comparison], list[str]]:
    """All cases on all cores, in order, with progress on standard error."""
    rows: list[Comparison] = []
    skipped: list[str] = []
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = pool.map(_predict_or_say, cases, [options] * len(cases))
        for number, (found, why) in enumerate(results, 1):
            print(f"\r{number}/{len(cases)} cases simulated", end="", file=sys.stderr, flush=True)
            rows.extend(found)
            if why is not None:
                skipped.append(why)
    print(file=sys.stderr)
    return rows, skipped


def notes_of(cases: Sequence[Case], options: Options = Options()) -> list[str]:
    """What to know about the runs: which were not judged blindly, what was assumed, what taught them."""
    seen = [
        f"{case.run} is NOT BLIND: {SEEN[name]}" for case in cases if (name := published_name(case)) in SEEN
    ]
    said = [f"{case.run}: {note}" for case in cases for note in case.notes]
    taught = [f"{case.run}: coefficients fitted on {teachers(case, options)}" for case in cases]
    return list(dict.fromkeys([*seen, *said, *taught]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=DEFAULT_RUNS, help="folder of runs, or one run's folder")
    parser.add_argument(
        "--replications", type=int, default=16, help="draws behind each interval (an even number)"
    )
    parser.add_argument(
        "--other-gpus",
        action="store_true",
        help="use no calibration of the run's own GPU: how well step times carry over",
    )
    parser.add_argument(
        "--whole-runs",
        action="store_true",
        help="leave all rows of a judged series out, not only those of its TP",
    )
    given = parser.parse_args()
    if given.replications < 2 or given.replications % 2:
        parser.error(f"--replications must be an even number of at least 2, got {given.replications}")
    options = Options(given.replications, given.whole_runs, given.other_gpus)
    unread: list[str] = []
    try:
        cases = read_runs(given.runs, unread)
    except (ErsimError, OSError) as error:
        print(f"validate-published: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    extras = [extra for case in cases if (extra := with_predicted_blocks(case)) is not None]
    rows, skipped = predict_all([*cases, *extras], options)
    print(json.dumps(report(rows, [*unread, *skipped], notes_of(cases, options), options)))
    if not rows:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
