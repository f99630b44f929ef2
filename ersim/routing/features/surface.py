"""Counts on a prompt's surface: how long it is, how many numbers, lines and sentences it has.

Prompt length alone is a strong predictor of which model is needed, so it must never be missing
from a comparison; these few counts cost microseconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from ersim.errors import bad_value
from ersim.routing.features.base import Features, Rows

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
CODE = re.compile(r"[{}();=<>\[\]\\_$]")


def surface_counts(text: str) -> list[float]:
    """Logarithms of characters, words, numbers, lines, sentences and code-like signs, plus two ratios."""
    words = text.split()
    chars = len(text)
    numbers = NUMBER.findall(text)
    signs = len(CODE.findall(text))
    return [
        math.log1p(chars),
        math.log1p(len(words)),
        math.log1p(len(numbers)),
        math.log1p(text.count("\n")),
        math.log1p(len(SENTENCE_END.findall(text))),
        math.log1p(signs),
        len(numbers) / max(len(words), 1),
        chars / max(len(words), 1) if words else 0.0,
        math.log1p(text.count("%") + text.count("/")),
    ]


class Surface(Features):
    """Surface counts, centred and scaled on the training texts, rows of length about 1.

    The other extractors' rows have about that length too, so that none drowns another in distances.
    """

    base_s = 20e-6
    per_char_s = 100e-9

    def fit(self, texts: Sequence[str], seed: int) -> None:
        """Learn centre and spread of each count."""
        raw = self._raw(texts)
        self._centre = raw.mean(axis=0)
        spread = raw.std(axis=0)
        self._spread = np.where(spread > 1e-12, spread, 1.0)

    def transform(self, texts: Sequence[str]) -> Rows:
        """Scaled counts, clipped to five deviations so that one endless prompt predicts nothing absurd."""
        scaled: Rows = (self._raw(texts) - self._centre) / self._spread
        return np.clip(scaled, -5.0, 5.0) / math.sqrt(scaled.shape[1])

    def _raw(self, texts: Sequence[str]) -> Rows:
        return np.array([surface_counts(text[: self.max_chars]) for text in texts], dtype=float)


class Length(Features):
    """The logarithm of the length in characters alone, centred and scaled to `weight` deviations.

    weight: how much it counts beside rows of length 1; 0.3 is what one of the surface counts gets.
    """

    base_s = 2e-6
    per_char_s = 0.0

    def __init__(self, weight: float = 0.3) -> None:
        if not weight > 0:
            raise bad_value("router.params.feature_params.length.weight", "> 0", weight)
        self.weight = weight

    def fit(self, texts: Sequence[str], seed: int) -> None:
        """Learn centre and spread."""
        raw = np.log1p([len(text) for text in texts])
        self._centre, self._spread = float(raw.mean()), float(raw.std()) or 1.0

    def transform(self, texts: Sequence[str]) -> Rows:
        """One column, clipped to five deviations."""
        raw: Rows = np.log1p(np.array([len(text) for text in texts], dtype=float))
        scaled = np.clip((raw - self._centre) / self._spread, -5.0, 5.0)
        return self.weight * scaled[:, None]
