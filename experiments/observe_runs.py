"""Measures, by simulation, what each term of a step contributes to published runs' TPOT.

``python -m experiments.observe_runs --runs FOLDER`` writes ``conf/calibration/observations.yaml``, from
which `experiments.overheads` corrects its coefficients; rebuild the calibrations afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Collection, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ersim.config import ExpertConfig
from ersim.errors import DataError
from ersim.steptime import ExpertModel, build_expert_model, load, load_gpu, load_model
from ersim.steptime.calibration import Calibration, resolve
from ersim.steptime.evaluate import PreparedStepTime
from ersim.steptime.transfer import Setting, build_transfer
from ersim.types import Batch
from experiments.overheads import (
    HOST_TERMS,
    Observation,
    Overheads,
    coefficients,
    load_observations,
    load_prior,
    parameter,
    save_observations,
)
from experiments.published_runs import Case, read_runs
from experiments.simulate_published import figures, simulate_case

STAGE_SECONDS = 120.0  # a stage's TPOT is known from this much of it


def with_overheads(calibration: Calibration, overheads: Overheads) -> Calibration:
    """The same measurements with other coefficients; calibrations that are not made so stay as they are."""
    if calibration.source == "transfer":
        base = load(resolve(str(calibration.provenance["base"]), "transfer"))
        model, gpu = load_model(calibration.model), load_gpu(calibration.gpu)
        target = Setting(model, gpu, calibration.precision, calibration.tp)
        return build_transfer(with_overheads(base, overheads), target)
    if calibration.source not in ("tables", "profile"):
        return calibration
    terms = []
    for term in calibration.terms:
        if "fp8_scale" in term:
            ratio = overheads.value("decode attention fp8 KV") / overheads.value("decode attention")
            term = {**term, "fp8_scale": ratio}
        terms.append(term)
    derived, more = calibration.derived is not None, float(calibration.fit.get("maps_rel_std", 0.0))
    theta, covariance = coefficients(
        terms,
        overheads,
        calibration=calibration.name,
        source=calibration.source,
        precision=calibration.precision,
        derived=derived,
        maps_rel_std=more,
    )
    return dataclasses.replace(
        calibration,
        terms=tuple(terms),
        theta=tuple(theta),
        covariance=tuple(map(tuple, covariance)),
        residual_rel_std=overheads.residual_rel_std,
        frontend=overheads.frontend,
    )


def expert_model(config: ExpertConfig, overheads: Overheads) -> ExpertModel:
    """The expert with its committed measurements and the given coefficients."""
    expert = build_expert_model(config, "expert")
    return dataclasses.replace(expert, calibration=with_overheads(expert.calibration, overheads))


class TermMeter:
    """A step time that adds up, over decoded tokens, what each term takes."""

    def __init__(self, expert: ExpertModel) -> None:
        calibration = expert.calibration
        self._whole = expert.step_time(None)
        hidden = {label for _, side, label in HOST_TERMS if side == "host"}
        self._parts: list[PreparedStepTime | None] = []
        for index, term in enumerate(calibration.terms):
            alone = np.zeros(len(calibration.theta))
            alone[index] = calibration.theta[index]
            single = dataclasses.replace(expert, calibration=_only(calibration, alone))
            self._parts.append(None if term["label"] in hidden else single.step_time(None))
        self.seconds = np.zeros(len(calibration.terms))

    def step_s(self, batch: Batch) -> float:
        """As `StepTime.step_s`."""
        if batch.decode_seqs:
            for index, part in enumerate(self._parts):
                if part is not None:
                    self.seconds[index] += batch.decode_seqs * part.step_s(batch)
        return self._whole.step_s(batch)

    def decode_run_s(
        self, decode_seqs: int, context_tokens: int, context_max: int, steps: int
    ) -> npt.NDArray[np.float64]:
        """As `StepTime.decode_run_s`."""
        run = (decode_seqs, context_tokens, context_max, steps)
        for index, part in enumerate(self._parts):
            if part is not None:
                self.seconds[index] += decode_seqs * float(part.decode_run_s(*run).sum())
        return self._whole.decode_run_s(*run)


def _only(calibration: Calibration, theta: npt.NDArray[np.float64]) -> Calibration:
    return dataclasses.replace(calibration, theta=tuple(theta.tolist()))


def steady_cases(case: Case) -> Iterator[tuple[Case, str]]:
    """The case, or each of its stages by itself, with the group whose TPOT is observed."""
    if case.kind != "open_loop_stages":
        yield case, ""
        return
    for name, number in case.sessions.items():
        stage = case.workload["stages"][number]
        seconds = min(STAGE_SECONDS, stage["duration_s"])
        short = stage | {"duration_s": seconds, "requests": 0}
        yield dataclasses.replace(case, workload={"stages": [short]}, sessions={name: 0}), name


def observe(case: Case, group: str, prior: Overheads) -> Observation | None:
    """What each parameter contributes to the measured TPOT; None where it was not measured or predicted."""
    measured = case.measured[group].get("mean_tpot_ms")
    expert = expert_model(case.expert, prior)
    calibration = expert.calibration
    if measured is None or calibration.source not in ("tables", "profile"):
        return None
    meter = TermMeter(expert)
    quiet = dataclasses.replace(expert, calibration=dataclasses.replace(calibration, residual_rel_std=0.0))
    requests = simulate_case(case, quiet, meter, prior.frontend, seed=0)
    predicted = figures(requests, case, group)["mean_tpot_ms"]
    shares = meter.seconds / meter.seconds.sum()
    parts: dict[str, float] = {}
    for term, share in zip(calibration.terms, shares, strict=True):
        name = parameter(str(term["label"]), calibration.source, calibration.precision)
        if name == "decode attention" and expert.engine.kv_cache_dtype == "fp8":
            name = "decode attention fp8 KV"
        parts[name] = parts.get(name, 0.0) + float(share) * predicted
    return Observation(
        case.run,
        fold(case),
        calibration.name,
        measured,
        parts,
        case.kind,
        case.known_within_ms,
        made_with(calibration, prior),
    )


def made_with(calibration: Calibration, prior: Overheads) -> str:
    """A digest of what an observation's parts hang on: the prior's means and the calibration's terms."""
    terms = [{**term, "fp8_scale": None} for term in calibration.terms]  # that one is itself corrected
    hung_on = [list(prior.names), prior.mean.tolist(), terms]
    return sha256(json.dumps(hung_on, sort_keys=True).encode()).hexdigest()[:12]


