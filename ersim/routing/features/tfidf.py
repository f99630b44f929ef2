"""Tf-idf and truncated SVD, as Expert Router's clustering prepares its text.

The preprocessing is that of cluster-branch-train-merge (Gururangan et al. 2023, arXiv:2303.14177,
section on clustering), which Expert Router (Pichlmeier et al. 2024, arXiv:2404.15153) follows: stop
words dropped, numbers replaced by one token, tf-idf, SVD to 100 dimensions, features centred and
scaled to unit variance. Written in numpy because scikit-learn's per-call checks make one prompt
four times slower than it need be, and its import alone takes two seconds.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ersim.errors import DataError, bad_value
from ersim.routing.features.base import Features, Rows
from ersim.routing.features.stopwords import STOP_WORDS

WORD = re.compile(r"[^\W\d_]{2,}")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
NUMBER_TOKEN = "<number>"
SCALES = ("standard", "unit")
Weights = tuple[list[int], list[float]]
"""Columns and tf-idf weights of one text's known words."""

SMALL = 1_000
"""Up to that many training texts the SVD is dense."""


class TfidfSvd(Features):
    """Words to at most `dims` numbers.

    dims: dimensions kept; fewer if the training texts have no more.
    min_count: a word must occur in that many training texts.
    max_words: the most frequent words kept (by number of texts).
    scale: ``unit`` scales each text's row to length 1 (latent semantic analysis as usually done);
        ``standard`` centres each dimension and gives all the same variance (the paper),
        rows of length about 1. It gives noise dimensions the weight of the leading ones, and
        k-means then finds one huge cluster and many tiny ones (docs/routing.md).
    sublinear: use 1 + log(count) instead of the count.
    """

    base_s = 60e-6
    per_char_s = 300e-9

    def __init__(
        self,
        dims: int = 100,
        min_count: int = 2,
        max_words: int = 20_000,
        scale: str = "unit",
        sublinear: bool = False,
    ) -> None:
        if dims < 1:
            raise bad_value("router.params.feature_params.tfidf.dims", ">= 1", dims)
        if scale not in SCALES:
            raise bad_value("router.params.feature_params.tfidf.scale", " or ".join(SCALES), scale)
        self.dims, self.min_count, self.max_words = dims, min_count, max_words
        self.scale, self.sublinear = scale, sublinear
        self._column: dict[str, int] = {}

    def fit(self, texts: Sequence[str], seed: int) -> None:
        """Learn vocabulary, document frequencies and the SVD; DataError if no word is left."""
        self._learn(texts, seed)

    def fit_transform(self, texts: Sequence[str], seed: int) -> Rows:
        """`fit`, then `transform` of the same texts without reading them again."""
        return self._rows(self._learn(texts, seed))

    def _learn(self, texts: Sequence[str], seed: int) -> list[Weights]:
        """Learn everything; the texts' tf-idf weights come out on the way."""
        counts = [self._count(text) for text in texts]
        self._learn_vocabulary(counts)
        weights = [self._weights(count) for count in counts]
        matrix = self._matrix(weights)
        self._learn_components(matrix, seed)
        raw = np.asarray(matrix @ self._components)
        self._centre = np.zeros(raw.shape[1])
        self._spread = np.ones(raw.shape[1])
        if self.scale == "standard":
            self._centre = raw.mean(axis=0)
            spread = raw.std(axis=0)
            self._spread = np.where(spread > 1e-12, spread, 1.0) * math.sqrt(raw.shape[1])
        return weights

    def transform(self, texts: Sequence[str]) -> Rows:
        """Rows in training units; a text without a known word gives the row of an empty text."""
        return self._rows([self._weights(self._count(text)) for text in texts])

    def _rows(self, weights: Sequence[Weights]) -> Rows:
        rows = np.zeros((len(weights), self._components.shape[1]))
        for index, (columns, values) in enumerate(weights):
            if columns:
                rows[index] = np.asarray(values) @ self._components[columns]
        if self.scale == "unit":
            length = np.sqrt(np.einsum("ij,ij->i", rows, rows))
            return rows / np.where(length > 1e-12, length, 1.0)[:, None]
        return (rows - self._centre) / self._spread

    def _count(self, text: str) -> Counter[str]:
        head = text[: self.max_chars].lower()
        counts = Counter(WORD.findall(head))
        numbers = len(NUMBER.findall(head))
        if numbers:
            counts[NUMBER_TOKEN] = numbers
        return counts

    def _learn_vocabulary(self, counts: Sequence[Counter[str]]) -> None:
        """Keep frequent words that are no stop words; idf as in scikit-learn (smoothed)."""
        texts_with: Counter[str] = Counter()
        for count in counts:
            texts_with.update(count.keys())
        least = min(self.min_count, max(len(counts) // 2, 1))
        kept = [(n, word) for word, n in texts_with.items() if n >= least and word not in STOP_WORDS]
        if not kept:
            raise DataError(
                "tf-idf found no usable word in the training prompts: give it more or longer texts"
            )
        kept.sort(key=lambda pair: (-pair[0], pair[1]))
        kept = kept[: self.max_words]
        self._column = {word: column for column, (_, word) in enumerate(kept)}
        self._idf = [math.log((1 + len(counts)) / (1 + n)) + 1.0 for n, _ in kept]

    def _weights(self, count: Counter[str]) -> Weights:
        """Columns and tf-idf weights of one text, scaled to length 1."""
        columns: list[int] = []
        values: list[float] = []
        square = 0.0
        for word, times in count.items():
            column = self._column.get(word)
            if column is None:
                continue
            value = (1.0 + math.log(times) if self.sublinear else times) * self._idf[column]
            columns.append(column)
            values.append(value)
            square += value * value
        length = math.sqrt(square) or 1.0
        return columns, [value / length for value in values]

    def _matrix(self, weights: Sequence[Weights]) -> Any:
        """Tf-idf weights, shape (texts, words): dense for few texts (scipy is slow to import), else CSR."""
        if len(weights) <= SMALL:
            dense = np.zeros((len(weights), len(self._column)))
            for row, (row_columns, row_values) in enumerate(weights):
                dense[row, row_columns] = row_values
            return dense
        from scipy.sparse import csr_array

        columns: list[int] = []
        values: list[float] = []
        starts = [0]
        for row_columns, row_values in weights:
            columns += row_columns
            values += row_values
            starts.append(len(columns))
        return csr_array((values, columns, starts), shape=(len(weights), len(self._column)))

    def _learn_components(self, matrix: Any, seed: int) -> None:
        """Right singular vectors, shape (words, dims), largest first, signs fixed."""
        smaller = min(matrix.shape)
        dims = min(self.dims, smaller)
        if isinstance(matrix, np.ndarray):
            singular, vectors = _singular_dense(matrix)
        else:
            singular, vectors = _singular_sparse(matrix, dims, seed)
        vectors = vectors[:dims][singular[:dims] > 1e-6 * singular[0]]
        peak = np.abs(vectors).argmax(axis=1)
        signs = np.sign(vectors[np.arange(len(vectors)), peak])
        self._components = np.ascontiguousarray((vectors * signs[:, None]).T)


def _singular_dense(matrix: Rows) -> tuple[Rows, Rows]:
    """All singular values, largest first, and right vectors, by the eigenvectors of the Gram matrix."""
    values, left = np.linalg.eigh(matrix @ matrix.T)
    order = np.argsort(-values)
    singular = np.sqrt(np.maximum(values[order], 0.0))
    vectors = left[:, order].T @ matrix
    return singular, vectors / np.maximum(singular, 1e-12)[:, None]


def _singular_sparse(matrix: Any, dims: int, seed: int) -> tuple[Rows, Rows]:
    """The `dims` largest singular values and right vectors by Lanczos iterations (scipy)."""
    from scipy.sparse.linalg import svds

    start = np.random.default_rng([seed, 0x5FD]).standard_normal(min(matrix.shape))
    _, singular, vectors = svds(matrix, k=min(dims, min(matrix.shape) - 1), v0=start)
    order = np.argsort(-singular)
    return singular[order], vectors[order]
