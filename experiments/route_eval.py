"""Compare routers on a labelled set: several splits by text, train on one side, judge on the other."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ersim.config import PromptSetConfig, RouterConfig
from ersim.errors import DataError, bad_value
from ersim.routing import Policy, build_policy, split_prompts
from ersim.routing import evaluation as ev
from ersim.routing.labels import quality_matrix
from ersim.routing.policies.cluster import Cluster
from ersim.routing.policies.predictive import Predictive
from ersim.routing.policies.twotier import TwoTier
from ersim.routing.policy import ExpertProfile
from ersim.routing.split import text_groups
from ersim.types import ExpertState, FleetState, Prompt, RoutingQuery
from ersim.workload import load_prompt_set
from ersim.workload.tables import read_table
from experiments.route_schema import RouteConfig, SetConfig

Floats = npt.NDArray[np.float64]
COST_WEIGHTS = (0.0, *np.geomspace(0.005, 1.0, 60).tolist(), 3.0)
SHARES = np.linspace(0.0, 1.0, 101)


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


def load_labelled(config: SetConfig) -> list[Prompt]:
    """The set's prompts whose row matches `where`. DataError when none does or a column is missing."""
    if config.prompts.path is not None and config.prompts.path.startswith("None/"):
        raise bad_value("data", f"the folder that holds {config.prompts.path[5:]}: data=FOLDER", None)
    prompts = load_prompt_set(config.prompts).prompts
    if not config.where or config.prompts.path is None:
        return prompts
    table = read_table(config.prompts.path, "set.prompts.path").iloc[: len(prompts)]
    keep = np.ones(len(table), dtype=bool)
    for column, value in config.where.items():
        if column not in table.columns:
            raise DataError(f"set.where names column {column!r}, but {config.prompts.path} has none such")
        keep &= (table[column] == value).to_numpy(dtype=bool)
    if not keep.any():
        raise DataError(f"no row of {config.prompts.path} has {config.where}")
    return [prompt for prompt, kept in zip(prompts, keep, strict=True) if kept]


def experts_of(config: SetConfig, prompts: Sequence[Prompt]) -> list[ExpertState]:
    """One expert per labelled model (two for a threshold set); by domain for a set without labels."""
    models = sorted({name for prompt in prompts for name in prompt.quality})
    if config.strong is not None and config.weak is not None:
        models = [config.weak, config.strong]
    if models:
        return [ExpertState(m, m, (), (), 1, config.prices.get(m), config.prices.get(m)) for m in models]
    domains = sorted({prompt.domain for prompt in prompts})
    return [ExpertState(domain, "expert", (domain,), (), 1) for domain in domains]


