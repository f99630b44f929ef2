"""How fast the simulator is on this machine, beside the bare SimPy event loop on the same machine.

    python -m experiments.bench [--requests 100000] [--users 1,10,100,1000,10000] [--repeat 2]

Rates are per second of CPU time of this process, so that a busy machine disturbs them least; wall
time is in the table too. Prints two tables and one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import simpy

from ersim.compiled import is_compiled
from ersim.config import (
    EngineSettings,
    ExpertConfig,
    FleetConfig,
    LengthsConfig,
    RouterConfig,
    SimulationConfig,
    WorkloadConfig,
)
from ersim.engine import VLLM_VERSION, Engine, EngineConfig, EngineRequest
from ersim.prepare import Preparations
from ersim.simulation import replicate
from ersim.types import Segment
from ersim.workload.lengths import length_model

EXPERTS = 8
MEAN_PROMPT_TOKENS, MEAN_OUTPUT_TOKENS = 512, 256
TIGHT_BLOCKS = 3400
BATCHES = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Run:
    """One timed simulation."""

    name: str
    users: int
    requests: int
    steps: int
    events: int
    preemptions: int
    hit_rate: float
    cpu_s: float
    wall_s: float

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.cpu_s

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.cpu_s


def simpy_events_per_s(events: int = 300_000) -> float:
    """Bare SimPy: one process that waits `events` times."""

    def ticks(env: simpy.Environment) -> object:
        while True:
            yield env.timeout(1.0)

    env = simpy.Environment()
    env.process(ticks(env))  # type: ignore[arg-type]
    begin = time.process_time()
    env.run(until=events)
    return events / (time.process_time() - begin)


def step_us(running: int, steps: int = 4000) -> float:
    """Microseconds of one engine step that decodes `running` sequences and nothing else."""
    config = EngineConfig(
        max_num_seqs=running, max_model_len=1 << 20, num_blocks=1 << 21, async_scheduling=True
    )
    engine = Engine(config)
    for number in range(running):
        engine.add(EngineRequest(number, 1 + 37 * number % 512, 1 << 18, 1 << 18))
    while engine.start() is not None and (engine.waiting or engine.steady_steps() == 0):
        engine.complete()
        if engine.steady_steps():
            break
    begin = time.process_time()
    for _ in range(steps):
        engine.start()
        engine.complete()
    return (time.process_time() - begin) / steps * 1e6


ENGINE_CASES: dict[str, dict[str, object]] = {
    "plain": {"enable_prefix_caching": False},
    "asynchronous, prefix cache on": {"async_scheduling": True},
    "shared system prompt": {"async_scheduling": True, "system": 208},
    "scarce KV, preemption": {"async_scheduling": True, "num_blocks": 4000},
    "both": {"async_scheduling": True, "system": 208, "num_blocks": 4000},
}
"""The engine alone under 125 closed-loop sequences: its configuration, and the shared prompt's tokens."""


def engine_request_us(settings: dict[str, object], users: int = 125, requests: int = 4000) -> float:
    """Microseconds of the engine alone per request: add, admit, all its steps, finish."""
    options = {"num_blocks": 30_000, **settings}
    system = int(options.pop("system", 0))  # type: ignore[call-overload]
    engine = Engine(EngineConfig(**options))  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    prompts = rng.integers(64, 960, requests)
    outputs = np.clip(rng.exponential(MEAN_OUTPUT_TOKENS, requests), 2, 7000).astype(int)
    queue = []
    for number, (prompt, output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True)):
        segments = (Segment(0, system), Segment(1 + number, prompt)) if system else None
        queue.append(EngineRequest(number, prompt + system, output, output, segments=segments))
    waiting = iter(queue)
    for _ in range(users):
        engine.add(next(waiting))
    begin = time.process_time()
    while engine.start() is not None:
        for _ in engine.complete().finished:
            if (request := next(waiting, None)) is not None:
                engine.add(request)
    return (time.process_time() - begin) / requests * 1e6


