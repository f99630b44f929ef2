"""What a single run shows in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ersim.errors import ErsimError
from ersim.util.files import to_json

ROWS: tuple[tuple[str, str, str], ...] = (
    ("request_throughput", "requests/s", ",.2f"),
    ("output_throughput", "output tokens/s", ",.0f"),
    ("goodput_share", "share within objective", ".1%"),
    ("mean_ttft_ms", "TTFT mean, ms", ",.1f"),
    ("median_ttft_ms", "TTFT median, ms", ",.1f"),
    ("p99_ttft_ms", "TTFT p99, ms", ",.1f"),
    ("median_tpot_ms", "TPOT median, ms", ",.2f"),
    ("p99_tpot_ms", "TPOT p99, ms", ",.2f"),
    ("p99_itl_ms", "ITL p99, ms", ",.2f"),
    ("median_e2el_ms", "E2E median, ms", ",.0f"),
    ("p99_e2el_ms", "E2E p99, ms", ",.0f"),
    ("median_gateway_ms", "gateway overhead median, ms", ",.2f"),
    ("mean_score", "answer quality (share correct)", ".1%"),
    ("misroute_rate_by_domain", "sent to another domain's expert", ".1%"),
    ("strong_call_share", "sent to the largest model", ".1%"),
    ("spilled_share", "spilled to another expert", ".1%"),
    ("quality_given_up", "score given up by spilling", ".4f"),
    ("load_imbalance", "busiest expert over mean", ",.2f"),
    ("preemptions", "preemptions", ",.0f"),
    ("prefix_hit_rate", "prefix cache hit rate", ".1%"),
    ("usd_per_mtok_output", "US$ per million output tokens", ",.2f"),
    ("usd_per_correct_answer", "US$ per correct answer", ",.5f"),
)


def show_single(config: DictConfig, summary: dict[str, Any], folder: Path) -> None:
    """Print the summary, where its files are, and the figures as one line of JSON; log if asked to."""
    print(describe(summary))
    print(f"files: {folder}")
    if config.tracking.enabled:
        from experiments.tracking import log_run

        logged = log_run(folder, config, summary)
        print(f"MLflow: run {logged['run_id']} (`make ui` opens the UI)")
    scalars = {key: value for key, value in summary.items() if not isinstance(value, (dict, list))}
    print(to_json({"command": "ersim", "folder": str(folder), **scalars}, indent=None))


def log_failure(config: DictConfig, folder: Path) -> None:
    """Log a run that failed, if runs are logged; a store that cannot be used costs a line, not the error."""
    if not config.tracking.enabled:
        return
    from experiments.check import preparations
    from experiments.schema import to_run
    from experiments.tracking import log_run

    try:
        prompts = preparations().prompt_set(to_run(config).workload.prompts)
        log_run(folder, config, None, prompts.identity())
    except ErsimError as error:
        print(f"ersim: not logged: {error}", file=sys.stderr)


def describe(summary: dict[str, Any]) -> str:
    """The summary as aligned text with intervals, experts and warnings."""
    level = round(100 * float(summary.get("interval_level") or 0))
    many = int(summary.get("replications") or 1) > 1
    lines = [
        f"{summary['fleet']}, router {summary['router']}, {_load(summary)}, "
        f"{summary['completed_in_all']:,.0f} requests, {summary.get('gpus')} GPUs"
        + (f"; [{level} % interval of {summary['replications']} replications]" if many else "")
    ]
    for key, name, form in ROWS:
        value = summary.get(key)
        if value is not None:
            low, high = summary.get(f"{key}_low"), summary.get(f"{key}_high")
            band = "" if low is None or high is None else f"  [{low:{form}}, {high:{form}}]"
            lines.append(f"  {name:<32}{value:>12{form}}{band}")
    lines += _experts(summary.get("per_expert") or {})
    if not summary.get("steady", True):
        lines.append("note: the run never reached a steady state; these are figures of its second half")
    if not summary.get("calibrated", True):
        lines.append("note: at least one expert is UNCALIBRATED (not measured: see the warnings)")
    lines += [f"warning: {text}" for text in summary.get("warnings", [])]
    return "\n".join(lines)


def _load(summary: dict[str, Any]) -> str:
    """Who asks: users of a closed loop, a rate, or a trace (neither of which `users` has to do with)."""
    if summary.get("max_concurrency") is not None:
        return f"{summary['users']} users"
    rate = summary.get("request_rate")
    return "a trace" if rate is None else f"{rate:g} requests/s offered"


def _experts(blocks: dict[str, dict[str, Any]]) -> list[str]:
    """One line per expert: its share, latency, load and KV use."""
    if len(blocks) < 2:
        return []
    width = max(len(name) for name in blocks)
    lines = []
    for name, block in blocks.items():
        ttft, tpot = block.get("median_ttft_ms"), block.get("median_tpot_ms")
        text = f"  {name:<{width}}  {block.get('share', 0):>6.1%} of requests"
        if ttft is not None:
            text += f", TTFT {ttft:,.0f} ms"
        if tpot is not None:
            text += f", TPOT {tpot:,.1f} ms"
        text += (
            f", busy {block.get('busy_share', 0):.0%}, KV peak {block.get('peak_kv_used_fraction', 0):.0%}"
        )
        lines.append(text)
    return lines
