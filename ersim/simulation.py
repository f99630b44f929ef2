"""The Python entry point: one configuration in, figures with intervals and every request out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ersim.config import SimulationConfig, validate
from ersim.engine import VLLM_VERSION
from ersim.errors import SimulationError
from ersim.figures import run_figures
from ersim.parallel import spread
from ersim.prepare import Preparations
from ersim.results import (
    Gaps,
    RequestTable,
    Window,
    combine,
    interval_method,
    mean_is_known,
    mean_known_within,
    steady_window,
)
from ersim.results.intervals import FEW_REPLICATIONS
from ersim.results.records import COMPLETED
from ersim.steptime import ExpertModel
from ersim.steptime.evaluate import PreparedStepTime, SharedStepTime
from ersim.system import RunOutput, System
from ersim.types import StepTime
from ersim.util.files import write_atomically, write_json
from ersim.workload import build_workload

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
MSER = "MSER-5 on E2E latencies in the order in which requests ended"
WHOLE_TRACE = "none: a trace is measured whole"


@dataclass(frozen=True)
class Result:
    """What a simulation found.

    summary: figures with `_low` and `_high`, blocks per expert and per domain; deterministic.
    table, requests: one row per request of the first replication, the latter as a data frame.
    replications: every replication's own summary. calibrations: identity of each expert's
    calibration. wall_s is the only figure that depends on the machine, and is therefore kept apart.
    """

    config: SimulationConfig
    summary: dict[str, Any]
    table: RequestTable
    gaps: Gaps
    window: Window
    replications: list[dict[str, Any]]
    calibrations: dict[str, dict[str, Any]]
    wall_s: float = field(compare=False)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """The table as a pandas data frame."""
        return self.table.frame()

    def write(self, folder: Path | str) -> None:
        """Write summary.json, replications.json, calibration.json and requests.parquet, each atomically."""
        target = Path(folder)
        write_atomically(target / "requests.parquet", self.table.write_parquet)
        write_json(target / "calibration.json", self.calibrations)
        write_json(target / "replications.json", self.replications)
        write_json(target / "summary.json", self.summary)


def simulate(config: SimulationConfig, preparations: Preparations | None = None, workers: int = 1) -> Result:
    """Simulate one configuration, with as many replications as its intervals need.

    Pass the same `preparations` to several calls to load prompts and fit policies once. `workers`
    processes share the replications; their number changes no figure.
    Raises ConfigError, DataError or DoesNotFitError for bad input, SimulationError for a run that
    ended without a single finished request.
    """
    started = time.perf_counter()
    validate(config)
    shared = preparations or Preparations()
    experts = [
        shared.expert(expert, f"fleet.experts.{name}") for name, expert in config.fleet.experts.items()
    ]
    prompts = shared.prompt_set(config.workload.prompts).prompts
    routing = shared.routing(config)
    first: list[tuple[RunOutput, Window]] = []

    def one(number: int) -> dict[str, Any]:
        output = replicate(config, shared, experts, number)
        window = measurement_window(output, config)
        if number == 0:
            first.append((output, window))
        return run_figures(config, experts, prompts, output, window, routing)

    summaries = _replications(config, one, workers)
    output, window = first[0]
    summary = _summary(config, experts, shared, summaries)
    return Result(
        config=config,
        summary=summary,
        table=output.table,
        gaps=output.gaps,
        window=window,
        replications=summaries,
        calibrations=_identities(config, experts),
        wall_s=time.perf_counter() - started,
    )


def replicate(
    config: SimulationConfig, shared: Preparations, experts: Sequence[ExpertModel], replication: int
) -> RunOutput:
    """Run one replication. Its seeds depend on the config's seed and its number only.

    Compared fleets therefore see the same users, prompts and lengths (common random numbers), and
    all experts draw their coefficients from one stream: an error of the method, shared by experts,
    stays shared.
    """
    seed = int(np.random.SeedSequence([config.seed, replication]).generate_state(1)[0])
    routing = shared.routing(config)
    prompts = shared.prompt_set(config.workload.prompts)
    workload = build_workload(config.workload, prompts, config.users, seed, routing.ask)
    sample = _samples(config)
    system = System(
        config,
        experts,
        _step_times(experts, seed, sample),
        prompts.prompts,
        workload,
        deepcopy(routing.policy),  # policies with a memory start every replication afresh
        None if config.faults else routing.known,  # who is down is not known beforehand
        seed,
        frontends=[expert.frontend(_draw(seed, 7, sample)) for expert in experts],
        scores=routing.scores,
    )
    output = system.run()
    if not output.counts.balanced:
        raise SimulationError(f"requests were lost: {output.counts}")
    if not (output.table["status"] == COMPLETED).any():
        raise SimulationError(_nothing_finished(output))
    return output


def _step_times(experts: Sequence[ExpertModel], seed: int, sample: bool) -> list[StepTime]:
    """Each expert's step time; equal experts draw equal coefficients and share their tables."""
    made: dict[int, PreparedStepTime] = {}
    times: list[StepTime] = []
    for expert in experts:
        known = made.get(id(expert))
        one = expert.step_time(_draw(seed, 5, sample)) if known is None else SharedStepTime(known)
        made.setdefault(id(expert), one)
        times.append(one)
    return times


def _samples(config: SimulationConfig) -> bool:
    """Whether coefficients are drawn: not for a single replication, which shows the mean."""
    return config.uncertainty.sample_calibration and str(config.uncertainty.replications) != "1"


