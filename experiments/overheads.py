"""What operator measurements leave out of a step, and how far their sum is to be trusted.

Every term of a calibration made from tables or profiles is worth its coefficient. Coefficients start
from ``conf/calibration/overheads.yaml`` (prior mean and relative spread, each with its source) and are
corrected by measured runs (``observations.json``: what each term contributes to a measured TPOT), by
Bayesian linear regression with known noise. Leaving runs out gives the coefficients to judge them by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from scipy.linalg import block_diag

from ersim.errors import DataError
from ersim.steptime.calibration import CALIBRATION_DIR

OVERHEADS_FILE = CALIBRATION_DIR / "overheads.yaml"
OBSERVATIONS_FILE = CALIBRATION_DIR / "observations.yaml"
FloatArray = npt.NDArray[np.float64]
KINDS = ("per_request", "open_loop_stages", "closed_loop_rows")
REPORTED_LINK_REL_STD = 0.4  # of an all-reduce over PCIe: public reports lie between 10 and 27 us at 32 rows

# Host terms of every calibration: feature, side, label; their prior means are seconds.
HOST_TERMS = (
    ("step", "host", "host time per step"),
    ("sampled_seqs", "host", "host time per sequence"),
    ("step", "exposed", "host time not hidden"),
    ("mixed_step", "exposed", "host time of steps with prefill"),
)


@dataclass(frozen=True)
class Observation:
    """One measured TPOT and what each parameter contributes to it at its prior mean, milliseconds.

    calibration: the name of the one whose step times were simulated. kind: of run, as run.yaml has it.
    known_within_ms: how exactly the TPOT was published. made_with: digest of the prior and the terms that
    the parts were taken at.
    """

    run: str
    group: str
    calibration: str
    tpot_ms: float
    parts_ms: Mapping[str, float]
    kind: str = "per_request"
    known_within_ms: float = 5.1e-5
    made_with: str = ""

    @property
    def gpu_share(self) -> float:
        """Milliseconds of all GPU terms as a share of the measured TPOT."""
        hidden = {label for _, _, label in HOST_TERMS}
        return sum(part for name, part in self.parts_ms.items() if name not in hidden) / self.tpot_ms


@dataclass(frozen=True)
class Overheads:
    """Coefficients by parameter name, and factors of single calibrations.

    relative_covariance: of the relative errors of `names` and then of `factors`. factors: what all GPU
    terms of a calibration are to be multiplied by, as far as its own runs say (1 with a spread of
    common_rel_std for all others).
    """

    names: tuple[str, ...]
    mean: FloatArray
    relative_covariance: FloatArray
    common_rel_std: float
    workload_rel_std: float
    run_rel_std: Mapping[str, float]
    derived_rel_std: float
    residual_rel_std: float
    frontend: Mapping[str, float]
    factors: Mapping[str, float] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """The coefficient of one parameter."""
        return float(self.mean[self.names.index(name)])


def parameter(label: str, source: str, precision: str) -> str:
    """Which parameter corrects the term `label`; some differ by where the term was measured."""
    if label == "weights" and source == "tables" and precision in ("fp8", "int8"):
        return "weights fp8"
    if source == "profile" and label == "decode attention":
        return f"{label} profile"
    return label


def load_prior(path: Path = OVERHEADS_FILE) -> Overheads:
    """The prior. Raises DataError naming the file and the field at fault."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        table = data["parameters"]
        names = tuple(table)
        mean = np.asarray([float(table[name]["mean"]) for name in names])
        std = np.asarray([float(table[name]["rel_std"]) for name in names])
        spreads = ("common_rel_std", "workload_rel_std", "derived_rel_std", "residual_rel_std")
        rest: dict[str, Any] = {name: float(data[name]) for name in spreads}
        rest["run_rel_std"] = {kind: float(data["run_rel_std"][kind]) for kind in KINDS}
        frontend = {key: float(value) for key, value in data["frontend"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: field {error} is missing or not a number") from error
    return Overheads(names, mean, np.diag(std**2), frontend=frontend, **rest)


def load_observations(path: Path = OBSERVATIONS_FILE) -> list[Observation]:
    """Measured runs that correct the prior; none when the file is absent."""
    if not path.is_file():
        return []
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where it is built in
    data = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    try:
        return [Observation(**row) for row in data["observations"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: {error}; build it again with python -m experiments.observe_runs") from error


def save_observations(rows: Sequence[Observation], path: Path = OBSERVATIONS_FILE) -> None:
    """Write the observations, one row a line so that a change can be read."""
    lines = [
        "# What each term contributes to measured TPOTs (ms); made by python -m experiments.observe_runs"
    ]
    lines.append("observations:")
    for row in rows:
        parts = {name: float(f"{value:.4g}") for name, value in row.parts_ms.items() if value > 0}
        record: dict[str, Any] = {"run": row.run, "group": row.group, "calibration": row.calibration}
        record |= {"kind": row.kind, "tpot_ms": round(row.tpot_ms, 4)}
        record |= {"known_within_ms": row.known_within_ms, "made_with": row.made_with, "parts_ms": parts}
        lines.append(f"  - {json.dumps(record)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def posterior(prior: Overheads, observations: Sequence[Observation]) -> Overheads:
    """Prior corrected by observations: linear Gaussian update of the relative coefficients.

    An observation says that the parts times their relative coefficients, and the GPU's part times the
    factor of its calibration, sum to the measured TPOT, up to the noise of its kind of run. Coefficients
    are kept at or above a tenth of their prior.
    """
    if not observations:
        return prior
    calibrations = sorted({row.calibration for row in observations})
    parts = [[row.parts_ms.get(name, 0.0) / row.tpot_ms for name in prior.names] for row in observations]
    owners = [[row.gpu_share * (row.calibration == name) for name in calibrations] for row in observations]
    matrix = np.hstack([np.asarray(parts), np.asarray(owners)])
    weight = np.asarray([prior.run_rel_std[row.kind] ** -2 for row in observations])
    spread = np.full(len(calibrations), prior.common_rel_std**2)
    inverse = np.linalg.inv(block_diag(prior.relative_covariance, np.diag(spread)))
    covariance = np.linalg.inv(inverse + matrix.T @ (weight[:, None] * matrix))
    start = np.concatenate([np.ones(len(prior.names)), np.zeros(len(calibrations))])
    relative = covariance @ (inverse @ start + matrix.T @ weight)
    relative[len(prior.names) :] += 1.0  # a factor's relative error is that of 1 + what was found
    relative = np.maximum(relative, 0.1)
    return replace(
        prior,
        mean=prior.mean * relative[: len(prior.names)],
        relative_covariance=covariance / np.outer(relative, relative),
        factors=dict(zip(calibrations, relative[len(prior.names) :].tolist(), strict=True)),
    )


def load_overheads(leave_out: Callable[[Observation], bool] | None = None) -> Overheads:
    """The coefficients in use: prior and all observations, or all but those left out."""
    rows = load_observations()
    return posterior(load_prior(), [row for row in rows if leave_out is None or not leave_out(row)])


def predicted_tpot_ms(row: Observation, found: Overheads, prior: Overheads) -> float:
    """The TPOT that coefficients `found` give the observation's parts, which were taken at the prior's."""
    relative = dict(zip(found.names, found.mean / prior.mean, strict=True))
    hidden, factor = {label for _, _, label in HOST_TERMS}, found.factors.get(row.calibration, 1.0)
    return sum(
        part * float(relative[name]) * (1.0 if name in hidden else factor)
        for name, part in row.parts_ms.items()
    )


def held_out_runs(calibration: str) -> tuple[float, int] | None:
    """Mean absolute error of the TPOTs measured with this calibration, and how many; None without any.

    Each is predicted with coefficients from the other runs; of a series, from the rows of other TP.
    """
    rows, prior = load_observations(), load_prior()
    errors = []
    for judged in rows:
        if judged.calibration == calibration:
            others = [row for row in rows if (row.run, row.group) != (judged.run, judged.group)]
            told = predicted_tpot_ms(judged, posterior(prior, others), prior)
            errors.append(abs(told / judged.tpot_ms - 1))
    return (float(np.mean(errors)), len(errors)) if errors else None


def host_terms() -> list[dict[str, Any]]:
    """The host terms of a calibration, to follow its GPU terms."""
    return [
        {"kind": "linear", "feature": feature, "side": side, "label": label}
        for feature, side, label in HOST_TERMS
    ]


def coefficients(
    terms: Sequence[Mapping[str, Any]],
    overheads: Overheads,
    *,
    calibration: str,
    source: str,
    precision: str,
    derived: bool,
    maps_rel_std: float = 0.0,
) -> tuple[list[float], list[list[float]]]:
    """Theta and covariance of `terms`: the parameters' own, the calibration's factor, more where derived.

    maps_rel_std: what interpolation between measured points, and derivation through another GPU, may add
    to linear maps; only to those of a calibration that no run among the observations has judged.
    """
    names = [parameter(str(term["label"]), source, precision) for term in terms]
    on_gpu = np.asarray([term["side"] == "gpu" for term in terms], dtype=float)
    select = np.zeros((len(terms), len(overheads.names) + len(overheads.factors)))
    select[np.arange(len(terms)), [overheads.names.index(name) for name in names]] = 1.0
    mean = overheads.mean[[overheads.names.index(name) for name in names]]
    common = overheads.workload_rel_std**2
    if calibration in overheads.factors:
        select[:, len(overheads.names) + list(overheads.factors).index(calibration)] = on_gpu
        mean = mean * np.where(on_gpu > 0, overheads.factors[calibration], 1.0)
        maps_rel_std = 0.0
    else:
        common += overheads.common_rel_std**2
    relative = select @ overheads.relative_covariance @ select.T + common
    if derived:
        linear = np.asarray([term["label"] in ("weights", "arithmetic", "all-reduce") for term in terms])
        relative = relative + overheads.derived_rel_std**2 * np.outer(linear, linear)
    maps = np.asarray([term["label"] in ("weights", "arithmetic", "linear maps") for term in terms])
    relative = relative + maps_rel_std**2 * np.outer(maps, maps)
    if source == "profile":  # profiles hold no all-reduce: datasheet and public reports
        guessed = np.asarray([term["label"] == "all-reduce" for term in terms], dtype=float)
        relative = relative + np.diag(guessed * REPORTED_LINK_REL_STD**2)
    covariance = relative * np.outer(mean, mean)
    rounded = [[float(f"{value:.5g}") for value in row] for row in (covariance + covariance.T) / 2]
    return [float(f"{value:.6g}") for value in mean], rounded
