"""What operator measurements leave out of a step, and how far their sum is to be trusted.

Every term of a calibration made from tables or profiles is worth its coefficient. Coefficients start
from ``conf/calibration/overheads.yaml`` (prior mean and relative spread, each with its source) and are
corrected by measured runs (``observations.json``: what each term contributes to a measured TPOT), by
Bayesian linear regression with known noise. Leaving runs out gives the coefficients to judge them by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from ersim.errors import DataError
from ersim.steptime.calibration import CALIBRATION_DIR

OVERHEADS_FILE = CALIBRATION_DIR / "overheads.yaml"
OBSERVATIONS_FILE = CALIBRATION_DIR / "observations.yaml"
FloatArray = npt.NDArray[np.float64]
REPORTED_LINK_REL_STD = 0.4  # of an all-reduce over PCIe: public reports lie between 10 and 27 us at 32 rows

# Host terms of every calibration: feature, side, label; their prior means are seconds.
HOST_TERMS = (
    ("step", "host", "host time per step"),
    ("sampled_seqs", "host", "host time per sequence"),
    ("step", "exposed", "host time not hidden"),
    ("sampled_seqs", "exposed", "host time per sequence not hidden"),
    ("mixed_step", "exposed", "host time of steps with prefill"),
)


@dataclass(frozen=True)
class Observation:
    """One measured TPOT and what each parameter contributes to it at its prior mean, milliseconds.

    calibration: the name of the one whose step times were simulated.
    """

    run: str
    group: str
    calibration: str
    tpot_ms: float
    parts_ms: Mapping[str, float]


@dataclass(frozen=True)
class Overheads:
    """Coefficients by parameter name, and the covariance of their relative errors in the same order."""

    names: tuple[str, ...]
    mean: FloatArray
    relative_covariance: FloatArray
    common_rel_std: float
    derived_rel_std: float
    residual_rel_std: float
    frontend: Mapping[str, float]

    def value(self, name: str) -> float:
        """The coefficient of one parameter."""
        return float(self.mean[self.names.index(name)])


def parameter(label: str, source: str, precision: str) -> str:
    """Which parameter corrects the term `label`; some differ by where the term was measured."""
    if label == "weights" and source == "tables" and precision in ("fp8", "int8"):
        return "weights fp8"
    if source == "profile" and label in ("decode attention", "host time not hidden"):
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
        rest = {name: float(data[name]) for name in ("common_rel_std", "derived_rel_std", "residual_rel_std")}
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
        record |= {"tpot_ms": round(row.tpot_ms, 4), "parts_ms": parts}
        lines.append(f"  - {json.dumps(record)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def posterior(prior: Overheads, observations: Sequence[Observation]) -> Overheads:
    """Prior corrected by observations: linear Gaussian update of the relative coefficients.

    An observation says that the parts times their relative coefficients sum to the measured TPOT, up
    to the prior's common spread. Coefficients are kept at or above a tenth of their prior.
    """
    if not observations:
        return prior
    matrix = np.asarray(
        [[row.parts_ms.get(name, 0.0) / row.tpot_ms for name in prior.names] for row in observations]
    )
    noise = prior.common_rel_std
    inverse = np.linalg.inv(prior.relative_covariance)
    precision = inverse + matrix.T @ matrix / noise**2
    covariance = np.linalg.inv(precision)
    start = np.ones(len(prior.names))
    relative = covariance @ (inverse @ start + matrix.T @ np.ones(len(observations)) / noise**2)
    relative = np.maximum(relative, 0.1)
    scaled = covariance / np.outer(relative, relative)
    return Overheads(
        prior.names,
        prior.mean * relative,
        scaled,
        prior.common_rel_std,
        prior.derived_rel_std,
        prior.residual_rel_std,
        prior.frontend,
    )


def load_overheads(leave_out: Callable[[Observation], bool] | None = None) -> Overheads:
    """The coefficients in use: prior and all observations, or all but those left out."""
    rows = load_observations()
    return posterior(load_prior(), [row for row in rows if leave_out is None or not leave_out(row)])


def predicted_tpot_ms(row: Observation, found: Overheads, prior: Overheads) -> float:
    """The TPOT that coefficients `found` give the observation's parts, which were taken at the prior's."""
    relative = dict(zip(found.names, found.mean / prior.mean, strict=True))
    return sum(part * float(relative[name]) for name, part in row.parts_ms.items())


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
    source: str,
    precision: str,
    derived: bool,
    maps_rel_std: float = 0.0,
) -> tuple[list[float], list[list[float]]]:
    """Theta and covariance of `terms`: the parameters' own, a common factor, and more where derived.

    maps_rel_std: what interpolation between measured points, and derivation through another GPU, may add
    to linear maps.
    """
    names = [parameter(str(term["label"]), source, precision) for term in terms]
    index = [overheads.names.index(name) for name in names]
    mean = overheads.mean[index]
    relative = overheads.relative_covariance[np.ix_(index, index)] + overheads.common_rel_std**2
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
