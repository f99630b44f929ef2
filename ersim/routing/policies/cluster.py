"""Expert Router: cluster the prompts, give each cluster to one expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError, bad_value
from ersim.routing import mapping as maps
from ersim.routing.clustering import Rows, build_clustering
from ersim.routing.features import build_features
from ersim.routing.policy import ExpertProfile, Policy, Scores
from ersim.routing.split import split_prompts
from ersim.types import Prompt, RoutingQuery


class Cluster(Policy):
    """k-means (or another method) over text features; cluster to expert by quality, domain or load.

    method: a name in `ersim.routing.clustering`. features: see `ersim.routing.features`.
    clusters: a number; "auto": four per expert or per domain of the training set, whichever are
        more, but at least ten training prompts each; "sweep": the candidate whose mapping serves a
        fifth of the training prompts, left out for that, best.
    mapping: quality, domain, load, or auto (the first of these that the training prompts allow).
    shrink: pseudo-prompts that pull a small cluster's quality towards the mean.
    slack: mapping=load lets an expert exceed its share of the work by this much.
    """

    name = "cluster"

    def __init__(
        self,
        experts: Sequence[ExpertProfile],
        method: str = "kmeans",
        clusters: int | str = "auto",
        features: str = "tfidf",
        feature_params: dict[str, Any] | None = None,
        mapping: str = "auto",
        shrink: float = 5.0,
        slack: float = 0.1,
    ) -> None:
        super().__init__(experts)
        if clusters not in ("auto", "sweep") and not (isinstance(clusters, int) and clusters >= 1):
            raise bad_value("router.params.clusters", "auto, sweep or an integer >= 1", clusters)
        if mapping not in maps.MAPPINGS:
            raise bad_value("router.params.mapping", "one of " + ", ".join(maps.MAPPINGS), mapping)
        if not shrink >= 0:
            raise bad_value("router.params.shrink", ">= 0", shrink)
        if not slack >= 0:
            raise bad_value("router.params.slack", ">= 0", slack)
        self.clusters, self.mapping, self.shrink, self.slack = clusters, mapping, shrink, slack
        self.features = build_features(features, feature_params)
        self.method, self.clustering = method, build_clustering(method)
        self.swept: dict[int, float] = {}
        self.routing_base_s = self.features.base_s + 30e-6
        self.routing_per_char_s = self.features.per_char_s
        self.max_chars = self.features.max_chars

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Find clusters in the training prompts and give each to an expert."""
        if not prompts:
            raise DataError("router.policy cluster needs training prompts: set router.train_fraction above 0")
        texts = [prompt.text for prompt in prompts]
        rows = self.features.fit_transform(texts, seed)
        count = self._sweep(prompts, rows, seed) if self.clusters == "sweep" else self._count(prompts)
        self._fit_clusters(prompts, rows, count, seed)

    def _fit_clusters(self, prompts: Sequence[Prompt], rows: Rows, count: int, seed: int) -> None:
        self.clustering = build_clustering(self.method)
        self.clustering.fit(rows, count, seed)
        self._map(prompts, self.clustering.assign(rows))

    def _sweep(self, prompts: Sequence[Prompt], rows: Rows, seed: int) -> int:
        """Number of clusters whose assigned experts serve held-out training prompts best.

        Worth is measured quality, or whether the expert serves the domain; balancing by load has
        no such measure and is swept by how evenly the held-out prompts spread.
        """
        kind = maps.resolve_mapping(self.mapping, prompts, self.profiles)
        learn, check = split_prompts(prompts, 0.8, seed)
        worth = maps.worth_matrix(kind, [prompts[i] for i in check], self.profiles)
        self.swept = {}
        for count in sorted({len(self.experts), 8, 12, 16, 24, 32, 48, 64, 96}):
            if count * 5 <= len(learn):
                self._fit_clusters([prompts[i] for i in learn], rows[learn], count, seed)
                chosen = self.expert_of_cluster[self.clustering.assign(rows[check])]
                self.swept[count] = maps.mean_worth(worth, chosen, [p.slots for p in self.profiles])
        if not self.swept:
            return self._count(prompts)
        return max(self.swept, key=lambda count: self.swept[count])

    def score(self, queries: Sequence[RoutingQuery]) -> Scores:
        """The row of the query's cluster in the cluster-by-expert table, shape (queries, experts)."""
        rows = self.features.transform([query.text for query in queries])
        return self._table[self.clustering.assign(rows)]

    def cluster_of(self, texts: Sequence[str]) -> npt.NDArray[np.intp]:
        """Cluster of each text, for reports."""
        return self.clustering.assign(self.features.transform(texts))

    def _count(self, prompts: Sequence[Prompt]) -> int:
        distinct = len({prompt.text for prompt in prompts})
        if isinstance(self.clusters, int):
            return min(self.clusters, distinct)
        domains = len({prompt.domain for prompt in prompts})
        wanted = 4 * max(len(self.experts), domains)
        return max(1, min(wanted, distinct // 10, 8 * math.isqrt(distinct)))

    def _map(self, prompts: Sequence[Prompt], labels: npt.NDArray[np.intp]) -> None:
        """Fill the table: what each expert is worth for each cluster, the assigned one on top."""
        count = self.clustering.count
        kind = maps.resolve_mapping(self.mapping, prompts, self.profiles)
        weights = _work(prompts, labels, count)
        slots = [profile.slots for profile in self.profiles]
        if kind == "quality":
            table = maps.quality_table(prompts, self.profiles, labels, count, self.shrink)
            chosen = maps.assign_best(table, weights, slots)
        elif kind == "domain":
            table = maps.domain_table(prompts, self.profiles, labels, count)
            chosen = maps.assign_best(table, weights, slots)
        else:
            table = np.zeros((count, len(self.experts)))
            chosen = maps.assign_balanced(table, weights, slots, self.slack)
        # The assigned expert leads by a hair where others tie with it, by what it takes otherwise.
        table[np.arange(count), chosen] = table.max(axis=1) + 1e-6
        self.mapping_used, self.expert_of_cluster, self.cluster_share = kind, chosen, weights
        self._table = table


def _work(prompts: Sequence[Prompt], labels: npt.NDArray[np.intp], clusters: int) -> npt.NDArray[np.float64]:
    """Each cluster's share of the training prompts, sum 1."""
    counts = np.bincount(labels, minlength=clusters).astype(float)
    return counts / len(prompts)
