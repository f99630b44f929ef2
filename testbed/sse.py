"""Counts tokens in an OpenAI-compatible event stream.

One server-sent event may carry several tokens, so events are not tokens: with `return_token_ids`
each choice lists the ids it adds, and those are counted. Without them an event with text counts as
one token, and the final usage block, when the client asked for it, corrects the sum.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

_DATA = b"data: "
_DONE = b"[DONE]"


@dataclass
class TokenStream:
    """Feed it the body's bytes as they come; it tells how many tokens each piece held."""

    token_ids: list[int] = field(default_factory=list)
    counted: int = 0
    usage: dict[str, Any] | None = None
    error: str | None = None
    done: bool = False
    _rest: bytes = b""

    def feed(self, data: bytes) -> int:
        """Take the next bytes of the body; returns the tokens whose events are now complete."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return sum(self._line(line) for line in lines)

    def _line(self, line: bytes) -> int:
        if not line.startswith(_DATA):
            return 0
        payload = line[len(_DATA) :].strip()
        if payload == _DONE:
            self.done = True
            return 0
        try:
            event = json.loads(payload)
        except json.JSONDecodeError:
            self.error = f"event is not JSON: {payload[:80]!r}"
            return 0
        if not isinstance(event, dict):
            self.error = f"event is not a JSON object: {payload[:80]!r}"
            return 0
        return self._event(event)

    def _event(self, event: dict[str, Any]) -> int:
        if event.get("error"):
            self.error = str(event["error"])[:200]
        if event.get("usage"):
            self.usage = event["usage"]
        tokens = 0
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids")
            if ids is not None:
                self.token_ids += ids
                tokens += len(ids)
            elif choice.get("text") or (choice.get("delta") or {}).get("content"):
                tokens += 1
        self.counted += tokens
        return tokens

    @property
    def output_tokens(self) -> int:
        """Tokens of the whole answer: counted by id, or as the usage block says."""
        if not self.token_ids and self.usage:
            return int(self.usage.get("completion_tokens", self.counted))
        return self.counted