def _draw(seed: int, stream: int, sample: bool) -> np.random.Generator | None:
    """The stream that every expert's coefficients are drawn from, the same one for all."""
    return np.random.default_rng([seed, stream]) if sample else None


def _nothing_finished(output: RunOutput) -> str:
    counts = output.counts
    errors = [error for error in output.table["error"].tolist() if error is not None]
    last = f"; last error: {errors[-1]}" if errors else ""
    return (
        f"no request finished: {counts.rejected} rejected, {counts.failed} failed, "
        f"{counts.on_replicas} on replicas{last}"
    )


def measurement_window(output: RunOutput, config: SimulationConfig) -> Window:
    """The steady part of a run; a trace is measured whole, since its load is what it is."""
    done = output.table[output.table["status"] == COMPLETED]
    if config.workload.arrivals == "trace":
        return Window(0.0, output.end_s, True)
    ended = done["last_token_s"]
    return steady_window(ended, ended - done["send_s"], 0.0)


def _replications(
    config: SimulationConfig, one: Callable[[int], dict[str, Any]], workers: int
) -> list[dict[str, Any]]:
    """The figures of as many replications as wanted; the first of them is done in this process.

    Those that are needed in any case are shared among the workers, and so are then `workers` at a
    time while the precision asked for is not reached; any beyond the one that reached it are dropped.
    """
    wanted = config.uncertainty
    if str(wanted.replications) != "auto":
        return list(spread(one, range(int(wanted.replications)), workers))
    summaries = list(spread(one, range(wanted.min_replications), workers))
    while not _enough(config, summaries):
        begin = len(summaries)
        end = min(begin + workers, wanted.max_replications)
        for figures in spread(one, range(begin, end), workers):
            summaries.append(figures)
            if _enough(config, summaries):
                break
    return summaries


def _enough(config: SimulationConfig, summaries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `replications: auto` may stop."""
    wanted = config.uncertainty
    return len(summaries) >= wanted.max_replications or _is_precise(config, summaries)


def _is_precise(config: SimulationConfig, summaries: Sequence[Mapping[str, Any]]) -> bool:
    return mean_is_known(summaries, config.uncertainty.precision, config.uncertainty.level)


def _identities(config: SimulationConfig, experts: Sequence[ExpertModel]) -> dict[str, dict[str, Any]]:
    """Which calibration timed which expert, and with which resolved engine settings."""
    identities = {}
    for name, expert in zip(config.fleet.experts, experts, strict=True):
        calibration = expert.calibration
        identities[name] = {
            "name": calibration.name,
            "source": calibration.source,
            "calibrated": calibration.calibrated,
            "derived": calibration.derived,
            "vllm_version": calibration.vllm_version,
            "digest": calibration.digest,
            "warnings": list(calibration.warnings),
            "engine": asdict(expert.engine),
        }
    return identities


def _excursions(summaries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One warning per expert and range that a replication really left, with the most steps of any."""
    most: dict[tuple[str, str], int] = {}
    for figures in summaries:
        for name, block in figures["per_expert"].items():
            for what, steps in block["steps_beyond_calibration"].items():
                most[name, what] = max(steps, most.get((name, what), 0))
    for (name, what), steps in most.items():
        yield (f"{name}: up to {steps} steps had more {what} than its calibration covers (interval widened)")


def _doubtful_intervals(config: SimulationConfig, summaries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What to know about intervals of too few replications, and of a cap that was reached."""
    wanted, count = config.uncertainty, len(summaries)
    if count < FEW_REPLICATIONS:
        yield f"intervals: {interval_method(count, wanted.level)}"
    if str(wanted.replications) != "auto" or _is_precise(config, summaries):
        return
    within = mean_known_within(summaries, wanted.level)
    known = "are not known" if within is None else f"are known within {100 * within:.1f} %"
    yield (
        f"intervals: after {count} replications, the cap, mean throughput and median E2E {known}, not "
        f"within the {100 * wanted.precision:g} % asked for; raise uncertainty.max_replications"
    )


def _summary(
    config: SimulationConfig,
    experts: Sequence[ExpertModel],
    shared: Preparations,
    summaries: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The reported summary: what was run, then the combined figures."""
    warnings = sorted(
        {warning for expert in experts for warning in expert.calibration.warnings}
        | set(_excursions(summaries))
        | set(_doubtful_intervals(config, summaries))
    )
    prompts = shared.prompt_set(config.workload.prompts)
    return {
        "schema_version": SCHEMA_VERSION,
        "fleet": config.fleet.name,
        "router": config.router.policy,
        "users": config.users,
        "max_concurrency": config.users if config.workload.arrivals == "closed" else None,
        "request_rate": config.workload.rate_rps,
        "seed": config.seed,
        "replications": len(summaries),
        "replications_asked": str(config.uncertainty.replications),
        "interval_level": config.uncertainty.level,
        "interval_method": interval_method(len(summaries), config.uncertainty.level),
        "mean_known_within": mean_known_within(summaries, config.uncertainty.level),
        "warmup_method": WHOLE_TRACE if config.workload.arrivals == "trace" else MSER,
        "engine_equals_vllm": VLLM_VERSION,
        "calibrated": all(expert.calibration.calibrated for expert in experts),
        "warnings": warnings,
        "prompt_set": prompts.identity(),
        **combine(summaries, config.uncertainty.level),
    }
