"""How much latency the gateway adds: the same requests to a stub upstream, directly and through it.

``python -m testbed.gateway_bench [--rate 200] [--seconds 15] [--rounds 15] [--most 45] [--core 0]``.
Gateway, stub and client are processes of their own; where there are several cores, one is the gateway's
alone. Open-loop arrivals at a fixed rate, each answer a stream of a few events; the policy is a warm
tf-idf router over the built-in prompts. Both ways take turns, a round each. A round in which the
hypervisor gave the cores to other machines shows those more than the gateway: while fewer than `--rounds`
were calm, more are made, `--most` in all, and those are judged in which least was stolen; no latency is
looked at. The last line printed is JSON with the added TTFT and E2E latency in milliseconds, over all
requests of these rounds, and how many bars are met; how many of them were calm (`rounds_calm`); the
median round (`round_`); the gateway's own part by its clock; bars and latency by every round made
(`every_round_`); and the share of the wanted time that was stolen in the rounds judged and in all
(`stolen_share`, `every_round_stolen_share`; null, as `rounds_calm`, where a round is too short to tell).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
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
from testbed.foreign_work import MOST_STOLEN
from testbed.gateway.process import GatewayProcess
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings
from testbed.stolen_time import WINDOW_S, StolenShare

EVENTS = 8
WARM_REQUESTS = 20
BARS_MS = {"added_median_ttft_ms": 2.0, "added_p99_ttft_ms": 10.0}  # at 200 requests/s

FloatArray = npt.NDArray[np.float64]


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


async def _send(
    session: aiohttp.ClientSession, url: str, texts: Sequence[str], rate: float, tag: str
) -> FloatArray:
    begin, tasks = time.monotonic(), []
    for index, text in enumerate(texts):
        await asyncio.sleep(max(0.0, begin + index / rate - time.monotonic()))
        tasks.append(asyncio.create_task(_one(session, url, text, f"{tag}-{index}")))
    return np.array(await asyncio.gather(*tasks))


async def drive(
    urls: Mapping[str, str],
    texts: Sequence[str],
    rate: float,
    count: int,
    rounds: int,
    most: int,
    share: Callable[[], Callable[[float], float]] = StolenShare,
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Requests at a fixed rate to each of `urls` in turn, the order turned round every time.

    Until `rounds` rounds were calm or `most` were made. share: makes what tells, at a moment, which share of
    the wanted time was stolen since it was asked before. Returns TTFT and E2E in seconds by name, shape
    (rounds made, count, 2), and that share in each round. Each way has connections of its own, warm ones.
    """
    taken: dict[str, list[FloatArray]] = {name: [] for name in urls}
    shares: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        sessions = {}
        for name, url in urls.items():
            session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
            sessions[name] = await stack.enter_async_context(session)
            for index in range(WARM_REQUESTS):
                await _one(session, url, texts[index % len(texts)], f"{name}-warm-{index}")
        stolen = share()
        stolen(time.monotonic())
        for number in range(most):
            if sum(share <= MOST_STOLEN for share in shares) == rounds:
                break
            asked = [texts[index % len(texts)] for index in range(number * count, (number + 1) * count)]
            for name in list(urls)[:: 1 if number % 2 == 0 else -1]:
                sent = _send(sessions[name], urls[name], asked, rate, f"{name}-{number}")
                taken[name].append(await sent)
            shares.append(stolen(time.monotonic()))
    return {name: np.array(each) for name, each in taken.items()}, np.array(shares)


def calmest(shares: FloatArray, rounds: int) -> npt.NDArray[np.intp]:
    """Which rounds are judged: those in which least was stolen, in their order."""
    return np.sort(np.argsort(shares, kind="stable")[:rounds])


def _wait(url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=1).close()
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    raise SimulationError(f"nothing answers on {url} within 30 s")


def _inside(path: Path, judged: npt.NDArray[np.intp]) -> dict[str, float]:
    """The gateway's own part: arrival to sending upstream, and answer's first bytes to the client.

    judged: numbers of the rounds, which stand in the requests' ids.
    """
    rounds = tuple(f"through-{number}-" for number in judged)
    records = [r for key, r in read_access_log(path).items() if key.startswith(rounds) and r["first_out_s"]]
    added = np.array(
        [r["submitted_s"] - r["received_s"] + r["first_out_s"] - r["first_in_s"] for r in records]
    )
    return {
        "gateway_median_ms": 1e3 * float(np.median(added)),
        "gateway_p99_ms": 1e3 * float(np.quantile(added, 0.99)),
        "routing_median_ms": 1e3 * float(np.median([r["routing_s"] for r in records])),
    }


