"""Make requests of draws: system prompt, the turns of a session, and what their content is.

A later turn's prompt holds the whole session so far, answers included, so that the engine's prefix cache
can find it. Its own part is the text of the prompt asked (documents are attached in the first turn), from
the domain that the session began in. A session that would outgrow `max_total_tokens` gives way to a new one.

Content ids: 0 the system prompt; negative the text of a prompt of the set, which is the same whenever it is
asked, used when lengths are the set's own; positive what this request alone adds. With fitted lengths a
repeated prompt is no repeated content: the few hundred prompts stand for a population that never repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ersim.config import WorkloadConfig
from ersim.types import Request, Segment
from ersim.workload.draws import Sampler

SYSTEM_PROMPT = 0


class Session:
    """What a later turn starts from: the segments so far, answers included, and their tokens."""

    __slots__ = ("segments", "session_id", "tokens", "topic", "turn")

    def __init__(self, session_id: int, topic: Sequence[int]) -> None:
        self.session_id = session_id
        self.topic = topic
        self.turn = 0
        self.segments: tuple[Segment, ...] = ()
        self.tokens = 0


class RequestMaker:
    """Turns draws into requests; holds no state of its own, sessions are passed in and out."""

    def __init__(self, config: WorkloadConfig, sampler: Sampler, set_texts_only: bool | None = None) -> None:
        """set_texts_only: a prompt is the set's text and nothing else; None: as `lengths.kind` says."""
        self._factor = config.lengths.max_tokens_factor
        self._cap = config.lengths.max_total_tokens
        system = config.system_prompt_tokens
        self._head = (Segment(SYSTEM_PROMPT, system),) if system else ()
        self._system_tokens = system
        self._constant = config.lengths.prompt_tokens if config.lengths.kind == "constant" else None
        self._own_lengths = sampler.own_lengths
        self._own_tokens: list[int] = sampler.own_tokens.tolist()
        self._known_outputs: list[int] = sampler.scaled_known_outputs().tolist()
        self._set_texts_only = sampler.own_lengths if set_texts_only is None else set_texts_only
        self._unshared = not (system or self._set_texts_only)
        self.bare = self._unshared and self._factor == 1.0
        self._topics: list[Sequence[int]] = []
        if config.turns > 1:
            by_domain = {domain: rows.tolist() for domain, rows in sampler.asked_by_domain().items()}
            self._topics = [by_domain.get(prompt.domain, ()) for prompt in sampler.prompts.prompts]

    def declared(self, output_tokens: int) -> int:
        """The `max_tokens` that the client sends with a request of this answer length."""
        return output_tokens if self._factor == 1.0 else math.ceil(output_tokens * self._factor)

    def opening(self, request_id: int, user: int, index: int, prompt: int, output: int) -> Request:
        """A request without history and without a later turn."""
        segments = None
        if not self._unshared:
            segments = (*self._head, Segment(self._content(request_id, index), prompt))
        max_tokens = output if self._factor == 1.0 else self.declared(output)
        prompt += self._system_tokens
        # by position: by keyword costs twice as much, and this is made once a request
        return Request(request_id, user, index, prompt, output, max_tokens, 0, request_id, 0, segments)

    def turn(
        self,
        session: Session | None,
        request_id: int,
        user: int | None,
        index: int,
        prompt: int,
        output: int,
        choice_u: float,
        drawn_output: int,
        continues: bool,
    ) -> tuple[Request, Session | None]:
        """The next turn of `session` (None opens one), and the session if another turn follows.

        index, prompt and output are those of an opening turn. user None takes the session's id.
        """
        if session is not None:
            asked = session.topic[int(choice_u * len(session.topic))]
            own = self._own_tokens[asked] if self._constant is None else self._constant
            known = self._known_outputs[asked] if self._own_lengths else 0
            answer = known or drawn_output
            if self._cap is None or session.tokens + own + answer <= self._cap:
                index, prompt, output = asked, own, answer
            else:
                session = None
        if session is None:
            session = Session(request_id, self._topics[index])
            session.segments, session.tokens = self._head, self._system_tokens
        segments = (*session.segments, Segment(self._content(request_id, index), prompt))
        tokens = session.tokens + prompt
        answer_id = 2 * request_id + 2 if continues else None
        name = session.session_id
        asker = name if user is None else user
        declared = self.declared(output)
        request = Request(
            request_id, asker, index, tokens, output, declared, 0, name, session.turn, segments, answer_id
        )
        if answer_id is None:
            return request, None
        session.turn += 1
        session.segments = (*segments, Segment(answer_id, output))
        session.tokens = tokens + output
        return request, session

    def _content(self, request_id: int, index: int) -> int:
        return -1 - index if self._set_texts_only else 2 * request_id + 1