def split(prompts: Sequence[Prompt], train: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and judging prompts, split by text; `train` is a share or a number of distinct texts."""
    texts = int(text_groups(prompts).max()) + 1
    if train > 1 and train >= texts:
        raise bad_value("train", f"below the set's {texts} distinct prompts", train)
    share = train / texts if train > 1 else train
    if share >= 1:
        raise bad_value("train", "below 1: labels seen in training cannot judge", train)
    learn, judge = split_prompts(prompts, share, seed)
    return [prompts[i] for i in learn], [prompts[i] for i in judge]


def with_cache(router: RouterConfig, cache: str | None) -> RouterConfig:
    """The router with the embedding cache where it embeds; evaluation sees each text many times."""
    if cache is None or "embedding" not in str(router.params.get("features", "")):
        return router
    params = dict(router.params.get("feature_params") or {})
    params["embedding"] = {"cache": cache, **params.get("embedding", {})}
    return replace(router, params={**router.params, "feature_params": params})


def evaluate(config: RouteConfig) -> Iterator[Outcome]:
    """Yield each router's outcome when its splits are done, the baselines first."""
    prompts = load_labelled(config.set)
    states = experts_of(config.set, prompts)
    train = config.set.train or config.train
    splits = [split(prompts, train, config.seed + n) for n in range(config.seeds)]
    labelled = bool(prompts[0].quality)
    judge = _judge_pair if config.set.strong else _judge_many if labelled else _judge_domains
    if labelled:
        yield from _baselines(config.set, states, splits)
    for name, router in config.set.routers.items():
        outcome = Outcome(name)
        for number, (learn, asked) in enumerate(splits):
            started = time.perf_counter()
            policy = build_policy(
                with_cache(router, config.embedding_cache), states, learn, config.seed + number
            )
            fitted_s = time.perf_counter() - started
            figures, curve = judge(policy, states, learn, asked, outcome)
            outcome.figures.append({**figures, "train_prompts": float(len(learn)), "fit_s": fitted_s})
            if curve is not None:
                outcome.curves.append(curve)
            if number == 0:
                outcome.figures[-1].update(routing_times(policy, asked))
        yield outcome


def _quality(states: Sequence[ExpertState], prompts: Sequence[Prompt]) -> Floats:
    return quality_matrix(prompts, [ExpertProfile.of(state) for state in states], required=True)


def _queries(prompts: Sequence[Prompt]) -> list[RoutingQuery]:
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


def _judge_pair(
    policy: Policy,
    states: Sequence[ExpertState],
    learn: Sequence[Prompt],
    asked: Sequence[Prompt],
    out: Outcome,
) -> tuple[dict[str, float], tuple[Floats, Floats] | None]:
    queries = _queries(asked)
    if isinstance(policy, TwoTier):
        need = policy.need(queries)
    else:
        scores = policy.score(queries)
        need = scores[:, 1] - scores[:, 0]
    return pair_figures(need, _quality(states, asked))


def _judge_many(
    policy: Policy,
    states: Sequence[ExpertState],
    learn: Sequence[Prompt],
    asked: Sequence[Prompt],
    out: Outcome,
) -> tuple[dict[str, float], tuple[Floats, Floats] | None]:
    """Quality against mean price; the best single model is picked on the training labels."""
    queries = _queries(asked)
    predicted = policy.quality(queries) if isinstance(policy, Predictive) else policy.score(queries)
    return many_figures(predicted, _quality(states, learn), _quality(states, asked), states)


def many_figures(
    predicted: Floats, learnt: Floats, quality: Floats, states: Sequence[ExpertState]
) -> tuple[dict[str, float], tuple[Floats, Floats]]:
    """Figures of a quality-minus-price router; prices relative to the best single model's."""
    best = int(learnt.mean(axis=0).argmax())
    curve = ev.cost_curve(predicted, quality, relative_prices(learnt, states), COST_WEIGHTS)
    single = float(quality[:, best].mean())
    figures = {
        "best_single_quality": single,
        "quality": float(quality[np.arange(len(quality)), predicted.argmax(axis=1)].mean()),
        "quality_at_40pct_price": curve.best_within(0.4) or float("nan"),
        "gain_at_40pct_price": (curve.best_within(0.4) or float("nan")) - single,
        "misroute_rate": float((curve_choice(predicted, quality) < quality.max(axis=1)).mean()),
    }
    price = curve.cheapest_with(single)
    if price is not None:
        figures["price_to_match_best_single"] = price
    return figures, (curve.cost, curve.quality)


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


def _judge_domains(
    policy: Policy,
    states: Sequence[ExpertState],
    learn: Sequence[Prompt],
    asked: Sequence[Prompt],
    out: Outcome,
) -> tuple[dict[str, float], tuple[Floats, Floats] | None]:
    """Share of prompts sent to their own domain's expert, and how evenly the load falls."""
    fleet = FleetState(states)
    chosen = np.array([policy.choose(row, fleet).expert for row in policy.score(_queries(asked))])
    served = [states[index].domains[0] for index in chosen]
    truth = [prompt.domain for prompt in asked]
    out.confusion = ev.confusion(truth, served)
    share = np.bincount(chosen, minlength=len(states)) / len(chosen)
    true_share = np.array([truth.count(state.domains[0]) for state in states]) / len(truth)
    figures = {
        "domain_accuracy": float(np.mean([a == b for a, b in zip(truth, served, strict=True)])),
        "load_imbalance": float(share.max() * len(states)),
        "load_imbalance_of_domains": float(true_share.max() * len(states)),
    }
    if isinstance(policy, Cluster):
        figures["clusters"] = float(policy.clustering.count)
        figures["fell_back"] = float(getattr(policy.clustering, "fell_back", False))
    return figures, None


def _baselines(
    config: SetConfig, states: Sequence[ExpertState], splits: Sequence[tuple[list[Prompt], list[Prompt]]]
) -> Iterator[Outcome]:
    """Random and the oracle; the oracle alone is shown the answers it is judged on."""
    random, oracle = Outcome("random"), Outcome("oracle (sees the answers)")
    for learn, asked in splits:
        quality, learnt = _quality(states, asked), _quality(states, learn)
        if config.strong:
            pairs = ((random, np.zeros(len(asked))), (oracle, quality[:, 1] - quality[:, 0]))
            for outcome, need in pairs:
                figures, curve = pair_figures(need, quality)
                outcome.figures.append(figures)
                outcome.curves.append(curve)
            continue
        figures, curve = many_figures(quality, learnt, quality, states)
        oracle.figures.append(figures)
        oracle.curves.append(curve)
        random.figures.append(
            {"quality": float(quality.mean()), "price": float(relative_prices(learnt, states).mean())}
        )
    yield from (random, oracle)


def routing_times(policy: Policy, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Median milliseconds per request at batch 1 and 32, on a copy without caches."""
    served: Policy = pickle.loads(pickle.dumps(policy))
    queries = _queries(prompts[:32])
    served.score(queries[:2])
    single = [_seconds(served, [query]) for query in queries]
    batch = [_seconds(served, queries) / len(queries) for _ in range(3 if sum(single) < 0.5 else 1)]
    return {
        "routing_ms_batch1": 1e3 * float(np.median(single)),
        "routing_ms_batch32": 1e3 * float(np.median(batch)),
    }


def _seconds(policy: Policy, queries: Sequence[RoutingQuery]) -> float:
    """CPU seconds of this thread: equal to wall time on an idle core, and true on a busy machine too."""
    started = time.thread_time()
    policy.score(queries)
    return time.thread_time() - started


def fit_time(policy: Policy, prompts: Sequence[Prompt], repeats: int = 5) -> tuple[float, float]:
    """(base_s, per_char_s) of one decision at batch 1: least squares over the best of `repeats` runs.

    The best run is the one least disturbed by other processes; non-negative coefficients.
    """
    from scipy.optimize import nnls

    chars, seconds = [], []
    for prompt in prompts:
        query = [RoutingQuery(prompt.text)]
        policy.score(query)
        chars.append(min(len(prompt.text), policy.max_chars))
        seconds.append(min(_seconds(policy, query) for _ in range(repeats)))
    x = np.column_stack([np.ones(len(chars)), np.array(chars) / 1e3])
    (base, per_kchar), _ = nnls(x / np.array(seconds)[:, None], np.ones(len(seconds)))
    return float(base), float(per_kchar) / 1e3


def builtin_prompts() -> list[Prompt]:
    """The built-in set, for timing."""
    return load_prompt_set(PromptSetConfig()).prompts
