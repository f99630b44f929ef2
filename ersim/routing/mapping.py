"""From clusters to experts: by measured quality, by domain, or balanced by load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError, bad_value
from ersim.routing.labels import experts_differ, quality_matrix
from ersim.routing.policy import ExpertProfile
from ersim.types import Prompt

Table = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]

MAPPINGS = ("auto", "quality", "domain", "load")
TIE = 1e-9


def resolve_mapping(asked: str, prompts: Sequence[Prompt], experts: Sequence[ExpertProfile]) -> str:
    """The mapping that "auto" stands for.

    domain where most training prompts belong to a domain that some expert is declared for; else
    quality where labels tell experts apart; else load.
    """
    if asked not in MAPPINGS:
        raise bad_value("router.params.mapping", "one of " + ", ".join(MAPPINGS), asked)
    if asked != "auto":
        return asked
    served = {domain for expert in experts for domain in expert.domains}
    if 2 * sum(prompt.domain in served for prompt in prompts) > len(prompts):
        return "domain"
    return "quality" if experts_differ(quality_matrix(prompts, experts)) else "load"


def quality_table(
    prompts: Sequence[Prompt], experts: Sequence[ExpertProfile], labels: Labels, clusters: int, shrink: float
) -> Table:
    """Mean quality of each expert in each cluster, shape (clusters, experts).

    Shrunk towards the expert's overall mean by `shrink` pseudo-prompts, for small clusters lie.
    """
    quality = quality_matrix(prompts, experts, required=True)
    known = ~np.isnan(quality)
    filled = np.where(known, quality, 0.0)
    overall = filled.sum(axis=0) / known.sum(axis=0)
    table = np.empty((clusters, len(experts)))
    for cluster in range(clusters):
        members = labels == cluster
        total = filled[members].sum(axis=0) + shrink * overall
        table[cluster] = total / np.maximum(known[members].sum(axis=0) + shrink, TIE)
    return table


def domain_table(
    prompts: Sequence[Prompt], experts: Sequence[ExpertProfile], labels: Labels, clusters: int
) -> Table:
    """Share of each cluster's training prompts whose domain the expert serves, shape (clusters, experts)."""
    serves = np.array(
        [[prompt.domain in expert.domains for expert in experts] for prompt in prompts], dtype=float
    )
    if not serves.any():
        raise DataError(
            "router.params.mapping=domain: no expert serves any domain of the prompt set; set "
            "fleet.experts.<name>.domains (the set has: "
            + ", ".join(sorted({prompt.domain for prompt in prompts})[:20])
            + ")"
        )
    return np.array(
        [
            serves[labels == cluster].mean(axis=0) if (labels == cluster).any() else serves.mean(axis=0)
            for cluster in range(clusters)
        ]
    )


def assign_best(table: Table, weights: npt.NDArray[np.float64], slots: Sequence[int]) -> Labels:
    """Expert of each cluster: the best in `table`, ties to the one with least load per slot so far."""
    load = np.zeros(table.shape[1])
    chosen = np.zeros(len(table), dtype=np.intp)
    for cluster in np.argsort(-weights, kind="stable"):
        best = np.flatnonzero(table[cluster] >= table[cluster].max() - TIE)
        expert = int(best[np.argmin(load[best])])
        chosen[cluster] = expert
        load[expert] += weights[cluster] / max(slots[expert], 1)
    return chosen


def assign_balanced(
    table: Table, weights: npt.NDArray[np.float64], slots: Sequence[int], slack: float
) -> Labels:
    """Expert of each cluster so that no expert gets over (1 + slack) times its share of the load.

    weights: each cluster's share of the work, sum 1. An expert's share is its part of all slots.
    Largest clusters first, each to the best expert in `table` with room, to the emptiest when none
    has room (longest-processing-time-first scheduling with affinities).
    """
    share = np.asarray(slots, dtype=float) / sum(slots)
    load = np.zeros(table.shape[1])
    chosen = np.zeros(len(table), dtype=np.intp)
    for cluster in np.argsort(-weights, kind="stable"):
        room = load + weights[cluster] <= share * (1.0 + slack) + TIE
        if room.any():
            best = np.where(room, table[cluster], -np.inf)
            tied = np.flatnonzero(best >= best.max() - TIE)
            expert = int(tied[np.argmin(load[tied] / share[tied])])
        else:
            expert = int(np.argmin((load + weights[cluster]) / share))
        chosen[cluster] = expert
        load[expert] += weights[cluster]
    return chosen


def worth_matrix(kind: str, prompts: Sequence[Prompt], experts: Sequence[ExpertProfile]) -> Table | None:
    """What each expert is worth for each prompt, shape (prompts, experts); None for mapping "load"."""
    if kind == "quality":
        return quality_matrix(prompts, experts)
    if kind == "domain":
        return np.array([[float(prompt.domain in e.domains) for e in experts] for prompt in prompts])
    return None


def mean_worth(worth: Table | None, chosen: Labels, slots: Sequence[int]) -> float:
    """Mean worth of the chosen experts; without a worth, minus the largest overload of an expert."""
    if worth is not None:
        return float(np.nanmean(worth[np.arange(len(chosen)), chosen]))
    share = np.bincount(chosen, minlength=len(slots)) / len(chosen)
    return -float((share * sum(slots) / np.asarray(slots)).max())
