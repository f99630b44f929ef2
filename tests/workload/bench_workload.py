"""Speed of request generation, by hand: `python tests/workload/bench_workload.py`.

Prints CPU microseconds a request (the best of several slices of a long run, pause included) beside the cost
of constructing one `Request`, the floor, and memory for a million requests; ends with one line of JSON.
"""

from __future__ import annotations

import json
import resource
import time
import timeit

from ersim.config import LengthsConfig, PromptSetConfig, WorkloadConfig
from ersim.types import Request
from ersim.workload import Workload, build_workload, load_prompt_set

CASES = {
    "single turn": WorkloadConfig(),
    "system prompt": WorkloadConfig(system_prompt_tokens=200),
    "own lengths": WorkloadConfig(lengths=LengthsConfig(kind="prompts")),
    "sessions of 4 turns": WorkloadConfig(turns=4.0),
}
SLICE = 20_000


def closed_us(workload: Workload, users: int, slices: int) -> float:
    """Best microseconds a request over the slices."""
    best = float("inf")
    for _ in range(slices):
        rounds = max(1, SLICE // users)
        start = time.process_time()
        for _ in range(rounds):
            for user in range(users):
                workload.think_s(user)
                workload.next_request(user)
        best = min(best, (time.process_time() - start) / (rounds * users))
    return best * 1e6


def open_us(config: WorkloadConfig) -> float:
    """Microseconds a request of 100,000 Poisson arrivals."""
    workload = build_workload(config, load_prompt_set(PromptSetConfig()), 1, 0)
    start = time.process_time()
    count = sum(1 for _ in workload.arrivals())
    return (time.process_time() - start) / count * 1e6


def main() -> dict[str, float]:
    prompts = load_prompt_set(PromptSetConfig())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    closed_us(build_workload(WorkloadConfig(), prompts, 1_000, 0), 1_000, 1_000_000 // SLICE)
    extra_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    construct = min(
        timeit.repeat(
            lambda: Request(1, 2, 3, 4, 5, 6, 0, 7, 0, None), number=20_000, repeat=9, timer=time.process_time
        )
    )
    figures = {"construct_us": construct / 20_000 * 1e6, "million_requests_extra_mb": extra_mb}
    for name, config in CASES.items():
        for users in (1, 100, 1_000, 10_000):
            key = f"{name}, {users} users"
            figures[key] = closed_us(build_workload(config, prompts, users, 0), users, 5)
    poisson = WorkloadConfig(arrivals="poisson", rate_rps=50.0, requests=100_000)
    figures["poisson"] = open_us(poisson)
    for name, value in figures.items():
        print(f"{value:8.2f}  {name}")
    return figures


if __name__ == "__main__":
    print(json.dumps({"workload_us_per_request": main()}))
