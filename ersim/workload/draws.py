"""Draw what requests ask and how long they and their answers are, for whole blocks at once.

The rules, in one place:
- A request asks a prompt of the set, each alike, or by `domain_weights` (a domain's weight is shared by
  its prompts). Only the prompts in `ask` are asked.
- With a fitted length distribution the prompt's own text is a floor: what the drawn length exceeds it by
  is context that the user attached (a document, code, retrieved passages), which the router does not read.
  The traces hold no texts, so nothing says how text and length go together; they are drawn independently.
- With `prompts` lengths the set's own counts hold: estimated from the text where it has none; answers
  that it does not give a length for are drawn as in conversation.
- `max_total_tokens` cuts the answer first to leave at least one token of prompt, then the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ersim.config import LengthsConfig, WorkloadConfig
from ersim.errors import ConfigError, bad_value, unknown_choice
from ersim.workload.lengths import length_model
from ersim.workload.philox import key_of, uniforms
from ersim.workload.prompts import PromptSet

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

REQUEST_STREAM = 0


@dataclass(frozen=True)
class Draws:
    """One block of draws; every array has the shape of the users and rounds asked for, flattened.

    prompt_index, prompt_tokens, output_tokens: the request if it opens a session.
    choice_u: the uniform behind prompt_index. drawn_output_tokens: the answer's length
    where the set gives none.
    continues: whether another turn follows this one. think_s: the pause before this request.
    """

    prompt_index: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    choice_u: Floats
    drawn_output_tokens: Ints
    continues: npt.NDArray[np.bool_]
    think_s: Floats


class Sampler:
    """Draws requests by their coordinates (user, round); the same coordinates give the same request."""

    def __init__(
        self, config: WorkloadConfig, prompts: PromptSet, seed: int, ask: Sequence[int] | None
    ) -> None:
        """Raise ConfigError for prompts, weights or caps that leave nothing to ask."""
        self.prompts = prompts
        self.lengths = config.lengths
        self._key = key_of(seed)
        self._think_s = config.think_s
        self._continue_probability = 1.0 - 1.0 / config.turns
        self.own_lengths = config.lengths.kind == "prompts"
        drawn = LengthsConfig(kind="conversation") if self.own_lengths else config.lengths
        self._model = length_model(drawn)
        self.own_tokens = prompts.own_tokens
        self.known_output_tokens = _known_outputs(prompts)
        self._asked, self._cumulative = _asked_prompts(prompts, ask, config.domain_weights)
        self.room_tokens = _room(config)

    def draw(self, users: Ints, rounds: Ints) -> Draws:
        """Requests of these users in these rounds, which broadcast against each other."""
        choice_u, prompt_u, output_u, continue_u = (
            u.ravel() for u in uniforms(self._key, users, rounds, REQUEST_STREAM)
        )
        index = self.choose(choice_u)
        drawn_prompt, drawn_output = self._model.draw(prompt_u, output_u)
        prompt, output = self._lengths_of(index, drawn_prompt, drawn_output)
        return Draws(
            prompt_index=index,
            prompt_tokens=prompt,
            output_tokens=output,
            choice_u=choice_u,
            drawn_output_tokens=self.scaled(drawn_output),
            continues=continue_u < self._continue_probability,
            think_s=self._thinks(continue_u),
        )

    def choose(self, choice_u: Floats) -> Ints:
        """Prompt index of each uniform."""
        if self._cumulative is None:
            place = (choice_u * len(self._asked)).astype(np.int64)
        else:
            place = np.searchsorted(self._cumulative, choice_u, side="right")
        return np.take(self._asked, place)

    def scaled(self, output: Ints) -> Ints:
        """Answer lengths times `output_scale`, at least 1."""
        if self.lengths.output_scale == 1.0:
            return output
        return np.asarray(np.maximum(np.rint(output * self.lengths.output_scale), 1), np.int64)

    def _scaled_prompts(self, prompt: Ints) -> Ints:
        """Drawn prompt lengths times `prompt_scale`, at least 1."""
        if self.lengths.prompt_scale == 1.0:
            return prompt
        return np.asarray(np.maximum(np.rint(prompt * self.lengths.prompt_scale), 1), np.int64)

    def scaled_known_outputs(self) -> Ints:
        """Scaled answer length by prompt of the set, 0 where the set gives none."""
        known = self.known_output_tokens
        return np.where(known > 0, self.scaled(known), 0)

    def _lengths_of(self, index: Ints, drawn_prompt: Ints, drawn_output: Ints) -> tuple[Ints, Ints]:
        own = self.own_tokens[index]
        output = drawn_output
        if self.own_lengths:
            known = self.known_output_tokens[index]
            prompt, output = own, np.where(known > 0, known, drawn_output)
        elif self.lengths.kind == "constant":
            prompt = drawn_prompt
        else:
            prompt = np.maximum(self._scaled_prompts(drawn_prompt), own)
        return self.cut(prompt, self.scaled(output))

    def cut(self, prompt: Ints, output: Ints) -> tuple[Ints, Ints]:
        """Prompt and output tokens cut to `max_total_tokens`, if there is such a cap."""
        if self.room_tokens is None:
            return prompt, output
        output = np.minimum(output, self.room_tokens - 1)
        return np.minimum(prompt, self.room_tokens - output), output

    def _thinks(self, continue_u: Floats) -> Floats:
        """Exponential pauses from what the uniform has left once it has decided whether a turn follows.

        Given u < p, u / p is uniform and independent of that decision; given u >= p so is (u - p) / (1 - p).
        """
        if self._think_s == 0:
            return np.zeros(len(continue_u))
        p = self._continue_probability
        if p > 0:
            continue_u = np.where(continue_u < p, continue_u / p, (continue_u - p) / (1.0 - p))
        return -self._think_s * np.log(np.maximum(continue_u, 2.0**-33))

    def asked_by_domain(self) -> dict[str, Ints]:
        """The prompts that may be asked, by domain: follow-up turns stay in their session's domain."""
        domains = np.array([self.prompts.prompts[i].domain for i in self._asked])
        return {str(domain): self._asked[domains == domain] for domain in np.unique(domains)}


