"""What a routing policy is: it scores experts for a query, then chooses one given the fleet's state.

The same object decides in the simulator and in the live gateway. It sees the query's text and
declared sizes and the fleet's visible state; never a domain label, an answer length or a clock.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ersim.errors import ConfigError, bad_value
from ersim.types import Decision, ExpertState, FleetState, Prompt, RoutingQuery

Scores = npt.NDArray[np.float64]

TIE = 1e-9
"""Scores this close are equal."""

HOPELESS = -1e9
"""Score of an expert that a policy never chooses of its own accord (finite, so that scores subtract)."""


@dataclass(frozen=True, slots=True)
class ExpertProfile:
    """What a policy keeps of an expert: everything of `ExpertState` that does not change with load."""

    name: str
    model: str
    domains: tuple[str, ...] = ()
    slots: int = 1
    usd_per_mtok_in: float | None = None
    usd_per_mtok_out: float | None = None

    @classmethod
    def of(cls, state: ExpertState) -> ExpertProfile:
        """Copy the lasting part of a fleet's expert."""
        return cls(
            state.name,
            state.model,
            tuple(state.domains),
            state.slots,
            state.usd_per_mtok_in,
            state.usd_per_mtok_out,
        )


class Policy:
    """Base of all policies: subclass it, override `score` (and `fit` if it learns), register it.

    name: the registry's name, set by `register`.
    static: the decision depends on the query alone, so decisions may be computed once per prompt.
    needs_labels: `fit` needs answer quality in the prompts.
    sees_asked: the policy must be shown the prompts that will be asked, with their labels, by
        `reveal`; only the oracle does so, and only evaluation and simulation call it.
    trades_quality: load may move a request away from the expert that `decide` names, at a loss of
        score that simulations then report.
    routing_base_s, routing_per_char_s: seconds that one decision takes at batch 1, measured
        (docs/routing.md says with which command); `max_chars` bounds what is read of a prompt.
    """

    name: ClassVar[str] = "unnamed"
    static: bool = True
    needs_labels: ClassVar[bool] = False
    sees_asked: ClassVar[bool] = False
    trades_quality: bool = False
    routing_base_s: float = 2e-6
    routing_per_char_s: float = 0.0
    max_chars: int = 20_000

    def __init__(self, experts: Sequence[ExpertProfile]) -> None:
        if not experts:
            raise ConfigError("a routing policy needs at least one expert, got none")
        self.profiles = tuple(experts)
        self.experts = tuple(profile.name for profile in experts)

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Learn from the training prompts (labels and domains included); the default learns nothing."""
        del prompts, seed

    def score(self, queries: Sequence[RoutingQuery]) -> Scores:
        """Preference for each expert, shape (len(queries), experts), higher is better, load-independent.

        Policies that know answer quality score in units of quality (0 to 1). The default is
        indifferent: all zeros.
        """
        return np.zeros((len(queries), len(self.experts)))

    def choose(self, scores_row: Scores, fleet: FleetState) -> Decision:
        """Pick the best expert that has a healthy replica; the lowest index wins a tie."""
        best = int(np.argmax(scores_row))
        if expert_is_healthy(fleet.experts[best]):
            return Decision(best, self.explain(scores_row, best))
        for index in np.argsort(-np.asarray(scores_row), kind="stable"):
            if expert_is_healthy(fleet.experts[int(index)]):
                return Decision(int(index), f"{self.name}: {self.experts[best]} is down")
        return Decision(best, f"{self.name}: every expert is down")

    def decide(self, scores: Scores) -> npt.NDArray[np.intp]:
        """Expert index per row of `scores`: what `choose` picks while every expert is healthy.

        Only meaningful for static policies; lets a simulator decide a whole prompt set at once.
        """
        best: npt.NDArray[np.intp] = np.argmax(scores, axis=1)
        return best

    def turns(self) -> Iterator[int] | None:
        """The experts that successive calls of `choose` name while every replica is healthy.

        Only for a policy that looks neither at the query nor at load (round robin, random); the
        simulator then takes these one after the other. None for all others.
        """
        return None

    def route(self, query: RoutingQuery, fleet: FleetState) -> Decision:
        """Score one query and choose: what the live gateway calls for each request."""
        return self.choose(self.score((query,))[0], fleet)

    def explain(self, scores_row: Scores, chosen: int) -> str:
        """One short ASCII phrase for response headers and logs."""
        return f"{self.name}: score {scores_row[chosen]:.3f}"

    def routing_s(self, chars: int) -> float:
        """Seconds that routing a prompt of `chars` characters takes at batch 1."""
        return self.routing_base_s + self.routing_per_char_s * min(chars, self.max_chars)

    def reveal(self, prompts: Sequence[Prompt]) -> None:
        """Show the labels of the prompts that will be asked; only for policies with `sees_asked`."""
        raise ConfigError(f"router.policy {self.name} must not see the labels of the prompts it is asked")

    def adjust(self, **settings: Any) -> None:
        """Change run-time settings (a threshold) without training; ConfigError if there are none."""
        if settings:
            raise ConfigError(
                f"policy {self.name} has no run-time setting, got {sorted(settings)}; "
                "fit it again, or use it as it is with router=saved (router.params={})"
            )

    def save(self, path: Path | str) -> None:
        """Write the policy to one file; `load_policy` reads it back."""
        from ersim.routing.storage import save_policy

        save_policy(self, Path(path))


def expert_is_healthy(expert: ExpertState) -> bool:
    """Whether any replica accepts requests; an expert without replica states counts as healthy."""
    if not expert.replicas:
        return True
    # A plain loop: this is on the path of every request, where any() costs twice as much.
    for replica in expert.replicas:  # noqa: SIM110
        if replica.healthy:
            return True
    return False


def expert_load(expert: ExpertState) -> float:
    """Outstanding requests (running and waiting) per slot; infinite when no replica is healthy."""
    outstanding, healthy = 0, not expert.replicas
    for replica in expert.replicas:
        outstanding += replica.running + replica.waiting
        healthy = healthy or replica.healthy
    return outstanding / max(expert.slots, 1) if healthy else float("inf")


def least_loaded_of_best(scores_row: Scores, fleet: FleetState) -> int | None:
    """The least loaded of the healthy experts that share the highest score; None if all are down.

    For experts that are worth the same, several with one model; the lowest index wins equal loads.
    """
    best, lowest, highest = None, float("inf"), -np.inf
    for index, expert in enumerate(fleet.experts):
        score = float(scores_row[index])
        if score < highest - TIE:
            continue
        load = expert_load(expert)
        if load < float("inf") and (score > highest + TIE or load < lowest):
            best, lowest, highest = index, load, max(score, highest)
    return best


def allowed_params(policy: type[Policy]) -> tuple[str, ...]:
    """Names of the parameters that `router.params` may set for this policy class."""
    parameters = inspect.signature(policy.__init__).parameters
    return tuple(name for name in parameters if name not in ("self", "experts"))


def expert_index(experts: Sequence[str], name: str, key: str) -> int:
    """Index of the expert called `name`; ConfigError lists the fleet's experts if there is none."""
    if name not in experts:
        raise bad_value(key, f"one of the fleet's experts ({', '.join(experts)})", name)
    return list(experts).index(name)


def plain(value: Any) -> Any:
    """Turn config containers (mappings, sequences) into plain dicts and lists."""
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value
