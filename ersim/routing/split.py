"""Which prompts train a policy and which are asked: never the same text on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ersim.errors import bad_value
from ersim.types import Prompt


def text_groups(prompts: Sequence[Prompt]) -> npt.NDArray[np.intp]:
    """Group number of each prompt, shape (prompts,): equal text, equal group, in order of appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt.text, len(numbers)) for prompt in prompts], dtype=np.intp)


def split_prompts(
    prompts: Sequence[Prompt], train_fraction: float, seed: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices of the training prompts and of those that may be asked, each in ascending order.

    Grouped by identical text, drawn at random from `seed`. At 0 nothing trains and all is asked;
    at 1 all trains and all is asked: the policy then answers prompts whose labels it has seen,
    which whoever reports must say.
    """
    if not 0.0 <= train_fraction <= 1.0:
        raise bad_value("router.train_fraction", "in [0, 1]", train_fraction)
    everything = np.arange(len(prompts), dtype=np.intp)
    if train_fraction == 0.0:
        return everything[:0], everything
    if train_fraction == 1.0:
        return everything, everything
    groups = text_groups(prompts)
    count = int(groups.max()) + 1 if len(groups) else 0
    order = np.random.default_rng([seed, 0x5B117]).permutation(count)
    take = min(max(round(train_fraction * count), 1), max(count - 1, 1))
    trains = np.zeros(count, dtype=bool)
    trains[order[:take]] = True
    mask = trains[groups]
    return everything[mask], everything[~mask]
