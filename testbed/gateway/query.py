"""What the router may read of an OpenAI request: its text and declared sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ersim.types import RoutingQuery


def _content_text(content: Any) -> str:
    """The text of a chat message's content: a string, or a list of typed parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text", "") for part in content if isinstance(part, Mapping)]
        return "\n".join(part for part in parts if isinstance(part, str) and part)
    return ""


def _chat_text(messages: Any) -> str:
    if not isinstance(messages, list):
        return ""
    users = [m for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
    return "\n".join(_content_text(message.get("content")) for message in users)


def _metadata_text(body: Mapping[str, Any]) -> str:
    metadata = body.get("metadata")
    text = metadata.get("routing_text") if isinstance(metadata, Mapping) else None
    return text if isinstance(text, str) else ""


def routing_query(body: Mapping[str, Any]) -> RoutingQuery:
    """The query of a chat or text completion.

    Chat: the user's messages, one after the other. Text: the prompt. A prompt given as token ids
    has no text; such clients may put it into `metadata.routing_text`.
    """
    max_tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    declared = max_tokens if isinstance(max_tokens, int) else None
    if "messages" in body:
        return RoutingQuery(_chat_text(body["messages"]), None, declared)
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return RoutingQuery(prompt, None, declared)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        return RoutingQuery("\n".join(map(str, prompt)), None, declared)
    tokens = len(prompt) if isinstance(prompt, list) else None
    return RoutingQuery(_metadata_text(body), tokens, declared)