def kept_rows(observed: Collection[str], prior: Overheads) -> list[Observation]:
    """The rows at hand of runs that were not observed now; DataError when they hang on other terms."""
    kept = [row for row in load_observations() if row.run not in observed]
    for name in dict.fromkeys(row.calibration for row in kept):
        now = made_with(load(resolve(name, "observation")), prior)
        stale = sorted({row.run for row in kept if row.calibration == name and row.made_with != now})
        if stale:
            raise DataError(
                f"{', '.join(stale)}: observed with other prior means or terms of {name}; give a folder that "
                "holds these runs too (docs/accuracy.md says where they are from), or take their rows out"
            )
    return kept


def fold(case: Case) -> str:
    """What is left out together when a case is judged: of a series all rows of one TP, else the run."""
    return f"tp{case.expert.tp}" if case.kind == "closed_loop_rows" else "all"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("../shared/data/vllm-runs"))
    folder: Path = parser.parse_args().runs
    prior = load_prior()
    rows = []
    for case in read_runs(folder):
        for single, group in steady_cases(case):
            row = observe(single, group, prior)
            if row is not None:
                rows.append(row)
                error = sum(row.parts_ms.values()) / row.tpot_ms - 1
                print(f"{case.run:36} {case.row:24} {group:4} prior error {100 * error:+6.1f} %", flush=True)
    observed = {row.run for row in rows}
    try:
        kept = kept_rows(observed, prior)
    except DataError as error:
        raise SystemExit(f"observe_runs: nothing written: {error}") from None
    for run in dict.fromkeys(row.run for row in kept):
        print(f"{run:36} is not in {folder}: kept as it was")
    save_observations([*rows, *kept])
    print(json.dumps({"observations": len(rows), "kept": len(kept)}))


if __name__ == "__main__":
    main()
