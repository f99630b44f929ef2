"""How one fitted router did on prompts that it did not see: by gap, by price or by domain.

A price weight is chosen on the training prompts alone, from predictions for folds left out, and then
applied to the judged ones; what is read off the judged prompts' own curve is named apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ersim.routing import Policy
from ersim.routing import evaluation as ev
from ersim.routing.labels import quality_matrix
from ersim.routing.policies.cluster import Cluster
from ersim.routing.policies.predictive import Predictive
from ersim.routing.policies.twotier import TwoTier
from ersim.routing.policy import ExpertProfile
from ersim.routing.split import text_groups
from ersim.types import ExpertState, FleetState, Prompt, RoutingQuery

Floats = npt.NDArray[np.float64]
Fit = Callable[[Sequence[Prompt]], Policy]
COST_WEIGHTS = (0.0, *np.geomspace(0.005, 1.0, 60).tolist(), 3.0)
SHARES = np.linspace(0.0, 1.0, 101)
PRICE = 0.4
"""Mean price, over the best single model's, that a price weight is chosen for."""
FOLDS = 5


@dataclass
class Asked:
    """One split: who may answer, the training prompts, the judged ones, how the policy was fitted."""

    states: Sequence[ExpertState]
    learn: Sequence[Prompt]
    judge: Sequence[Prompt]
    fit: Fit
    seed: int = 0


@dataclass
class Outcome:
    """One router over all splits: figures per split, and its curve (x, quality), averaged."""

    router: str
    figures: list[dict[str, float]] = field(default_factory=list)
    curves: list[tuple[Floats, Floats]] = field(default_factory=list)
    confusion: tuple[list[str], list[str], npt.NDArray[np.intp]] | None = None

    def spread(self) -> dict[str, ev.Spread]:
        """Mean and spread of each figure over the splits that have it."""
        names = dict.fromkeys(name for row in self.figures for name in row)
        return {n: ev.Spread.of([row[n] for row in self.figures if n in row]) for n in names}


def label_matrix(states: Sequence[ExpertState], prompts: Sequence[Prompt]) -> Floats:
    """Labels, shape (prompts, experts); DataError for an expert without any."""
    return quality_matrix(prompts, [ExpertProfile.of(state) for state in states], required=True)


def queries_of(prompts: Sequence[Prompt]) -> list[RoutingQuery]:
    """What a router sees of the prompts: their text."""
    return [RoutingQuery(prompt.text) for prompt in prompts]


def pair_figures(need: Floats, quality: Floats) -> tuple[dict[str, float], tuple[Floats, Floats]]:
    """APGR, CPT and the curve of quality over the share of strong calls; columns weak, strong."""
    curve = ev.gap_curve(need, quality[:, 1], quality[:, 0])
    figures = {
        "apgr": curve.apgr(),
        "cpt50": curve.cpt(0.5),
        "cpt80": curve.cpt(0.8),
        "weak_quality": curve.weak,
        "strong_quality": curve.strong,
    }
    return figures, (SHARES, np.interp(SHARES, curve.share, curve.quality))


def judge_pair(policy: Policy, asked: Asked, out: Outcome) -> dict[str, float]:
    """Gap recovered over all shares of strong calls."""
    queries = queries_of(asked.judge)
    if isinstance(policy, TwoTier):
        need = policy.need(queries)
    else:
        scores = policy.score(queries)
        need = scores[:, 1] - scores[:, 0]
    figures, curve = pair_figures(need, label_matrix(asked.states, asked.judge))
    out.curves.append(curve)
    return figures


def judge_many(policy: Policy, asked: Asked, out: Outcome) -> dict[str, float]:
    """Quality against mean price; the best single model is picked on the training labels."""
    learnt, quality = label_matrix(asked.states, asked.learn), label_matrix(asked.states, asked.judge)
    predicted = predictions(policy, asked.judge)
    figures, curve = many_figures(predicted, learnt, quality, asked.states)
    out.curves.append(curve)
    left_out = left_out_predictions(asked)
    return figures | chosen_figures(left_out, learnt, predicted, quality, asked.states)


def predictions(policy: Policy, prompts: Sequence[Prompt]) -> Floats:
    """What the policy expects of each expert, without any price, shape (prompts, experts)."""
    queries = queries_of(prompts)
    return policy.quality(queries) if isinstance(policy, Predictive) else policy.score(queries)


def left_out_predictions(asked: Asked) -> Floats:
    """Predictions for each training prompt by a policy that saw no label of its fold; split by text."""
    groups = text_groups(asked.learn)
    count = int(groups.max()) + 1
    fold = np.random.default_rng([asked.seed, 0xF01D]).permutation(count)[groups] % min(FOLDS, count)
    out = np.empty((len(asked.learn), len(asked.states)))
    for number in np.unique(fold):
        held = np.flatnonzero(fold == number)
        policy = asked.fit([asked.learn[i] for i in np.flatnonzero(fold != number).tolist()])
        out[held] = predictions(policy, [asked.learn[i] for i in held.tolist()])
    return out


