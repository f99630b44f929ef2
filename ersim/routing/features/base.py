"""What a feature extractor is, and how several are laid side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]


class Features(ABC):
    """Turns texts into rows of numbers; `fit` on training texts comes first.

    base_s, per_char_s: seconds for one text at batch 1 on one core (docs/routing.md: how measured).
    max_chars: how much of a text is read; the rest is ignored, so that a prompt of any length has
    a bounded routing time.
    """

    base_s: float = 0.0
    per_char_s: float = 0.0
    max_chars: int = 20_000

    @abstractmethod
    def fit(self, texts: Sequence[str], seed: int) -> None:
        """Learn from the training texts."""

    @abstractmethod
    def transform(self, texts: Sequence[str]) -> Rows:
        """Features, shape (len(texts), dimensions); any text is accepted, the empty one too."""

    def fit_transform(self, texts: Sequence[str], seed: int) -> Rows:
        """`fit`, then the training texts' own features; for extractors that can save half the work."""
        self.fit(texts, seed)
        return self.transform(texts)


class Joined(Features):
    """Several extractors side by side."""

    def __init__(self, parts: Sequence[Features]) -> None:
        self.parts = tuple(parts)
        self.base_s = sum(part.base_s for part in parts)
        self.per_char_s = sum(part.per_char_s for part in parts)
        self.max_chars = max(part.max_chars for part in parts)

    def fit(self, texts: Sequence[str], seed: int) -> None:
        """Fit every part on the same texts."""
        for part in self.parts:
            part.fit(texts, seed)

    def transform(self, texts: Sequence[str]) -> Rows:
        """Columns of all parts in order."""
        return np.hstack([part.transform(texts) for part in self.parts])

    def fit_transform(self, texts: Sequence[str], seed: int) -> Rows:
        """Fit every part, each reading the texts once where it can."""
        return np.hstack([part.fit_transform(texts, seed) for part in self.parts])