def configuration(users: int, requests: int, tight: bool) -> SimulationConfig:
    """Eight 8B experts behind round robin; `tight` adds prefix sharing and scarce KV blocks."""
    lengths = LengthsConfig()
    uniform = np.random.default_rng(0).random((2, 200_000))
    prompt, output = length_model(lengths).draw(uniform[0], uniform[1])
    lengths = replace(
        lengths,
        prompt_scale=MEAN_PROMPT_TOKENS / float(prompt.mean()),
        output_scale=MEAN_OUTPUT_TOKENS / float(output.mean()),
        max_total_tokens=8000,
    )
    engine = EngineSettings(kv_blocks=TIGHT_BLOCKS if tight else None, enable_prefix_caching=tight)
    experts = {
        f"expert{index}": ExpertConfig(model="llama3.1-8b", precision="fp16", engine=engine)
        for index in range(EXPERTS)
    }
    workload = WorkloadConfig(
        requests=requests, think_s=1.0, lengths=lengths, system_prompt_tokens=160 if tight else 0
    )
    return SimulationConfig(
        users=users,
        fleet=FleetConfig("bench", experts=experts),
        workload=workload,
        router=RouterConfig(policy="round_robin"),
    )


def timed(name: str, users: int, requests: int, tight: bool, repeat: int) -> Run:
    """The fastest of `repeat` equal runs; what is loaded once (prompts, calibrations) is not timed."""
    config = configuration(users, requests, tight)
    shared = Preparations()
    experts = [shared.expert(expert, f"fleet.experts.{key}") for key, expert in config.fleet.experts.items()]
    shared.routing(config)
    best: Run | None = None
    for _ in range(repeat):
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        output = replicate(config, shared, experts, 0)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        table = output.table
        run = Run(
            name,
            users,
            len(table),
            output.steps,
            output.events,
            int(table["preemptions"].sum()),
            float(table["cached_tokens"].sum() / max(1, table["prompt_tokens"].sum())),
            cpu,
            wall,
        )
        best = run if best is None or run.cpu_s < best.cpu_s else best
    assert best is not None
    return best


def requests_for(users: int, wanted: int) -> int:
    """As many as wanted; few users, whose requests take many steps each, get 100 requests a head."""
    return wanted if users >= 1000 else min(wanted, max(400, 100 * users))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench")
    parser.add_argument("--users", default="1,10,100,1000,10000")
    parser.add_argument("--requests", type=int, default=100_000, help="for 1,000 users and more")
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args(arguments)
    bare = max(simpy_events_per_s() for _ in range(3))
    state = "compiled" if is_compiled() else "interpreted (make fast compiles it)"
    print(f"hot path: {state}\nbare SimPy: {bare:,.0f} events/s\n")
    flat = {running: round(min(step_us(running) for _ in range(3)), 2) for running in BATCHES}
    print("running sequences   " + "".join(f"{running:>9,}" for running in flat))
    print("engine us per step  " + "".join(f"{value:9.2f}" for value in flat.values()) + "\n")
    counts = [int(users) for users in options.users.split(",")]
    wanted = [(f"{users:,} users", users, requests_for(users, options.requests), False) for users in counts]
    wanted.append(("1,000 users, prefixes, tight KV", 1000, options.requests, True))
    alone = {name: min(engine_request_us(case) for _ in range(3)) for name, case in ENGINE_CASES.items()}
    for name, value in alone.items():
        print(f"engine us per request, {name:32}{value:7.1f}")
    print()
    heads: tuple[tuple[str, int], ...] = (
        ("", 32),
        ("requests", 9),
        ("requests/s", 12),
        ("steps/s", 10),
        ("of SimPy", 10),
    )
    heads += (("wall s", 8), ("preempt", 9), ("hits", 6))
    print("".join(f"{head:>{width}}" for head, width in heads))
    runs = []
    for name, users, requests, tight in wanted:
        run = timed(name, users, requests, tight, options.repeat)
        runs.append(run)
        print(
            f"{name:32}{run.requests:9,}{run.requests_per_s:12,.0f}{run.steps_per_s:10,.0f}"
            f"{run.steps_per_s / bare:10.1%}{run.wall_s:8.2f}{run.preemptions:9,}{run.hit_rate:6.0%}",
            flush=True,
        )
    scale = 1024 if sys.platform != "darwin" else 1
    report = {
        "compiled": is_compiled(),
        "simpy_events_per_s": round(bare),
        "step_us": flat,
        "engine_request_us": {name: round(value, 2) for name, value in alone.items()},
        "flatness": round(max(flat.values()) / min(flat.values()), 3),
        "runs": [
            {
                "name": run.name,
                "users": run.users,
                "requests": run.requests,
                "requests_per_s": round(run.requests_per_s),
                "steps_per_s": round(run.steps_per_s),
                "share_of_simpy": round(run.steps_per_s / bare, 4),
                "preemptions": run.preemptions,
                "hit_rate": round(run.hit_rate, 4),
                "wall_s": round(run.wall_s, 3),
            }
            for run in runs
        ],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
        "vllm": VLLM_VERSION,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
