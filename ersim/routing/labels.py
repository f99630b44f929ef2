"""Answer quality of a fleet's experts, read from the labels of a prompt set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError
from ersim.routing.policy import ExpertProfile
from ersim.types import Prompt


def quality_matrix(
    prompts: Sequence[Prompt], experts: Sequence[ExpertProfile], required: bool = False
) -> npt.NDArray[np.float64]:
    """Quality of each expert's answer, shape (prompts, experts), NaN where unknown.

    A label under the expert's own name wins over one under its model's name. With `required`, an
    expert without a single label is a DataError that lists the labels there are.
    """
    quality = np.full((len(prompts), len(experts)), np.nan)
    for row, prompt in enumerate(prompts):
        labels = prompt.quality
        if not labels:
            continue
        for column, expert in enumerate(experts):
            value = labels.get(expert.name)
            if value is None:
                value = labels.get(expert.model)
            if value is not None:
                quality[row, column] = value
    if required:
        _demand_labels(quality, prompts, experts)
    return quality


def _demand_labels(
    quality: npt.NDArray[np.float64], prompts: Sequence[Prompt], experts: Sequence[ExpertProfile]
) -> None:
    if not len(prompts):
        raise DataError("no training prompts: set router.train_fraction above 0 or load router.policy_path")
    missing = [experts[int(column)].name for column in np.flatnonzero(np.isnan(quality).all(axis=0))]
    if missing:
        known = sorted({name for prompt in prompts for name in prompt.quality})
        models = ", ".join(dict.fromkeys(expert.model for expert in experts))
        raise DataError(
            f"the prompt set has no answer quality for expert {', '.join(missing)}: this policy learns from "
            f"labels. The set has labels for: {', '.join(known) or 'no model at all'}; the fleet's models "
            f"are: {models}. Map columns with workload.prompts.quality_columns or choose a policy without "
            "labels"
        )


def experts_differ(quality: npt.NDArray[np.float64]) -> bool:
    """Whether the labels tell at least two experts apart (identical columns carry no choice)."""
    if quality.shape[1] < 2 or np.isnan(quality).all(axis=0).any():
        return False
    first = quality[:, :1]
    same = (quality == first) | (np.isnan(quality) & np.isnan(first))
    return not bool(same.all())


def equal_columns(quality: npt.NDArray[np.float64]) -> list[int]:
    """For each column the number of the distinct column that it equals, in order of appearance.

    Experts with one model share their labels; what is learnt of one holds for all of them.
    """
    seen: dict[bytes, int] = {}
    return [seen.setdefault(quality[:, i].tobytes(), len(seen)) for i in range(quality.shape[1])]


def filled_quality(quality: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Replace unknown labels by the expert's mean, 0 for an expert without any."""
    known = ~np.isnan(quality)
    total = np.where(known, quality, 0.0).sum(axis=0)
    mean = total / np.maximum(known.sum(axis=0), 1)
    return np.where(known, quality, mean)
