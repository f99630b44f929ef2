"""One request on its way through the gateway: its decision, its clock readings, its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ersim.types import RoutingQuery

AUTO_MODELS = ("", "auto")


@dataclass
class Exchange:
    """Times are monotonic seconds, None for what did not happen.

    path: of the request, which the log shows; target: with its query, as the expert is to get it.
    received: the whole request is read; routed: the policy has decided; submitted: the attempt that
    answered was sent; first_in, first_out: first body bytes from upstream, and handed to the client;
    last_in, last_out: the same of the last ones.
    """

    request_id: str
    path: str
    target: str
    raw: bytes
    body: Mapping[str, Any]
    query: RoutingQuery
    received_s: float
    expert: int = -1
    replica: int = -1
    reason: str = ""
    routing_s: float = 0.0
    queued_s: float = 0.0
    attempts: int = 0
    submitted_s: float | None = None
    first_in_s: float | None = None
    first_out_s: float | None = None
    last_in_s: float | None = None
    last_out_s: float | None = None
    status: int = 0
    error: str | None = None
    tried: set[tuple[int, int]] = field(default_factory=set)  # (expert, replica) that failed

    @property
    def wanted(self) -> str:
        """The model that the client asked for."""
        return str(self.body.get("model") or "")

    @property
    def automatic(self) -> bool:
        """Whether the router may choose the expert."""
        return self.wanted in AUTO_MODELS

    @property
    def inbound_s(self) -> float:
        """Gateway time before the request went upstream, waiting for a slot excluded."""
        return (self.submitted_s or self.received_s) - self.received_s - self.queued_s

    def log_record(self) -> dict[str, Any]:
        """One line of the access log; texts of prompts are never logged."""
        return {
            "id": self.request_id, "path": self.path, "expert": self.expert, "replica": self.replica,
            "status": self.status, "error": self.error, "attempts": self.attempts,
            "received_s": self.received_s, "routing_s": self.routing_s, "queued_s": self.queued_s,
            "submitted_s": self.submitted_s, "first_in_s": self.first_in_s, "first_out_s": self.first_out_s,
            "last_in_s": self.last_in_s, "last_out_s": self.last_out_s,
        }  # fmt: skip
