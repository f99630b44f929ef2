"""Compare routers on a labelled set: several splits by text, train on one side, judge on the other."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ersim.config import PromptSetConfig, RouterConfig
from ersim.errors import ConfigError, DataError, bad_value
from ersim.routing import Policy, build_policy, split_prompts
from ersim.routing.features.embedding import model_folder
from ersim.routing.split import text_groups
from ersim.types import ExpertState, Prompt, RoutingQuery
from ersim.workload import load_prompt_set
from ersim.workload.tables import read_table
from experiments.route_baselines import domain_baselines, many_baselines, pair_baselines, with_prompt_length
from experiments.route_judging import (
    Asked,
    Fit,
    Outcome,
    judge_domains,
    judge_many,
    judge_pair,
    label_matrix,
    queries_of,
)
from experiments.route_schema import RouteConfig, SetConfig

Judge = Callable[[Policy, Asked, Outcome], dict[str, float]]


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


def usable_prompts(config: SetConfig) -> tuple[list[Prompt], int]:
    """The set's prompts with a label of every expert compared, and how many lack one.

    All prompts of a set without any labels. DataError when an expert, or every prompt, lacks one.
    """
    prompts = load_labelled(config)
    if not _labelled(config, prompts):
        return prompts, 0
    states = experts_of(config, prompts)
    known: list[bool] = np.isfinite(label_matrix(states, prompts)).all(axis=1).ravel().tolist()
    if not any(known):
        raise DataError("no prompt of the set has labels of all of: " + ", ".join(s.name for s in states))
    used = [prompt for prompt, keep in zip(prompts, known, strict=True) if keep]
    return used, len(prompts) - len(used)


def _labelled(config: SetConfig, prompts: Sequence[Prompt]) -> bool:
    return config.strong is not None or any(prompt.quality for prompt in prompts)


def experts_of(config: SetConfig, prompts: Sequence[Prompt]) -> list[ExpertState]:
    """One expert per labelled model (two for a threshold set); by domain for a set without labels."""
    if (config.strong is None) != (config.weak is None):
        missing = "weak" if config.weak is None else "strong"
        raise ConfigError(f"set.{missing} is missing: a threshold set names both set.strong and set.weak")
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


def without_weights(routers: Mapping[str, RouterConfig]) -> list[str]:
    """Names of the routers that embed prompts while the embedding's weights are not installed."""
    try:
        model_folder()
    except ConfigError:
        return [n for n, r in routers.items() if "embedding" in str(r.params.get("features", "")).split("+")]
    return []


def with_cache(router: RouterConfig, cache: str | None) -> RouterConfig:
    """The router with the embedding cache where it embeds; evaluation sees each text many times."""
    if cache is None or "embedding" not in str(router.params.get("features", "")):
        return router
    params = dict(router.params.get("feature_params") or {})
    params["embedding"] = {"cache": cache, **params.get("embedding", {})}
    return replace(router, params={**router.params, "feature_params": params})


def evaluate(config: RouteConfig, prompts: Sequence[Prompt] | None = None) -> Iterator[Outcome]:
    """Yield each router's outcome when its splits are done, the baselines first.

    prompts: what `usable_prompts` gave; loaded here when None.
    """
    prompts = usable_prompts(config.set)[0] if prompts is None else prompts
    states = experts_of(config.set, prompts)
    train = config.set.train or config.train
    halves = [split(prompts, train, config.seed + n) for n in range(config.seeds)]

    def splits(router: RouterConfig) -> list[Asked]:
        cached = with_cache(router, config.embedding_cache)
        return [
            Asked(states, learn, judge, _fit(cached, states, config.seed + n), config.seed + n)
            for n, (learn, judge) in enumerate(halves)
        ]

    routers, judge, baselines = config.set.routers, judge_domains, domain_baselines
    if _labelled(config.set, prompts):
        routers = with_prompt_length(routers)
        judge, baselines = (judge_pair, pair_baselines) if config.set.strong else (judge_many, many_baselines)
    yield from (shown for shown in baselines(splits(RouterConfig())) if shown.router not in routers)
    for name, router in routers.items():
        yield _judged(name, splits(router), judge)


def _fit(router: RouterConfig, states: Sequence[ExpertState], seed: int) -> Fit:
    return lambda learn: build_policy(router, states, learn, seed)


def _judged(name: str, splits: Sequence[Asked], judge: Judge) -> Outcome:
    """One router over all splits; routing times from the first."""
    outcome = Outcome(name)
    for number, asked in enumerate(splits):
        started = time.perf_counter()
        policy = asked.fit(asked.learn)
        fitted_s = time.perf_counter() - started
        figures = judge(policy, asked, outcome)
        outcome.figures.append({**figures, "train_prompts": float(len(asked.learn)), "fit_s": fitted_s})
        if number == 0:
            outcome.figures[-1].update(routing_times(policy, asked.judge))
    return outcome


def routing_times(policy: Policy, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Median milliseconds per request at batch 1 and 32, on a copy without caches."""
    served: Policy = pickle.loads(pickle.dumps(policy))
    queries = queries_of(prompts[:32])
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
