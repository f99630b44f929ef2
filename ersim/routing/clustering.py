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

CACHED = 2**15
"""Numbers in one block of differences: 256 KiB, which stay in a core's cache."""


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
    row's result does not depend on its batch: what decisions are made with."""
    out = np.empty((len(rows), len(centres)))
    chunk = _chunk(centres)
    for start in range(0, len(rows), chunk):
        difference = rows[start : start + chunk, None, :] - centres[None, :, :]
        out[start : start + chunk] = np.einsum("ijk,ijk->ij", difference, difference)
    return out


def fitting_distances(rows: Rows, centres: Rows) -> Rows:
    """As `squared_distances`, by |a|^2 - 2ab + |b|^2: many times faster on a whole training set, but
    the last bits depend on the batch, so for fitting only."""
    distance: Rows = rows @ (-2.0 * centres.T)
    distance += np.einsum("ij,ij->i", rows, rows)[:, None]
    distance += np.einsum("ij,ij->i", centres, centres)
    return np.maximum(distance, 0.0, out=distance)


def _chunk(centres: Rows) -> int:
    """Rows whose differences to all centres fit into a core's cache."""
    return max(1, CACHED // centres.size)


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
    square, numbers = float(np.einsum("ij,ij->", rows, rows)), np.arange(len(rows))
    labels = np.full(len(rows), -1, dtype=np.intp)
    inertia = np.inf
    for _ in range(iterations):
        # Distances to the centres without |row|^2, which is the same for all of them.
        nearness = rows @ (-2.0 * centres.T)
        nearness += np.einsum("ij,ij->i", centres, centres)
        found = nearness.argmin(axis=1)
        inertia = square + float(nearness[numbers, found].sum())
        if np.array_equal(found, labels):
            break
        labels = found
        centres = _means(rows, labels, centres)
    return labels, inertia


def _means(rows: Rows, labels: Labels, centres: Rows) -> Rows:
    """Mean row of each cluster; an empty cluster keeps its centre."""
    member = np.zeros((len(centres), len(rows)))
    member[labels, np.arange(len(rows))] = 1.0
    sizes = np.bincount(labels, minlength=len(centres))
    filled = sizes > 0
    means = centres.copy()
    means[filled] = (member[filled] @ rows) / sizes[filled, None]
    return means


def _plus_plus(rows: Rows, clusters: int, generator: np.random.Generator) -> Rows:
    """k-means++ seeding (Arthur and Vassilvitskii 2007): next centre in proportion to distance squared."""
    centres = [rows[int(generator.integers(len(rows)))]]
    nearest = fitting_distances(rows, centres[0][None, :])[:, 0]
    while len(centres) < clusters and nearest.max() > 1e-12:
        chosen = int(generator.choice(len(rows), p=nearest / nearest.sum()))
        centres.append(rows[chosen])
        nearest = np.minimum(nearest, fitting_distances(rows, rows[chosen][None, :])[:, 0])
    return np.array(centres)


class MiniBatchKMeans(NearestCentre):
    """k-means on random batches (scikit-learn): for training sets of 100,000 prompts and more."""

    def fit(self, rows: Rows, clusters: int, seed: int) -> None:
        """Fit, then keep the means of the resulting clusters."""
        from sklearn.cluster import MiniBatchKMeans as Method

        method = Method(clusters, random_state=seed, n_init=4, batch_size=1024)
        self._keep(rows, method.fit_predict(rows))


class BalancedKMeans(NearestCentre):
    """k-means whose training clusters hold at most ceil(rows / clusters) rows each.

    As in cluster-branch-train-merge (arXiv:2303.14177): balanced while training, nearest centre
    afterwards. Here the rows with most to lose choose first, in place of an exact assignment.
    """

    iterations = 15

    def fit(self, rows: Rows, clusters: int, seed: int) -> None:
        """Start from plain k-means centres, then alternate capped assignment and means."""
        start = KMeans()
        start.fit(rows, clusters, seed)
        centres = start.centres
        labels = np.zeros(len(rows), dtype=np.intp)
        for _ in range(self.iterations):
            found = _capped_assignment(fitting_distances(rows, centres))
            if np.array_equal(found, labels):
                break
            labels = found
            centres = _means(rows, labels, centres)
        self._keep(rows, labels)


def _capped_assignment(distance: Rows) -> Labels:
    """Nearest centre with room for each row; rows with the largest regret are placed first."""
    count, clusters = distance.shape
    room = np.full(clusters, -(-count // clusters))
    order = np.argsort(distance, axis=1)
    if clusters == 1:
        return np.zeros(count, dtype=np.intp)
    nearest_two = np.take_along_axis(distance, order[:, :2], axis=1)
    labels = np.zeros(count, dtype=np.intp)
    for row in np.argsort(nearest_two[:, 0] - nearest_two[:, 1], kind="stable"):
        for cluster in order[row]:
            if room[cluster] > 0:
                labels[row] = cluster
                room[cluster] -= 1
                break
    return _fill_empty(labels, distance)


def _fill_empty(labels: Labels, distance: Rows) -> Labels:
    """Give each empty cluster the row nearest to it, so that every centre stays defined."""
    for cluster in range(distance.shape[1]):
        if not (labels == cluster).any():
            sizes = np.bincount(labels, minlength=distance.shape[1])
            movable = np.where(sizes[labels] > 1, distance[:, cluster], np.inf)
            labels[int(np.argmin(movable))] = cluster
    return labels


class GaussianMixture(Clustering):
    """A mixture of Gaussians with diagonal covariances (scikit-learn); the densest component wins."""

    def fit(self, rows: Rows, clusters: int, seed: int) -> None:
        """Fit by expectation maximisation from a k-means start."""
        from sklearn.mixture import GaussianMixture as Method

        floor = 1e-3 * max(float(rows.var(axis=0).mean()), 1e-9)
        method = Method(clusters, covariance_type="diag", reg_covar=floor, random_state=seed, max_iter=60)
        method.fit(rows)
        self._means, self._precision = method.means_, 1.0 / method.covariances_
        self._constant = np.log(np.maximum(method.weights_, 1e-300)) - 0.5 * np.log(method.covariances_).sum(
            1
        )
        self.count = len(self._means)

    def assign(self, rows: Rows) -> Labels:
        """The component with the highest posterior."""
        labels = np.empty(len(rows), dtype=np.intp)
        chunk = _chunk(self._means)
        for start in range(0, len(rows), chunk):
            difference = rows[start : start + chunk, None, :] - self._means[None, :, :]
            difference *= difference
            distance = np.einsum("ijk,jk->ij", difference, self._precision)
            labels[start : start + chunk] = np.argmax(self._constant - 0.5 * distance, axis=1)
        return labels


class Agglomerative(NearestCentre):
    """Ward's hierarchical clustering (scikit-learn) of at most `most` rows; nearest mean afterwards."""

    most = 4_000

    def fit(self, rows: Rows, clusters: int, seed: int) -> None:
        """Cluster a sample when there are more rows: memory grows with their square."""
        from sklearn.cluster import AgglomerativeClustering

        rows = _sample(rows, self.most, seed)
        self._keep(rows, AgglomerativeClustering(min(clusters, len(rows))).fit_predict(rows))


def _sample(rows: Rows, most: int, seed: int) -> Rows:
    """At most `most` of the rows, drawn at random, in their order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])]


class Hdbscan(NearestCentre):
    """Density clusters (scikit-learn's HDBSCAN), which choose their own number; nearest mean afterwards.

    Of more than `most` rows a sample is clustered, for time grows with their square.

    `clusters` only sets the smallest cluster size, rows / (4 clusters). In text features most rows
    are noise and few clusters appear: with fewer than two, or over `most_noise` noise, k-means
    takes over and `fell_back` says so.
    """

    most = 4_000
    most_noise = 0.7
    fell_back = False
    noise = 0.0

    def fit(self, rows: Rows, clusters: int, seed: int) -> None:
        """Find dense clusters, or fall back."""
        from sklearn.cluster import HDBSCAN

        everything, rows = rows, _sample(rows, self.most, seed)
        smallest = max(5, len(rows) // (4 * max(clusters, 1)))
        if len(rows) < 2 * smallest:
            labels = np.full(len(rows), -1)
        else:
            labels = HDBSCAN(min_cluster_size=smallest, min_samples=5, copy=True).fit_predict(rows)
        self.noise = float(np.mean(labels < 0))
        self.fell_back = labels.max() < 1 or self.noise > self.most_noise
        if self.fell_back:
            inner = KMeans()
            inner.fit(everything, clusters, seed)
            self.centres, self.count = inner.centres, inner.count
            return
        self._keep(rows, labels)


CLUSTERINGS: Mapping[str, type[Clustering]] = MappingProxyType(
    {
        "kmeans": KMeans,
        "minibatch": MiniBatchKMeans,
        "balanced": BalancedKMeans,
        "gaussian_mixture": GaussianMixture,
        "agglomerative": Agglomerative,
        "hdbscan": Hdbscan,
    }
)


def build_clustering(name: str) -> Clustering:
    """Make the method registered under `name`; ConfigError lists the choices."""
    if name not in CLUSTERINGS:
        raise unknown_choice("router.params.method", name, CLUSTERINGS)
    return CLUSTERINGS[name]()
