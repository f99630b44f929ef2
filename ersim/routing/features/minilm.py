"""The forward pass of all-MiniLM-L6-v2 in numpy: six BERT layers, mean pooling, unit length.

Same weights and, to six digits, the same vectors as sentence-transformers, without PyTorch: a
gateway then needs 0.2 GB instead of 1 GB and starts in a fraction of a second.
Model: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0); BERT: Devlin et al. 2018, arXiv:1810.04805.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import erf

from ersim.errors import DataError
from ersim.routing.features.wordpiece import WordPiece

Array = npt.NDArray[np.float32]
ROOT_HALF = np.float32(np.sqrt(0.5))
EPSILON = np.float32(1e-12)


def read_safetensors(path: Path) -> dict[str, Array]:
    """Float32 tensors of a safetensors file by name; DataError if it is cut or no such file."""
    try:
        blob = path.read_bytes()
        (length,) = struct.unpack("<Q", blob[:8])
        header = json.loads(blob[8 : 8 + length])
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] != "F32":
                continue
            start, end = entry["data_offsets"]
            flat = np.frombuffer(blob, dtype="<f4", count=(end - start) // 4, offset=8 + length + start)
            tensors[name] = flat.reshape(entry["shape"])
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise DataError(f"{path} cannot be read as safetensors: {error}; reinstall its package") from error
    return tensors


def _normalise(rows: Array, weight: Array, bias: Array) -> Array:
    centred = rows - rows.mean(axis=1, keepdims=True)
    spread = np.sqrt(np.mean(centred * centred, axis=1, keepdims=True) + EPSILON)
    normalised: Array = centred / spread * weight + bias
    return normalised


class _Layer:
    """One encoder layer; projections of query, key and value are fused into one product."""

    def __init__(self, tensors: dict[str, Array], index: int, heads: int) -> None:
        def get(name: str) -> Array:
            return tensors[f"encoder.layer.{index}.{name}"]

        names = [f"attention.self.{part}" for part in ("query", "key", "value")]
        self._in = np.ascontiguousarray(np.concatenate([get(f"{name}.weight") for name in names]).T)
        self._in_bias = np.concatenate([get(f"{name}.bias") for name in names])
        self._out = np.ascontiguousarray(get("attention.output.dense.weight").T)
        self._out_bias = get("attention.output.dense.bias")
        self._up = np.ascontiguousarray(get("intermediate.dense.weight").T)
        self._up_bias = get("intermediate.dense.bias")
        self._down = np.ascontiguousarray(get("output.dense.weight").T)
        self._down_bias = get("output.dense.bias")
        self._norms = [
            (get(f"{name}.LayerNorm.weight"), get(f"{name}.LayerNorm.bias"))
            for name in ("attention.output", "output")
        ]
        self._heads = heads

    def __call__(self, rows: Array) -> Array:
        tokens, width = rows.shape
        size = width // self._heads
        mixed = (rows @ self._in + self._in_bias).reshape(tokens, 3, self._heads, size)
        query, key, value = mixed.transpose(1, 2, 0, 3)
        logits = query @ key.transpose(0, 2, 1) * np.float32(1.0 / np.sqrt(size))
        weights = np.exp(logits - logits.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        context = (weights @ value).transpose(1, 0, 2).reshape(tokens, width)
        rows = _normalise(context @ self._out + self._out_bias + rows, *self._norms[0])
        up = rows @ self._up + self._up_bias
        gelu = 0.5 * up * (1.0 + erf(up * ROOT_HALF))
        return _normalise(gelu @ self._down + self._down_bias + rows, *self._norms[1])


class MiniLm:
    """all-MiniLM-L6-v2 from its folder (config.json, vocab.txt, model.safetensors)."""

    max_tokens = 256

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = read_safetensors(folder / "model.safetensors")
        self._tokens = WordPiece(folder / "vocab.txt", self.max_tokens)
        self._words = tensors["embeddings.word_embeddings.weight"]
        self._places = (
            tensors["embeddings.position_embeddings.weight"]
            + tensors["embeddings.token_type_embeddings.weight"][0]
        )
        self._norm = (tensors["embeddings.LayerNorm.weight"], tensors["embeddings.LayerNorm.bias"])
        heads = config["num_attention_heads"]
        self._layers = [_Layer(tensors, index, heads) for index in range(config["num_hidden_layers"])]

    def encode(self, text: str) -> Array:
        """The text's embedding, shape (384,), length 1."""
        ids = self._tokens.encode(text)
        rows = _normalise(self._words[ids] + self._places[: len(ids)], *self._norm)
        for layer in self._layers:
            rows = layer(rows)
        mean = rows.mean(axis=0)
        unit: Array = mean / np.linalg.norm(mean)
        return unit
