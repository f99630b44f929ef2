"""How the engine says no: requests that vLLM's server refuses, and queues that can never move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ersim.errors import ErsimError, SimulationError

if TYPE_CHECKING:
    from ersim.engine.request import EngineRequest


class RejectedRequest(ErsimError, ValueError):
    """A request that vLLM's server answers with HTTP 400; `reason` is short and countable."""

    def __init__(self, request: EngineRequest, reason: str, detail: str) -> None:
        super().__init__(f"request {request.request_id} rejected: {detail}")
        self.request = request
        self.reason = reason


class LivelockError(SimulationError):
    """Nothing runs and the head of the queue can never be admitted: vLLM would wait for ever.

    `request` is that head, `needed_blocks` what it asks for and `usable_blocks` all there are.
    """

    def __init__(self, request: EngineRequest, needed_blocks: int, usable_blocks: int, why: str) -> None:
        super().__init__(
            f"request {request.request_id} can never be scheduled: {why} "
            f"(needs {needed_blocks} KV blocks, the replica has {usable_blocks}); raise kv_blocks, "
            "lower max_model_len, or drop the request"
        )
        self.request = request
        self.needed_blocks = needed_blocks
        self.usable_blocks = usable_blocks
