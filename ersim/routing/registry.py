"""Policies by name: a user's own policy is one class and one config entry.

`router.policy` is a registered name or the dotted path of a `Policy` subclass
(`my_package.my_module.MyPolicy`), which is imported when it is asked for: from what is installed, else
from the working directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ersim.errors import ConfigError, unknown_choice
from ersim.routing.own_code import imported
from ersim.routing.policy import ExpertProfile, Policy, allowed_params, plain

# name -> "module:Class"; modules are imported on demand, so that naming a policy stays cheap.
BUILTIN: Mapping[str, str] = MappingProxyType(
    {
        "round_robin": "ersim.routing.policies.simple:RoundRobin",
        "random": "ersim.routing.policies.simple:Random",
        "fixed": "ersim.routing.policies.simple:Fixed",
        "least_loaded": "ersim.routing.policies.simple:LeastLoaded",
        "best_single": "ersim.routing.policies.simple:BestSingle",
        "cluster": "ersim.routing.policies.cluster:Cluster",
        "threshold": "ersim.routing.policies.threshold:Threshold",
        "prompt_length": "ersim.routing.policies.prompt_length:PromptLength",
        "predictive": "ersim.routing.policies.predictive:Predictive",
        "oracle": "ersim.routing.policies.oracle:Oracle",
        "spill": "ersim.routing.policies.spill:Spill",
    }
)


def policy_names() -> tuple[str, ...]:
    """Names of the policies that come with ersim."""
    return tuple(sorted(BUILTIN))


def policy_class(name: str) -> type[Policy]:
    """The class behind a registered name or a dotted path; ConfigError names the choices."""
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
    elif "." in name:
        module, _, attribute = name.rpartition(".")
    else:
        raise unknown_choice("router.policy", name, [*BUILTIN, "package.module.Class"])
    found = imported(f"{module}.{attribute}", "router.policy")
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ConfigError(f"router.policy {name!r} must be a subclass of ersim.routing.Policy, got {found!r}")
    if "name" not in vars(found):
        found.name = name
    return found


def create_policy(name: str, experts: Sequence[ExpertProfile], params: Mapping[str, Any]) -> Policy:
    """Make an unfitted policy; an unknown parameter is a ConfigError that lists the known ones."""
    found = policy_class(name)
    allowed = allowed_params(found)
    for key in params:
        if key not in allowed:
            raise unknown_choice(
                f"a parameter of router.params for policy {name}", key, allowed or ["(none)"]
            )
    return found(experts, **plain(params))
