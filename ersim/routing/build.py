"""From configuration to a policy that is ready to route."""

from __future__ import annotations

from collections.abc import Sequence

from ersim.config import RouterConfig
from ersim.errors import DataError, bad_value
from ersim.routing.policy import ExpertProfile, Policy, plain
from ersim.routing.registry import create_policy
from ersim.routing.storage import load_policy
from ersim.types import ExpertState, Prompt

SAVED = "saved"
"""The name that stands for a policy from a file (conf/router/saved.yaml)."""


def build_policy(
    config: RouterConfig,
    experts: Sequence[ExpertState],
    prompts: Sequence[Prompt],
    seed: int,
    asked: Sequence[Prompt] | None = None,
) -> Policy:
    """Make the policy that `config` describes and fit it on `prompts` (already the training part).

    asked: the prompts that will be asked, labels included. Only a policy with `sees_asked` (the
    oracle, an upper bound and no real router) is shown them.
    With `config.policy_path` the policy is loaded and not fitted; `config.params` may then only
    hold run-time settings that the policy's `adjust` takes (a threshold, a target).
    """
    if config.policy == SAVED and config.policy_path is None:
        raise bad_value("router.policy_path", "the file that ersim-route fit wrote", None)
    profiles = [ExpertProfile.of(expert) for expert in experts]
    if config.policy_path is not None:
        policy = load_policy(config.policy_path, [profile.name for profile in profiles])
        policy.adjust(**plain(config.params))
    else:
        policy = create_policy(config.policy, profiles, config.params)
        if policy.needs_labels and not prompts:
            raise DataError(
                f"router.policy {config.policy} learns from labelled prompts and got none: set "
                "router.train_fraction above 0 or load a fitted one with router.policy_path"
            )
        policy.fit(prompts, seed)
    if policy.sees_asked and asked is not None:
        policy.reveal(asked)
    if config.spill:
        from ersim.routing.policies.spill import Spill

        policy = Spill.around(policy, plain(config.spill))
    return policy
