"""Simulates one published case with the whole system, and takes its figures as they were measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from ersim.config import FleetConfig, GatewayConfig, RouterConfig, SimulationConfig, UncertaintyConfig
from ersim.errors import SimulationError
from ersim.results.records import COMPLETED
from ersim.routing import build_policy
from ersim.steptime import ExpertModel
from ersim.system import System
from ersim.types import ExpertState, Prompt, StepTime
from experiments.published_runs import Case, make_workload, request_count

FloatArray = npt.NDArray[np.float64]


def simulate_case(
    case: Case, expert: ExpertModel, step_time: StepTime, frontend: Mapping[str, float], seed: int
) -> pd.DataFrame:
    """One row per request of one replication, with `queued_s`; SimulationError when one did not finish.

    frontend: seconds the API server adds (request_s, per_prompt_token_s); nothing where TTFT was
    measured from the engine's queue.
    """
    front = {} if case.ttft_from_queue else frontend
    workload = make_workload(case, seed)
    config = SimulationConfig(
        users=case.users,
        seed=seed,
        fleet=FleetConfig(name=case.run, experts={"expert": case.expert}),
        router=RouterConfig(policy="fixed"),
        gateway=GatewayConfig(
            workers=None,
            base_s=front.get("request_s", 0.0),
            per_prompt_token_s=front.get("per_prompt_token_s", 0.0),
            routing_s=0.0,
            routing_per_char_s=0.0,
            network_s=0.0,
            backend_network_s=0.0,
        ),
        uncertainty=UncertaintyConfig(step_noise=True),
    )
    config.workload.requests = request_count(case, workload)
    prompts = [Prompt("0", "published", "published")]
    policy = build_policy(config.router, [ExpertState("expert", case.expert.model, (), (), 0)], prompts, seed)
    output = System(config, [expert], [step_time], prompts, workload, policy, [0], seed).run()
    log = output.step_logs[0][0]
    requests = output.requests
    requests["queued_s"] = taken_in_s(
        requests.submit_s.to_numpy(), log.column("end_s"), log.column("duration_s")
    )
    unfinished = requests[requests.status != COMPLETED]
    if len(unfinished):
        why = unfinished.iloc[0]["error"]
        raise SimulationError(f"{case.run} {case.row}: {len(unfinished)} requests did not finish: {why}")
    return requests


def taken_in_s(submit_s: FloatArray, end_s: FloatArray, duration_s: FloatArray) -> FloatArray:
    """When the engine takes requests in, which vLLM stamps as queued: not before the running step's end.

    Its core reads new requests only between steps. submit_s: (n,); end_s, duration_s: (steps,), in order.
    """
    if not len(end_s):
        return submit_s
    index = np.searchsorted(end_s, submit_s)
    running = index < len(end_s)
    step = np.minimum(index, len(end_s) - 1)
    running &= end_s[step] - duration_s[step] < submit_s
    return np.where(running, end_s[step], submit_s)


def figures(requests: pd.DataFrame, case: Case, group: str) -> dict[str, float]:
    """The case's figures in milliseconds, over the requests of one stage or all of them.

    Mean, median, p90, p95 and p99 of TTFT, TPOT (of answers of several tokens) and E2E.
    """
    session = case.sessions.get(group)
    rows = requests if session is None else requests[requests.session == session]
    start = rows.queued_s if case.ttft_from_queue else rows.send_s
    ttft = 1e3 * (rows.first_token_s - start).to_numpy()
    e2el = 1e3 * (rows.last_token_s - start).to_numpy()
    several = rows.output_tokens.to_numpy() > 1
    tpot = (e2el - ttft)[several] / (rows.output_tokens.to_numpy()[several] - 1)
    found: dict[str, float] = {}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("e2el", e2el)):
        if len(values):
            found[f"mean_{name}_ms"] = float(values.mean())
            found[f"median_{name}_ms"] = float(np.median(values))
            for percent in (90, 95, 99):
                found[f"p{percent}_{name}_ms"] = float(np.quantile(values, percent / 100))
    return found
