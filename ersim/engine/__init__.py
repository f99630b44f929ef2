"""WHAT runs in a step: vLLM's scheduler and KV cache as pure state, without clock or processes.

`Engine` decides as vLLM's V1 scheduler of release `VLLM_VERSION` decides, step by step, with work
per step that does not grow with the batch. It knows requests by their lengths and content
identities only, and time not at all: `ersim.system` asks `start` what runs, lets that step take the
time that `ersim.steptime` says, and calls `complete`.
"""

from ersim.engine.config import VLLM_VERSION, EngineConfig
from ersim.engine.engine import Engine
from ersim.engine.errors import LivelockError, RejectedRequest
from ersim.engine.request import EngineRequest
from ersim.engine.step import Step

__all__ = [
    "VLLM_VERSION",
    "Engine",
    "EngineConfig",
    "EngineRequest",
    "LivelockError",
    "RejectedRequest",
    "Step",
]