def _known_outputs(prompts: PromptSet) -> Ints:
    """Answer length by prompt, 0 where the set gives none."""
    return np.array([prompt.output_tokens or 0 for prompt in prompts.prompts], np.int64)


def _asked_prompts(
    prompts: PromptSet, ask: Sequence[int] | None, weights: dict[str, float]
) -> tuple[Ints, Floats | None]:
    """Indices that may be asked and, with weights, their cumulative probabilities (last one infinite)."""
    asked = np.arange(len(prompts.prompts)) if ask is None else np.asarray(ask, np.int64)
    if len(asked) == 0:
        raise ConfigError(f"no prompt of {prompts.name} is left to ask: lower router.train_fraction")
    if asked.min() < 0 or asked.max() >= len(prompts.prompts):
        raise bad_value("ask", f"indices below {len(prompts.prompts)}", int(asked.max()))
    if not weights:
        return asked, None
    for domain in weights:
        if domain not in prompts.domains:
            raise unknown_choice("workload.domain_weights", domain, prompts.domains)
    domains = [prompts.prompts[i].domain for i in asked]
    sizes = {domain: domains.count(domain) for domain in set(domains)}
    each = np.array([weights.get(domain, 0.0) / sizes[domain] for domain in domains])
    if each.sum() <= 0:
        raise bad_value("workload.domain_weights", "positive for a domain that can be asked", dict(weights))
    cumulative = np.cumsum(each / each.sum())
    cumulative[np.flatnonzero(each)[-1] :] = np.inf  # rounding must never choose past the last weight
    return asked, cumulative


def _room(config: WorkloadConfig) -> int | None:
    """Tokens that prompt and answer may have together beside the system prompt; None without a cap."""
    cap = config.lengths.max_total_tokens
    if cap is None:
        return None
    if cap - config.system_prompt_tokens < 2:
        least = config.system_prompt_tokens + 2
        raise bad_value("workload.lengths.max_total_tokens", f">= system_prompt_tokens + 2 ({least})", cap)
    return cap - config.system_prompt_tokens
