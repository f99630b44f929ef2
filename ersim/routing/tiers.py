"""Two tiers of experts, strong and weak, for policies that only ask which of the two is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ersim.errors import ConfigError, bad_value
from ersim.routing.labels import quality_matrix
from ersim.routing.policy import ExpertProfile
from ersim.types import Prompt

Tier = tuple[int, ...]


def mean_price(profile: ExpertProfile) -> float | None:
    """USD per million tokens, the mean of input and output price; None when the fleet has none."""
    prices = [price for price in (profile.usd_per_mtok_in, profile.usd_per_mtok_out) if price is not None]
    return sum(prices) / len(prices) if prices else None


def named_tier(profiles: Sequence[ExpertProfile], name: str, key: str) -> Tier:
    """Indices of the experts called `name`, or else of all whose model is `name`."""
    for attribute in ("name", "model"):
        found = tuple(i for i, profile in enumerate(profiles) if getattr(profile, attribute) == name)
        if found:
            return found
    choices = dict.fromkeys([p.name for p in profiles] + [p.model for p in profiles])
    raise bad_value(key, f"an expert or a model of the fleet ({', '.join(choices)})", name)


def find_tiers(
    profiles: Sequence[ExpertProfile], strong: str | None, weak: str | None, prompts: Sequence[Prompt]
) -> tuple[Tier, Tier]:
    """Indices of the strong and of the weak experts.

    What is not named is found: strong is the model with the best mean quality on the training
    prompts, weak the cheapest other one (by price, else by mean quality). Without labels, prices
    decide alone. ConfigError when nothing tells the models apart.
    """
    models = list(dict.fromkeys(profile.model for profile in profiles))
    if (strong is None or weak is None) and len(models) < 2:
        raise ConfigError(
            f"a two-tier policy needs two different models in the fleet, got only {models[0]}: choose "
            "another fleet, or name experts with router.params.strong and router.params.weak"
        )
    if strong is not None:
        strong_tier = named_tier(profiles, strong, "router.params.strong")
    else:
        left = None if weak is None else profiles[named_tier(profiles, weak, "router.params.weak")[0]].model
        strong_tier = _of_model(profiles, _extreme(profiles, models, prompts, exclude=left, dearest=True))
    if weak is not None:
        weak_tier = named_tier(profiles, weak, "router.params.weak")
    else:
        left = profiles[strong_tier[0]].model
        weak_tier = _of_model(profiles, _extreme(profiles, models, prompts, exclude=left, dearest=False))
    if set(strong_tier) & set(weak_tier):
        raise bad_value("router.params.weak", "different from router.params.strong", weak)
    return strong_tier, weak_tier


def _of_model(profiles: Sequence[ExpertProfile], model: str) -> Tier:
    return tuple(index for index, profile in enumerate(profiles) if profile.model == model)


def _extreme(
    profiles: Sequence[ExpertProfile],
    models: Sequence[str],
    prompts: Sequence[Prompt],
    exclude: str | None,
    dearest: bool,
) -> str:
    """The best (dearest) or cheapest (worst) model; quality leads for the best, price for the cheapest."""
    first_of = {model: next(p for p in profiles if p.model == model) for model in models if model != exclude}
    price = {model: mean_price(profile) for model, profile in first_of.items()}
    quality = quality_matrix(prompts, list(first_of.values()))
    known = len(prompts) > 0 and not np.isnan(quality).all(axis=0).any()
    mean = dict(zip(first_of, np.nanmean(quality, axis=0).tolist(), strict=True)) if known else {}
    priced = {model: value for model, value in price.items() if value is not None}
    complete = len(priced) == len(price)
    if dearest and (mean or complete):
        table = mean or priced
        return max(table, key=lambda model: table[model])
    if complete or mean:
        table = priced if complete else mean
        return min(table, key=lambda model: table[model])
    if len(first_of) == 1:
        return next(iter(first_of))
    raise ConfigError(
        "neither prices nor answer quality tell which model is strong: set router.params.strong and "
        "router.params.weak (models: " + ", ".join(models) + ")"
    )