def bench(rate: float, seconds: float, rounds: int, most: int, core: int | None) -> dict[str, Any]:
    """Run both ways, `seconds` each in `rounds` calm rounds, in `most` if need be, and compare."""
    others = os.sched_getaffinity(0) - {core}
    if core is not None and others:
        os.sched_setaffinity(0, others)  # this process and the stub: one core is the gateway's own
    count = round(rate * seconds / rounds)
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
            with GatewayProcess(settings, folder, [core] if core is not None else None) as gateway:
                urls = {"direct": upstream, "through": gateway.url}
                taken, shares = asyncio.run(drive(urls, texts, rate, count, rounds, most))
            judged = calmest(shares, rounds)
            inside = _inside(folder / "access.jsonl", judged)
        finally:
            stub.terminate()
            stub.wait(10)
    added = _added(taken["direct"][judged], taken["through"][judged])
    every = _added(taken["direct"], taken["through"])
    counted = 2 * (count - 1) / rate >= WINDOW_S
    return {
        "command": "gateway_bench",
        "rate_rps": rate,
        "requests": len(judged) * count,
        "rounds": len(judged),
        "rounds_calm": int((shares[judged] <= MOST_STOLEN).sum()) if counted else None,
        "rounds_made": len(shares),
        "bars_met": _bars_met(added),
        "every_round_bars_met": _bars_met(every),
        **added,
        **inside,
        **{f"every_round_{name}": every[name] for name in BARS_MS},
        "stolen_share": round(float(shares[judged].mean()), 4) if counted else None,
        "every_round_stolen_share": round(float(shares.mean()), 4) if counted else None,
    }


def _added(direct: FloatArray, through: FloatArray) -> dict[str, float]:
    """Differences of quantiles, milliseconds: of all requests together, and median over the rounds.

    Both of shape (rounds, count, 2): TTFT and E2E in seconds.
    """
    figures: dict[str, float] = {}
    for column, name in ((0, "ttft"), (1, "e2e")):
        for quantile, label in ((0.5, "median"), (0.99, "p99")):
            straight = 1e3 * np.quantile(direct[:, :, column], quantile, axis=1)
            routed = 1e3 * np.quantile(through[:, :, column], quantile, axis=1)
            whole = [1e3 * float(np.quantile(each[:, :, column], quantile)) for each in (direct, through)]
            figures[f"added_{label}_{name}_ms"] = round(whole[1] - whole[0], 3)
            figures[f"direct_{label}_{name}_ms"] = round(whole[0], 3)
            figures[f"round_added_{label}_{name}_ms"] = round(float(np.median(routed - straight)), 3)
    return figures


def _bars_met(added: Mapping[str, float]) -> str:
    return f"{sum(added[name] < bar for name, bar in BARS_MS.items())}/{len(BARS_MS)}"


def main() -> int:
    """Entry point; 2 for options that cannot be, 1 for what failed."""
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=positive, default=200.0, help="requests per second")
    parser.add_argument("--seconds", type=positive, default=15.0, help="how long requests are sent, each way")
    parser.add_argument("--rounds", type=whole(1), default=15, help="in how many turns they are sent")
    parser.add_argument("--most", type=whole(1), default=None,
                        help="rounds made at most where time is stolen (three times --rounds)")  # fmt: skip
    parser.add_argument("--core", type=whole(0), default=cores[0] if len(cores) > 1 else None,
                        help="CPU core of the gateway alone; others take the rest")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.core is not None and arguments.core not in cores:
        parser.error(f"argument --core: must be one of {', '.join(map(str, cores))}, got {arguments.core}")
    if round(arguments.rate * arguments.seconds / arguments.rounds) < 1:
        asked = f"{arguments.rate:g} * {arguments.seconds:g} / {arguments.rounds}"
        parser.error(f"arguments --rate, --seconds and --rounds: must make one request a round, got {asked}")
    most = 3 * arguments.rounds if arguments.most is None else arguments.most
    if most < arguments.rounds:
        parser.error(f"argument --most: must be >= --rounds {arguments.rounds}, got {most}")
    try:
        figures = bench(arguments.rate, arguments.seconds, arguments.rounds, most, arguments.core)
        print(json.dumps(figures))
    except (ErsimError, aiohttp.ClientError) as error:
        print(f"gateway_bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
