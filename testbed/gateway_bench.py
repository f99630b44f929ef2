"""How much latency the gateway adds: the same requests to a stub upstream, directly and through it.

``python -m testbed.gateway_bench [--rate 200] [--seconds 15] [--core 0]``. Gateway, stub and client
are processes of their own; where there are several cores, one is the gateway's alone. Open-loop
arrivals at a fixed rate, each answer a stream of a few events; the policy is a warm tf-idf router over
the built-in prompts. The last line printed is JSON with the added TTFT and E2E latency in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt

from ersim.config import PromptSetConfig, RouterConfig
from ersim.errors import ErsimError, SimulationError
from ersim.routing import build_policy
from ersim.types import ExpertState, Prompt
from ersim.workload import load_prompt_set
from testbed.access_log import read_access_log
from testbed.arguments import positive, whole
from testbed.expert_server import ROOT, free_port
from testbed.gateway.process import GatewayProcess
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings

EVENTS = 8


def fitted_policy(prompts: Sequence[Prompt], experts: Sequence[str], path: Path) -> None:
    """Fit the default tf-idf cluster router for these experts and save it."""
    domains = sorted({prompt.domain for prompt in prompts})
    states = [
        ExpertState(name, "stub", tuple(domains[i :: len(experts)]), (), 1024)
        for i, name in enumerate(experts)
    ]
    build_policy(RouterConfig(), states, prompts, 0).save(path)


async def _one(session: aiohttp.ClientSession, url: str, text: str, tag: str) -> tuple[float, float]:
    body = {"model": "auto", "prompt": text, "max_tokens": EVENTS, "stream": True}
    sent = time.monotonic()
    first: float | None = None
    async with session.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": tag}) as answer:
        answer.raise_for_status()
        async for _ in answer.content.iter_any():
            first = first or time.monotonic()
    done = time.monotonic()
    return (first or done) - sent, done - sent


async def drive(url: str, texts: Sequence[str], rate: float, seconds: float, tag: str) -> npt.NDArray[Any]:
    """Requests at a fixed rate; shape (n, 2): TTFT and E2E in seconds."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        for index in range(20):
            await _one(session, url, texts[index % len(texts)], f"{tag}-warm-{index}")
        begin, tasks = time.monotonic(), []
        for index in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + index / rate - time.monotonic()))
            tasks.append(asyncio.create_task(_one(session, url, texts[index % len(texts)], f"{tag}-{index}")))
        return np.array(await asyncio.gather(*tasks))


def _wait(url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=1).close()
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    raise SimulationError(f"nothing answers on {url} within 30 s")


def _inside(path: Path) -> dict[str, float]:
    """The gateway's own part: arrival to sending upstream, and answer's first bytes to the client."""
    records = [r for key, r in read_access_log(path).items() if "-warm-" not in key and r["first_out_s"]]
    added = np.array(
        [r["submitted_s"] - r["received_s"] + r["first_out_s"] - r["first_in_s"] for r in records]
    )
    return {
        "gateway_median_ms": 1e3 * float(np.median(added)),
        "gateway_p99_ms": 1e3 * float(np.quantile(added, 0.99)),
        "routing_median_ms": 1e3 * float(np.median([r["routing_s"] for r in records])),
    }


def bench(rate: float, seconds: float, core: int | None) -> dict[str, Any]:
    """Run both ways and compare."""
    others = os.sched_getaffinity(0) - {core}
    if core is not None and others:
        os.sched_setaffinity(0, others)  # this process and the stub: one core is the gateway's own
    prompts = load_prompt_set(PromptSetConfig()).prompts
    texts = [prompt.text for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        fitted_policy(prompts, ["a", "b"], folder / "policy.bin")
        port = free_port()
        stub = subprocess.Popen([sys.executable, "-m", "testbed.stub_upstream", str(port)], cwd=ROOT)
        try:
            upstream = f"http://127.0.0.1:{port}"
            _wait(upstream + "/health")
            settings = GatewaySettings(
                experts=[ExpertEndpoint(name, [upstream]) for name in ("a", "b")],
                policy_path=str(folder / "policy.bin"),
                port=free_port(),
                access_log=str(folder / "access.jsonl"),
            )
            direct = asyncio.run(drive(upstream, texts, rate, seconds, "direct"))
            with GatewayProcess(settings, folder, [core] if core is not None else None) as gateway:
                through = asyncio.run(drive(gateway.url, texts, rate, seconds, "through"))
            inside = _inside(folder / "access.jsonl")
        finally:
            stub.terminate()
            stub.wait(10)
    return {
        "command": "gateway_bench",
        "rate_rps": rate,
        "requests": len(through),
        **_added(direct, through),
        **inside,
    }


def _added(direct: npt.NDArray[Any], through: npt.NDArray[Any]) -> dict[str, float]:
    """Difference of the two runs' quantiles, milliseconds."""
    figures: dict[str, float] = {}
    for column, name in ((0, "ttft"), (1, "e2e")):
        for quantile, label in ((0.5, "median"), (0.99, "p99")):
            straight = float(np.quantile(direct[:, column], quantile))
            routed = float(np.quantile(through[:, column], quantile))
            figures[f"added_{label}_{name}_ms"] = round(1e3 * (routed - straight), 3)
            figures[f"direct_{label}_{name}_ms"] = round(1e3 * straight, 3)
    return figures


def main() -> int:
    """Entry point; 2 for options that cannot be, 1 for what failed."""
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=positive, default=200.0, help="requests per second")
    parser.add_argument("--seconds", type=positive, default=15.0, help="how long requests are sent, each way")
    parser.add_argument("--core", type=whole(0), default=cores[0] if len(cores) > 1 else None,
                        help="CPU core of the gateway alone; others take the rest")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.core is not None and arguments.core not in cores:
        parser.error(f"argument --core: must be one of {', '.join(map(str, cores))}, got {arguments.core}")
    if arguments.rate * arguments.seconds < 1:
        asked = f"{arguments.rate:g} * {arguments.seconds:g}"
        parser.error(f"arguments --rate and --seconds: must make one request or more, got {asked}")
    try:
        print(json.dumps(bench(arguments.rate, arguments.seconds, arguments.core)))
    except (ErsimError, aiohttp.ClientError) as error:
        print(f"gateway_bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
