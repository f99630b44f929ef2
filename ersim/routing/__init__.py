"""Which expert answers: policies and balancers that serve simulator and live gateway alike."""

from __future__ import annotations

from ersim.routing.balancers import BALANCERS, Balancer, NoHealthyReplica, build_balancer
from ersim.routing.build import build_policy
from ersim.routing.policy import ExpertProfile, Policy
from ersim.routing.registry import create_policy, policy_class, policy_names
from ersim.routing.split import split_prompts
from ersim.routing.storage import load_policy, read_header

__all__ = [
    "BALANCERS",
    "Balancer",
    "ExpertProfile",
    "NoHealthyReplica",
    "Policy",
    "build_balancer",
    "build_policy",
    "create_policy",
    "load_policy",
    "policy_class",
    "policy_names",
    "read_header",
    "split_prompts",
]
