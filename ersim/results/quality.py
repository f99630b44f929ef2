"""What routing did to answers and load: quality, misroutes, strong calls, cost per correct answer.

Pure functions over arrays, one entry per request: `expert` is the index of the expert that answered,
`score` the quality of its answer in [0, 1] (NaN where no label is known). None means that the figure
cannot be known from these arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ersim.errors import bad_value

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]


def mean_score(score: Floats) -> float | None:
    """Mean quality over the requests whose answer has a label; None if none has."""
    known = score[~np.isnan(score)]
    return float(known.mean()) if len(known) else None


def score_by(groups: Ints, score: Floats, names: Sequence[str]) -> dict[str, float]:
    """Mean quality per group (expert or domain); groups without a labelled request are left out.

    groups: index into `names` per request.
    """
    known = ~np.isnan(score)
    count = np.bincount(groups[known], minlength=len(names))
    total = np.bincount(groups[known], weights=score[known], minlength=len(names))
    return {name: float(total[i] / count[i]) for i, name in enumerate(names) if count[i]}


def share_by(groups: Ints, names: Sequence[str]) -> dict[str, float]:
    """Share of all requests per group, 0 for groups that got none; {} without requests."""
    if not len(groups):
        return {}
    share = np.bincount(groups, minlength=len(names)) / len(groups)
    return {name: float(share[i]) for i, name in enumerate(names)}


def misroute_rate_by_domain(expert: Ints, domain: Ints, serves: Bools) -> float | None:
    """Share of requests that went to an expert not declared for their domain.

    serves: shape (experts, domains). Requests of domains that nobody serves are not counted; None
    if that leaves none.
    """
    anyone: Bools = np.logical_or.reduce(serves, axis=0)
    served = anyone[domain]
    if not served.any():
        return None
    return float(np.mean(~serves[expert[served], domain[served]]))


def misroute_rate_by_quality(expert: Ints, quality: Floats) -> float | None:
    """Share of requests for which another expert's answer is known to be better.

    quality: shape (requests, experts), the label of every expert's answer, NaN where unknown.
    Requests whose chosen expert has no label are not counted.
    """
    rows = np.arange(len(expert))
    chosen = quality[rows, expert] if len(expert) else np.empty(0)
    known = ~np.isnan(chosen)
    if not known.any():
        return None
    best = np.nanmax(quality[known], axis=1)
    return float(np.mean(chosen[known] < best))


def strong_call_share(expert: Ints, strong: Bools) -> float | None:
    """Share of requests that a strong expert answered; strong: shape (experts,)."""
    return float(np.mean(strong[expert])) if len(expert) else None


def correct_answers(score: Floats) -> float:
    """Sum of the known scores: with labels of 0 and 1, the number of correct answers."""
    return float(np.nansum(score))


def usd_per_correct_answer(usd: float | Floats, score: Floats) -> float | None:
    """Cost of all requests (a total, or per request) over correct answers; None without any.

    Only labelled requests count: a total is scaled to their share, per-request costs are summed
    over them.
    """
    known = ~np.isnan(score)
    correct = correct_answers(score)
    if correct <= 0:
        return None
    if isinstance(usd, np.ndarray):
        return float(usd[known].sum()) / correct
    if not usd >= 0:
        raise bad_value("usd", ">= 0", usd)
    return float(usd) * float(known.mean()) / correct


def load_imbalance(expert: Ints, slots: Sequence[int], weight: Floats | None = None) -> float | None:
    """Load of the busiest expert over what an even split would give it: 1 is even.

    An even split is in proportion to `slots` (sequences that an expert can run at once). weight:
    work per request (tokens, say); by default each request counts once.
    """
    if not len(expert):
        return None
    load = np.bincount(expert, weights=weight, minlength=len(slots)).astype(float)
    even = np.asarray(slots, dtype=float) / float(np.sum(slots)) * load.sum()
    return float(np.max(load / even)) if load.sum() > 0 else None


def quality_given_up(scores: Floats, expert: Ints, first: Ints | None = None) -> float | None:
    """Mean expected quality lost per request by not answering where the policy preferred.

    scores: the policy's load-independent scores, shape (requests, experts), in units of quality;
    first: its own first choice per request, by default the highest score.
    """
    if not len(expert):
        return None
    rows = np.arange(len(expert))
    preferred = scores.max(axis=1) if first is None else scores[rows, first]
    return float(np.mean(preferred - scores[rows, expert]))


def spilled_share(expert: Ints, first: Ints) -> float | None:
    """Share of requests answered elsewhere than where the policy would send them without load."""
    return float(np.mean(expert != first)) if len(expert) else None
