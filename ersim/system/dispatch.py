"""Which expert and which replica, and how long the gateway takes to find out.

A policy whose decision depends on the prompt alone is asked once per prompt before the run; the
others see the fleet's state at the moment of the decision. Every request is charged its routing
time all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ersim.config import GatewayConfig
from ersim.errors import SimulationError
from ersim.routing import Balancer, Policy
from ersim.system.inflight import InFlight
from ersim.types import FleetState, Prompt, ReplicaState, RoutingQuery

Floats = npt.NDArray[np.float64]


def routing_times_s(config: GatewayConfig, policy: Policy, prompts: Sequence[Prompt]) -> list[float]:
    """Routing time per prompt: the policy's measured time, or what the configuration says instead."""
    if config.routing_s is None and config.routing_per_char_s is None:
        return [policy.routing_s(len(prompt.text)) for prompt in prompts]
    base_s, per_char_s = config.routing_s or 0.0, config.routing_per_char_s or 0.0
    return [base_s + per_char_s * len(prompt.text) for prompt in prompts]


def service_time(config: GatewayConfig, routing_s: Sequence[float]) -> Callable[[InFlight], float]:
    """A worker's time per request: fixed part, part by prompt length, routing."""
    base_s, per_token_s, times_s = config.base_s, config.per_prompt_token_s, list(routing_s)

    def service_s(flight: InFlight) -> float:
        routing = flight.routing_s = times_s[flight.request.prompt_index]
        return base_s + per_token_s * flight.prompt_tokens + routing

    return service_s


def queries(prompts: Sequence[Prompt]) -> list[RoutingQuery]:
    """What the router may know of each prompt."""
    return [RoutingQuery(prompt.text, prompt.prompt_tokens) for prompt in prompts]


def static_decisions(policy: Policy, scores: Floats, fleet: FleetState) -> list[int] | None:
    """The expert of every prompt for a static policy; None for one that looks at the fleet.

    scores: the policy's scores, shape (prompts, experts).
    """
    if not policy.static:
        return None
    return [policy.choose(row, fleet).expert for row in scores]


def decider(
    policy: Policy,
    prompts: Sequence[Prompt],
    fleet: FleetState,
    known: Sequence[int] | None,
    scores: Floats | None = None,
    always_healthy: bool = False,
) -> Callable[[InFlight], int]:
    """The function that names a request's expert; `known` are the decisions made beforehand.

    scores: the policy's scores per prompt if they are at hand; else the policy is asked, once.
    always_healthy: no replica will ever be down, so that `turns` of a policy may be taken.
    """
    count = len(fleet.experts)
    if known is not None:
        decisions = list(known)
        return lambda flight: decisions[flight.request.prompt_index]
    turns = _turns(policy) if always_healthy else None
    if turns is not None:
        return lambda flight: next(turns)
    rows = np.asarray(policy.score(queries(prompts))) if scores is None else scores

    def decide(flight: InFlight) -> int:
        chosen = policy.choose(rows[flight.request.prompt_index], fleet).expert
        if not 0 <= chosen < count:
            raise SimulationError(f"policy {policy.name} chose expert {chosen} of {count}")
        return chosen

    return decide


def _turns(policy: Policy) -> Iterator[int] | None:
    """The policy's `turns`, unless they come from a class whose `choose` a subclass has overridden."""
    for kind in type(policy).__mro__:
        if "choose" in vars(kind):
            return policy.turns() if "turns" in vars(kind) else None
    return None


def picker(balancers: Sequence[Balancer], replicas: Sequence[Sequence[ReplicaState]]) -> Callable[[int], int]:
    """The function that names an expert's replica; each expert has a balancer of its own."""
    only = [row[0] if len(row) == 1 else None for row in replicas]

    def pick(expert: int) -> int:
        single = only[expert]
        if single is not None and single.healthy:
            return 0  # what any balancer would pick
        return balancers[expert].pick(replicas[expert])

    return pick
