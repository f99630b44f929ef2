"""What operator measurements leave out of a step, and how far their sum is to be trusted.

Host time and correction factors are few, shared by all calibrations made from tables or profiles, and
kept in ``conf/calibration/overheads.yaml`` with the source of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ersim.errors import DataError
from ersim.steptime.calibration import CALIBRATION_DIR

OVERHEADS_FILE = CALIBRATION_DIR / "overheads.yaml"


@dataclass(frozen=True)
class Overheads:
    """Coefficients and their relative standard deviations.

    scale, rel_std: by term label; rel_std also by ``derived`` (added for derived linear maps) and
    ``common`` (one factor on everything). The host figures are seconds.
    """

    host_step_s: float
    host_seq_s: float
    exposed_step_s: float
    mixed_step_s: float
    scale: Mapping[str, float]
    rel_std: Mapping[str, float]
    residual_rel_std: float
    frontend: Mapping[str, float]


def load_overheads(path: Path = OVERHEADS_FILE) -> Overheads:
    """Read the overheads. Raises DataError naming the file and the missing field."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        fields = {name: data[name] for name in Overheads.__dataclass_fields__}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: field {error} is missing") from error
    return Overheads(**fields)


def host_terms(overheads: Overheads) -> tuple[list[dict[str, Any]], list[float]]:
    """Host terms and their coefficients in seconds."""
    terms = [
        ("step", "host", "host time per step", overheads.host_step_s),
        ("sampled_seqs", "host", "host time per sequence", overheads.host_seq_s),
        ("step", "exposed", "host time not hidden", overheads.exposed_step_s),
        ("mixed_step", "exposed", "host time of steps with prefill", overheads.mixed_step_s),
    ]
    made = [{"kind": "linear", "feature": f, "side": s, "label": label} for f, s, label, _ in terms]
    return made, [value for *_, value in terms]


def coefficients(
    terms: Sequence[Mapping[str, Any]], overheads: Overheads, derived: bool
) -> tuple[list[float], list[list[float]]]:
    """Theta and its covariance for GPU terms followed by the host terms.

    Relative errors are independent between terms, but for the common factor.
    """
    host, host_values = host_terms(overheads)
    theta = [overheads.scale.get(str(term["label"]), 1.0) for term in terms] + host_values
    spread = []
    for term in [*terms, *host]:
        label = str(term["label"])
        name = label if label in overheads.rel_std else str(term["side"])
        extra = overheads.rel_std["derived"] if derived and label == "linear maps" else 0.0
        spread.append(float(np.hypot(overheads.rel_std[name], extra)))
    mean = np.asarray(theta)
    common = overheads.rel_std["common"] ** 2 * np.outer(mean, mean)
    matrix = common + np.diag((mean * np.asarray(spread)) ** 2)
    return theta, [[float(f"{value:.6g}") for value in row] for row in matrix]