def many_figures(
    predicted: Floats, learnt: Floats, quality: Floats, states: Sequence[ExpertState]
) -> tuple[dict[str, float], tuple[Floats, Floats]]:
    """Figures of a quality-minus-price router; prices relative to the best single model's.

    Read off the judged prompts' curve, which flatters: `price_to_match_best_single` and
    `quality_at_40pct_price`. `chosen_figures` has what a weight chosen beforehand attains.
    """
    curve = ev.cost_curve(predicted, quality, relative_prices(learnt, states), COST_WEIGHTS)
    single = best_single_quality(learnt, quality)
    chosen = curve_choice(predicted, quality)
    figures = {
        "best_single_quality": single,
        "quality": float(chosen.mean()),
        "misroute_rate": float((chosen < quality.max(axis=1)).mean()),
    }
    within, price = curve.best_within(PRICE), curve.cheapest_with(single)
    if within is not None:
        figures["quality_at_40pct_price"] = within
        figures["gain_at_40pct_price"] = within - single
    if price is not None:
        figures["price_to_match_best_single"] = price
    return figures, (curve.cost, curve.quality)


def chosen_figures(
    left_out: Floats, learnt: Floats, predicted: Floats, quality: Floats, states: Sequence[ExpertState]
) -> dict[str, float]:
    """Price and gain over the best single model on the judged prompts, the weight chosen in training.

    left_out, learnt: predictions and labels of the training prompts; predicted, quality: of the
    judged ones. Two choices: best quality for at most 40 % of the price, and cheapest that matches
    the best single model. A choice that the training prompts do not offer has no figures.
    """
    prices = relative_prices(learnt, states)
    training = ev.cost_curve(left_out, learnt, prices, COST_WEIGHTS)
    choices = {
        "40pct": training.weight_within(PRICE),
        "match": training.weight_with(best_single_quality(learnt, learnt)),
    }
    figures = {}
    for name, weight in choices.items():
        if weight is not None:
            point = ev.cost_curve(predicted, quality, prices, [weight])
            figures[f"price_chosen_{name}"] = float(point.cost[0])
            figures[f"gain_chosen_{name}"] = float(point.quality[0]) - best_single_quality(learnt, quality)
    return figures


def best_single_quality(learnt: Floats, quality: Floats) -> float:
    """Mean judged quality of the model that is best on the training labels."""
    return float(quality[:, int(learnt.mean(axis=0).argmax())].mean())


def relative_prices(learnt: Floats, states: Sequence[ExpertState]) -> Floats:
    """Each model's price over that of the model with the best training labels."""
    prices = np.array([state.usd_per_mtok_out or 0.0 for state in states])
    unit = prices[int(learnt.mean(axis=0).argmax())]
    relative: Floats = prices / (unit if unit > 0 else 1.0)
    return relative


def curve_choice(predicted: Floats, quality: Floats) -> Floats:
    """Quality that each request gets from the expert with the highest prediction."""
    chosen: Floats = quality[np.arange(len(quality)), predicted.argmax(axis=1)]
    return chosen


def judge_domains(policy: Policy, asked: Asked, out: Outcome) -> dict[str, float]:
    """Share of prompts sent to their own domain's expert, and how evenly the load falls."""
    fleet = FleetState(asked.states)
    scores = policy.score(queries_of(asked.judge))
    chosen = np.array([policy.choose(row, fleet).expert for row in scores])
    out.confusion = ev.confusion(
        [prompt.domain for prompt in asked.judge], [asked.states[index].domains[0] for index in chosen]
    )
    figures = domain_figures(chosen, asked.states, asked.judge)
    if isinstance(policy, Cluster):
        figures["clusters"] = float(policy.clustering.count)
        figures["fell_back"] = float(getattr(policy.clustering, "fell_back", False))
    return figures


def domain_figures(
    chosen: npt.NDArray[np.intp], states: Sequence[ExpertState], judge: Sequence[Prompt]
) -> dict[str, float]:
    """Right domains and evenness of load for the chosen experts, shape (prompts,)."""
    served = [states[index].domains[0] for index in chosen]
    truth = [prompt.domain for prompt in judge]
    share = np.bincount(chosen, minlength=len(states)) / len(chosen)
    true_share = np.array([truth.count(state.domains[0]) for state in states]) / len(truth)
    return {
        "domain_accuracy": float(np.mean([a == b for a, b in zip(truth, served, strict=True)])),
        "load_imbalance": float(share.max() * len(states)),
        "load_imbalance_of_domains": float(true_share.max() * len(states)),
    }
