"""All figures of one replication: rates and latencies, occupancy, cost, energy, and what routing did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ersim.config import FleetConfig, SimulationConfig
from ersim.prepare import Routing
from ersim.results import Window, breakdown, in_window, quality, summarise
from ersim.results.records import COMPLETED, RequestTable
from ersim.steptime import ExpertModel
from ersim.system import RunOutput
from ersim.types import Prompt


def run_figures(
    config: SimulationConfig,
    experts: Sequence[ExpertModel],
    prompts: Sequence[Prompt],
    output: RunOutput,
    window: Window,
    routing: Routing,
) -> dict[str, Any]:
    """All figures of one replication; `routing` says what the policy preferred."""
    objective = config.objective
    figures = summarise(
        output.table,
        output.gaps,
        window,
        ttft_objective_s=objective.ttft_s,
        tpot_objective_s=objective.tpot_s,
    )
    figures.update(_cost(config, experts, figures))
    per_expert = breakdown(output.table, window, "expert")
    for index, name in enumerate(config.fleet.experts):
        block = per_expert.setdefault(name, {"completed": 0, "share": 0.0})
        block.update(_occupancy(experts[index], output, index, window))
        block["steps_beyond_calibration"] = output.beyond[index]
    energy = _energy_joules(experts, per_expert, config.fleet, window)
    tokens = (figures["output_throughput"] or 0.0) * window.duration_s
    figures["joules_per_output_token"] = energy / tokens if energy is not None and tokens else None
    figures.update(_routing(config, experts, prompts, in_window(output.table, window), figures))
    figures.update(_price_of_load(routing, config, in_window(output.table, window)))
    figures["per_expert"] = per_expert
    figures["per_domain"] = breakdown(output.table, window, "domain")
    return figures


def _occupancy(expert: ExpertModel, output: RunOutput, index: int, window: Window) -> dict[str, float]:
    """Busy share, batch size and KV use of an expert's replicas, averaged over them."""
    logs = output.step_logs[index]
    per_replica = [log.occupancy(window.start_s, window.end_s) for log in logs]
    usable = max(1, expert.engine.kv_blocks - 1)
    mean = {key: float(np.mean([row[key] for row in per_replica])) for key in per_replica[0]}
    return {
        "busy_share": mean["busy_share"],
        "tokens_per_step": mean["tokens_per_step"],
        "mean_kv_used_fraction": mean["mean_kv_blocks"] / usable,
        "peak_kv_used_fraction": max(row["peak_kv_blocks"] for row in per_replica) / usable,
    }


def _cost(
    config: SimulationConfig, experts: Sequence[ExpertModel], figures: Mapping[str, Any]
) -> dict[str, Any]:
    """GPUs, their price, and what a million output tokens cost at this load."""
    counts = [expert.replicas for expert in config.fleet.experts.values()]
    gpus = sum(model.gpus_per_replica * count for model, count in zip(experts, counts, strict=True))
    prices = [model.usd_per_hour for model in experts]
    if any(price is None for price in prices):
        return {"gpus": gpus, "usd_per_hour": None, "usd_per_mtok_output": None}
    usd_per_hour = sum(price * count for price, count in zip(prices, counts, strict=True) if price)
    throughput = figures["output_throughput"]
    per_mtok = usd_per_hour / 3600 / throughput * 1e6 if throughput else None
    return {"gpus": gpus, "usd_per_hour": usd_per_hour, "usd_per_mtok_output": per_mtok}


def _energy_joules(
    experts: Sequence[ExpertModel],
    per_expert: Mapping[str, Mapping[str, Any]],
    fleet: FleetConfig,
    window: Window,
) -> float | None:
    """Joules of the whole fleet in the window; None unless every calibration has a power model."""
    total = 0.0
    for (name, described), expert in zip(fleet.experts.items(), experts, strict=True):
        joules = expert.energy(per_expert[name]["busy_share"] * window.duration_s, window.duration_s)
        if joules is None:
            return None
        total += described.replicas * joules
    return total


def _routing(
    config: SimulationConfig,
    experts: Sequence[ExpertModel],
    prompts: Sequence[Prompt],
    inside: RequestTable,
    figures: Mapping[str, Any],
) -> dict[str, Any]:
    """Answer quality, misroutes, strong calls and balance; None where the prompt set has no labels."""
    names = list(config.fleet.experts)
    configs = list(config.fleet.experts.values())
    done = inside[inside["status"] == COMPLETED]
    expert = _positions(done, names)
    asked = [prompts[index] for index in done["prompt_index"]]
    domains = sorted({prompt.domain for prompt in asked})
    domain = np.array([domains.index(prompt.domain) for prompt in asked], dtype=np.int64)
    serves = np.array([[name in one.domains for name in domains] for one in configs], dtype=bool)
    labels = _labels(asked, names, [one.model for one in configs])
    score = labels[np.arange(len(expert)), expert] if len(expert) else np.empty(0)
    sizes = [expert_model.model.params for expert_model in experts]
    strong = np.array([size == max(sizes) for size in sizes])
    usd = (figures["usd_per_hour"] or 0.0) / 3600 * figures["duration"]
    slots = [model.engine.max_num_seqs * one.replicas for model, one in zip(experts, configs, strict=True)]
    return {
        "mean_score": quality.mean_score(score),
        "score_by_expert": quality.score_by(expert, score, names),
        "score_by_domain": quality.score_by(domain, score, domains),
        "misroute_rate_by_domain": quality.misroute_rate_by_domain(expert, domain, serves),
        "misroute_rate_by_quality": quality.misroute_rate_by_quality(expert, labels),
        "strong_call_share": None if strong.all() else quality.strong_call_share(expert, strong),
        "usd_per_correct_answer": quality.usd_per_correct_answer(usd, score) if usd else None,
        "load_imbalance": quality.load_imbalance(expert, slots),
    }


def _price_of_load(routing: Routing, config: SimulationConfig, inside: RequestTable) -> dict[str, Any]:
    """How often load moved a request away from the policy's choice, and the score that this gave up.

    In the policy's own units: expected quality (0 to 1) for policies that learnt from labels. None
    for policies that load does not move.
    """
    if routing.preferred is None:
        return {"spilled_share": None, "quality_given_up": None}
    done = inside[inside["status"] == COMPLETED]
    expert = _positions(done, list(config.fleet.experts))
    asked = done["prompt_index"]
    first = routing.preferred[asked]
    return {
        "spilled_share": quality.spilled_share(expert, first),
        "quality_given_up": quality.quality_given_up(routing.scores[asked], expert, first),
    }


def _positions(done: RequestTable, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Index of each request's expert in `names`."""
    index = {name: position for position, name in enumerate(names)}
    return np.array([index[name] for name in done["expert"].tolist()], dtype=np.int64)


def _labels(asked: Sequence[Prompt], names: Sequence[str], models: Sequence[str]) -> npt.NDArray[np.float64]:
    """Graded quality of each expert's answer to each request, NaN where unknown; (requests, experts).

    As for the router: a label under the expert's own name wins over one under its model's.
    """
    pairs = list(zip(names, models, strict=True))
    rows = [[prompt.quality.get(n, prompt.quality.get(m, np.nan)) for n, m in pairs] for prompt in asked]
    return np.array(rows, dtype=np.float64).reshape(len(asked), len(pairs))
