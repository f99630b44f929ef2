"""Load-aware composition: any policy, but an overloaded first choice spills to the next best.

What a spill may cost is stated beforehand (`max_quality_loss`) and afterwards in the decision's
reason; `ersim.results.quality` adds it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.errors import bad_value, unknown_choice
from ersim.routing.policy import ExpertProfile, Policy, Scores, expert_is_healthy, expert_load, plain
from ersim.types import Decision, FleetState, Prompt, RoutingQuery


class Spill(Policy):
    """The inner policy's choice while its load is below `at_load`, else the best that is less loaded.

    policy, params: the inner policy, as in the config.
    at_load: outstanding requests per slot from which the first choice counts as overloaded.
    max_quality_loss: how much lower the substitute's score may be, in the inner policy's units
        (expected quality, 0 to 1, for policies that learn from labels).
    relief: the substitute's load must be at most this share of the first choice's.
    """

    name = "spill"
    static = False
    trades_quality = True

    def __init__(
        self,
        experts: Sequence[ExpertProfile],
        policy: str = "cluster",
        params: Mapping[str, Any] | None = None,
        at_load: float = 1.0,
        max_quality_loss: float = 0.05,
        relief: float = 0.5,
    ) -> None:
        from ersim.routing.registry import create_policy

        super().__init__(experts)
        self._set(create_policy(policy, experts, params or {}), at_load, max_quality_loss, relief)

    def _set(self, inner: Policy, at_load: float, max_quality_loss: float, relief: float) -> None:
        if not at_load >= 0:
            raise bad_value("router.spill.at_load", ">= 0", at_load)
        if not max_quality_loss >= 0:
            raise bad_value("router.spill.max_quality_loss", ">= 0", max_quality_loss)
        if not 0 <= relief <= 1:
            raise bad_value("router.spill.relief", "in [0, 1]", relief)
        self.inner, self.at_load = inner, at_load
        self.max_quality_loss, self.relief = max_quality_loss, relief
        self.routing_base_s = inner.routing_base_s + 5e-6
        self.routing_per_char_s, self.max_chars = inner.routing_per_char_s, inner.max_chars

    @classmethod
    def around(cls, inner: Policy, settings: Mapping[str, Any]) -> Spill:
        """Wrap a policy that exists already; `settings` are at_load, max_quality_loss and relief."""
        defaults = {"at_load": 1.0, "max_quality_loss": 0.05, "relief": 0.5}
        for key in settings:
            if key not in defaults:
                raise unknown_choice("a key of router.spill", key, defaults)
        wrapped = cls.__new__(cls)
        Policy.__init__(wrapped, inner.profiles)
        wrapped._set(inner, **{**defaults, **plain(settings)})
        return wrapped

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]  # the inner policy's trait
        """Whether the inner policy learns from labels."""
        return self.inner.needs_labels

    @property
    def sees_asked(self) -> bool:  # type: ignore[override]
        """Whether the inner policy is the oracle."""
        return self.inner.sees_asked

    def fit(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Fit the inner policy."""
        self.inner.fit(prompts, seed)

    def reveal(self, prompts: Sequence[Prompt]) -> None:
        """Pass labels on to an oracle."""
        self.inner.reveal(prompts)

    def adjust(self, **settings: Any) -> None:
        """Pass run-time settings on to the inner policy."""
        self.inner.adjust(**settings)

    def score(self, queries: Sequence[RoutingQuery]) -> Scores:
        """The inner policy's scores."""
        return self.inner.score(queries)

    def decide(self, scores: Scores) -> npt.NDArray[np.intp]:
        """What the inner policy would choose without load."""
        return self.inner.decide(scores)

    def choose(self, scores_row: Scores, fleet: FleetState) -> Decision:
        """The inner choice, or the best-scoring expert with enough relief and a bearable loss."""
        first = self.inner.choose(scores_row, fleet)
        load = expert_load(fleet.experts[first.expert])
        if load < self.at_load:
            return first
        least_score = float(scores_row[first.expert]) - self.max_quality_loss
        best, best_score, best_load = -1, least_score, self.relief * load
        for index, expert in enumerate(fleet.experts):
            score = float(scores_row[index])
            if index == first.expert or score < best_score or not expert_is_healthy(expert):
                continue
            other = expert_load(expert)
            if other > self.relief * load or (best >= 0 and score == best_score and other >= best_load):
                continue
            best, best_score, best_load = index, score, other
        if best < 0:
            return first
        loss = max(float(scores_row[first.expert]) - best_score, 0.0)
        return Decision(best, f"spill from {self.experts[first.expert]}: -{loss:.3f}")
