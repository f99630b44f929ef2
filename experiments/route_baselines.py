"""What every comparison of routers shows beside them: random, prompt length, best single expert, oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ersim.config import RouterConfig
from experiments.route_judging import (
    Asked,
    Outcome,
    best_single_quality,
    domain_figures,
    label_matrix,
    many_figures,
    pair_figures,
    relative_prices,
)

RANDOM, SINGLE, ORACLE = "random", "best single model", "oracle (sees the answers)"
ONE, KNOWN = "one expert for all", "oracle (sees the domain)"


def with_prompt_length(routers: Mapping[str, RouterConfig]) -> dict[str, RouterConfig]:
    """The set's routers, prompt length in front unless one of them is it."""
    if any(router.policy == "prompt_length" for router in routers.values()):
        return dict(routers)
    return {"prompt_length": RouterConfig(policy="prompt_length"), **routers}


def pair_baselines(splits: Sequence[Asked]) -> Iterator[Outcome]:
    """Random, the strong model alone, and the oracle, which is shown the answers that it is judged on."""
    random, single, oracle = Outcome(RANDOM), Outcome(SINGLE), Outcome(ORACLE)
    for asked in splits:
        quality = label_matrix(asked.states, asked.judge)
        best = best_single_quality(label_matrix(asked.states, asked.learn), quality)
        single.figures.append({"quality": best})
        for outcome, need in ((random, np.zeros(len(quality))), (oracle, quality[:, 1] - quality[:, 0])):
            figures, curve = pair_figures(need, quality)
            outcome.figures.append(figures)
            outcome.curves.append(curve)
    yield from (random, single, oracle)


def many_baselines(splits: Sequence[Asked]) -> Iterator[Outcome]:
    """A random model, the one that is best on the training labels, and the oracle."""
    random, single, oracle = Outcome(RANDOM), Outcome(SINGLE), Outcome(ORACLE)
    for asked in splits:
        quality, learnt = label_matrix(asked.states, asked.judge), label_matrix(asked.states, asked.learn)
        figures, curve = many_figures(quality, learnt, quality, asked.states)
        oracle.figures.append(figures)
        oracle.curves.append(curve)
        price = float(relative_prices(learnt, asked.states).mean())
        random.figures.append({"quality": float(quality.mean()), "price": price})
        single.figures.append({"quality": best_single_quality(learnt, quality), "price": 1.0})
    yield from (random, single, oracle)


def domain_baselines(splits: Sequence[Asked]) -> Iterator[Outcome]:
    """Any expert at random, one expert for everything (the training set's largest domain), the right one."""
    random, single, oracle = Outcome(RANDOM), Outcome(ONE), Outcome(KNOWN)
    for asked in splits:
        domains = [state.domains[0] for state in asked.states]
        right = np.array([domains.index(prompt.domain) for prompt in asked.judge])
        learnt = [prompt.domain for prompt in asked.learn]
        largest = int(np.argmax([learnt.count(domain) for domain in domains]))
        drawn = np.random.default_rng([asked.seed, 0x5EED]).integers(len(domains), size=len(right))
        for outcome, chosen in ((random, drawn), (single, np.full(len(right), largest)), (oracle, right)):
            outcome.figures.append(domain_figures(chosen, asked.states, asked.judge))
    yield from (random, single, oracle)
