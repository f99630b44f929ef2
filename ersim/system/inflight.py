"""A request on its way through the system: what the engine needs, and where it has been."""

from __future__ import annotations

import math

from ersim.engine.request import EngineRequest
from ersim.types import Request


class InFlight(EngineRequest):
    """The engine's request with the system's time stamps; one object per request.

    send_s: the client sends. decided_s: the gateway has chosen. submit_s: arrival at the expert.
    ready_s: the expert's front end hands it to the engine. first_s: the engine's first token.
    expert, replica: indices in the fleet, -1 until chosen. routing_s: the part of the gateway's
    service that the policy took.
    """

    __slots__ = (
        "decided_s",
        "expert",
        "first_s",
        "ready_s",
        "replica",
        "request",
        "routing_s",
        "send_s",
        "submit_s",
    )

    def __init__(self, request: Request, send_s: float) -> None:
        super().__init__(
            request.request_id,
            request.prompt_tokens,
            request.output_tokens,
            request.max_tokens,
            request.priority,
            request.segments,
            request.output_content_id,
            request.block_keys,
        )
        self.request = request
        self.send_s = send_s
        self.decided_s = send_s
        self.submit_s = math.nan
        self.ready_s = math.nan
        self.expert = -1
        self.replica = -1
        self.first_s = -1.0
        self.routing_s = 0.0
