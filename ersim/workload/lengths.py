"""How long prompts and answers are: distributions fitted to real traffic, or constants.

A fitted distribution is a table: the quantiles of the prompt length, and for each of B prompt
length classes of equal probability the quantiles of the answer length. So the two keep the
dependence that the traffic has (in the conversation trace it is strong and not monotone, which no
correlation coefficient can say). Tables and their sources are in `data/lengths.json`;
`python -m ersim.workload.fit_lengths` makes those of the traces again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ersim.config import LengthsConfig
from ersim.errors import ConfigError, unknown_choice

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class LengthModel(Protocol):
    """Turns two uniforms per request into a prompt and an answer length."""

    @property
    def source(self) -> str:
        """Where the lengths come from."""
        ...

    def draw(self, prompt_u: Floats, output_u: Floats) -> tuple[Ints, Ints]:
        """Prompt and output tokens, both >= 1, of the uniforms' shape."""
        ...


@dataclass(frozen=True)
class QuantileTable:
    """Joint distribution of prompt and output tokens by quantiles.

    prompt_levels, prompt_tokens: shape (K,), levels from 0 to 1. output_levels: shape (M,).
    output_tokens: shape (B, M), row b for prompt levels in [b/B, (b+1)/B).
    """

    source: str
    prompt_levels: Floats
    prompt_tokens: Floats
    output_levels: Floats
    output_tokens: Floats

    def draw(self, prompt_u: Floats, output_u: Floats) -> tuple[Ints, Ints]:
        prompt = np.interp(prompt_u, self.prompt_levels, self.prompt_tokens)
        classes = len(self.output_tokens)
        row = np.minimum((prompt_u * classes).astype(np.int64), classes - 1)
        last = len(self.output_levels) - 2
        knot = np.minimum(np.searchsorted(self.output_levels, output_u, side="right") - 1, last)
        low, high = self.output_levels[knot], self.output_levels[knot + 1]
        fraction = (output_u - low) / (high - low)
        below, above = self.output_tokens[row, knot], self.output_tokens[row, knot + 1]
        return _whole(prompt), _whole(below + fraction * (above - below))


@dataclass(frozen=True)
class ConstantLengths:
    """Every prompt and every answer alike. Closed-loop users then march in lockstep: see the docs."""

    prompt_tokens: int
    output_tokens: int
    source: str = "constant"

    def draw(self, prompt_u: Floats, output_u: Floats) -> tuple[Ints, Ints]:
        shape = np.shape(prompt_u)
        return np.full(shape, self.prompt_tokens, np.int64), np.full(shape, self.output_tokens, np.int64)


def _whole(tokens: Floats) -> Ints:
    return np.maximum(np.rint(tokens), 1.0).astype(np.int64)


@cache
def _tables() -> dict[str, QuantileTable]:
    text = resources.files("ersim.workload").joinpath("data/lengths.json").read_text("utf-8")
    return {
        kind: QuantileTable(
            source=entry["source"],
            **{
                name: np.asarray(entry[name], np.float64)
                for name in ("prompt_levels", "prompt_tokens", "output_levels", "output_tokens")
            },
        )
        for kind, entry in json.loads(text).items()
    }


def fitted_kinds() -> list[str]:
    """Names of the fitted distributions."""
    return sorted(_tables())


def length_model(config: LengthsConfig) -> LengthModel:
    """The distribution that `config.kind` names; `prompts` has none and is handled by the caller.

    Raises ConfigError for an unknown kind, or constant lengths that are missing.
    """
    if config.kind == "constant":
        if config.prompt_tokens is None or config.output_tokens is None:
            raise ConfigError(
                "workload.lengths.prompt_tokens and .output_tokens must be set for constant lengths"
            )
        return ConstantLengths(config.prompt_tokens, config.output_tokens)
    if config.kind not in _tables():
        raise unknown_choice("workload.lengths.kind", config.kind, [*_tables(), "prompts", "constant"])
    return _tables()[config.kind]
