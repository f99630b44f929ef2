"""Clustering methods behind one face: fit on training rows, then tell any row its cluster.

All methods end in the same form, so that one query costs the same few microseconds whatever found
the clusters: a list of centres (nearest one wins), or a Gaussian mixture's densities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ersim.errors import unknown_choice

Rows = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]

CHUNK = 64


class Clustering(ABC):
    """Splits rows into clusters 0..count-1; `assign` is defined for rows never seen."""

    count: int = 0

    @abstractmethod
    def fit(self, rows: Rows, clusters: int, seed: int) -> None:
        """Find at most `clusters` clusters in the training rows."""

    @abstractmethod
    def assign(self, rows: Rows) -> Labels:
        """Cluster of each row, shape (len(rows),)."""


def squared_distances(rows: Rows, centres: Rows) -> Rows:
    """Squared Euclidean distances, shape (rows, centres); each entry is computed alone, so that a
    row's result does not depend on its batch."""
    out = np.empty((len(rows), len(centres)))
    for start in range(0, len(rows), CHUNK):  # bounds the memory of the differences
        difference = rows[start : start + CHUNK, None, :] - centres[None, :, :]
        out[start : start + CHUNK] = np.einsum("ijk,ijk->ij", difference, difference)
    return out


class NearestCentre(Clustering):
    """A row belongs to the nearest centre."""

    centres: Rows

    def assign(self, rows: Rows) -> Labels:
        """Index of the nearest centre; the lower index wins a tie."""
        nearest: Labels = np.argmin(squared_distances(rows, self.centres), axis=1)
        return nearest

    def _keep(self, rows: Rows, labels: Labels) -> None:
        """Take the means of the non-empty clusters as centres."""
        names = [label for label in np.unique(labels) if label >= 0]
        self.centres = np.array([rows[labels == label].mean(axis=0) for label in names])
        self.count = len(self.centres)


class KMeans(NearestCentre):
    """Lloyd's k-means from k-means++ starts, the best of four.

    In numpy, because it is the default of every simulation and importing scikit-learn costs more
    than the whole fit; the tests compare it with scikit-learn's.
    """

    restarts = 4
    iterations = 50

    def fit(self, rows: Rows, clusters: int, seed: int) -> None:
        """Keep the start with the lowest inertia."""
        best, lowest = np.zeros(len(rows), dtype=np.intp), np.inf
        for restart in range(self.restarts):
            start = _plus_plus(rows, clusters, np.random.default_rng([seed, restart]))
            labels, inertia = _lloyd(rows, start, self.iterations)
            if inertia < lowest:
                best, lowest = labels, inertia
        self._keep(rows, best)


def _lloyd(rows: Rows, centres: Rows, iterations: int) -> tuple[Labels, float]:
    """Labels and inertia (sum of squared distances) after Lloyd's iterations; empty clusters stay put."""
    square = np.einsum("ij,ij->i", rows, rows)
    labels = np.full(len(rows), -1, dtype=np.intp)
    inertia = np.inf
    for _ in range(iterations):
        distance = square[:, None] - 2.0 * (rows @ centres.T) + np.einsum("ij,ij->i", centres, centres)
        found = distance.argmin(axis=1)
        inertia = float(np.take_along_axis(distance, found[:, None], axis=1).sum())
        if np.array_equal(found, labels):
            break
        labels = found
        member = np.zeros((len(centres), len(rows)))
        member[labels, np.arange(len(rows))] = 1.0
        sizes = member.sum(axis=1)
        filled = sizes > 0
        centres = centres.copy()
        centres[filled] = (member[filled] @ rows) / sizes[filled, None]
    return labels, inertia


def _plus_plus(rows: Rows, clusters: int, generator: np.random.Generator) -> Rows:
    """k-means++ seeding (Arthur and Vassilvitskii 2007): next centre in proportion to distance squared."""
    centres = [rows[int(generator.integers(len(rows)))]]
    nearest = squared_distances(rows, centres[0][None, :])[:, 0]
    while len(centres) < clusters and nearest.max() > 1e-12:
        chosen = int(generator.choice(len(rows), p=nearest / nearest.sum()))
        centres.append(rows[chosen])
        nearest = np.minimum(nearest, squared_distances(rows, rows[chosen][None, :])[:, 0])
    return np.array(centres)


CLUSTERINGS: Mapping[str, type[Clustering]] = MappingProxyType({"kmeans": KMeans})


def build_clustering(name: str) -> Clustering:
    """Make the method registered under `name`; ConfigError lists the choices."""
    if name not in CLUSTERINGS:
        raise unknown_choice("router.params.method", name, CLUSTERINGS)
    return CLUSTERINGS[name]()
