"""Who asks what, and when: prompt sets, length distributions, closed-loop users, arrivals, traces."""

from ersim.workload.base import Workload
from ersim.workload.build import build_workload
from ersim.workload.lengths import length_model
from ersim.workload.prompts import PromptSet, estimate_tokens, load_prompt_set
from ersim.workload.replay import ReplayWorkload
from ersim.workload.traces import Trace, read_trace

__all__ = [
    "PromptSet",
    "ReplayWorkload",
    "Trace",
    "Workload",
    "build_workload",
    "estimate_tokens",
    "length_model",
    "load_prompt_set",
    "read_trace",
]
