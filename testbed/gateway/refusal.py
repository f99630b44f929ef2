"""Answers of the gateway itself to what it cannot forward, in the shape of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web


class Unanswered(Exception):
    """No answer could be begun; carries the status for the client and the kind for the metrics."""

    def __init__(
        self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = dict(headers or {})


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    body = {"error": {"message": message, "type": kind, "code": status}}
    return web.json_response(body, status=status, headers=headers)


def header_text(text: str) -> str:
    """One line of printable ASCII, at most 200 characters: safe as a header's value."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)[:200]
