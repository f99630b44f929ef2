"""Token ids for a simulated request's prompt: same content identity, same tokens.

The simulator knows a prompt's length and which stretches it shares with others (`Segment`s). Here
each content identity becomes a reproducible sequence of random token ids, so that a real prefix
cache finds exactly the sharing that the simulator assumes. Answers that later turns quote are not
reproducible (the server makes them up), so the tokens that really came are kept for them.
"""

from __future__ import annotations

import numpy as np

from ersim.types import Request
from testbed.weightless import SPECIAL_WORDS, word

FIRST_ID = len(SPECIAL_WORDS)
_OWN = 1  # stream of prompts that nobody shares
_SHARED = 2  # stream of content identities


class PromptTokens:
    """Makes token ids below `vocab_size`; one seed, one text for every request of a run."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._seed = seed
        self._answers: dict[int, list[int]] = {}

    def _draw(self, stream: int, identity: int, count: int) -> list[int]:
        generator = np.random.default_rng([self._seed, stream, identity])
        ids: list[int] = generator.integers(FIRST_ID, self._vocab_size, size=count).tolist()
        return ids

    def ids(self, request: Request) -> list[int]:
        """The prompt of a request, exactly `prompt_tokens` ids long."""
        if request.segments is None:
            return self._draw(_OWN, request.request_id, request.prompt_tokens)
        ids: list[int] = []
        for segment in request.segments:
            known = self._answers.get(segment.content_id, [])[: segment.tokens]
            ids += known
            if len(known) < segment.tokens:
                ids += self._draw(_SHARED, segment.content_id, segment.tokens)[len(known) :]
        return ids

    def text(self, request: Request) -> str:
        """The same prompt as text for the word-level tokenizer: one word, one token."""
        return " ".join(word(token_id) for token_id in self.ids(request))

    def remember_answer(self, request: Request, token_ids: list[int]) -> None:
        """Keep an answer's tokens for the later turns that will quote it."""
        if request.output_content_id is not None:
            self._answers[request.output_content_id] = token_ids
