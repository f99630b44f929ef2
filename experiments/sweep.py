"""A sweep: check every job, write down what will run, run it, then compare and log what came out."""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ersim.errors import ErsimError
from ersim.util.files import write_json, write_text
from experiments.check import check_jobs, preparations
from experiments.folders import check_folder
from experiments.job import ERROR
from experiments.schema import RunConfig

if TYPE_CHECKING:
    from hydra_plugins.ersim_sweep import ErsimSweeper

MANIFEST = "sweep.json"
NOT_LINES = ("users", "seed", "name")  # swept keys that do not make a line of their own in a figure


def run_sweep(sweeper: ErsimSweeper, arguments: list[str]) -> list[Sequence[JobReturn]]:
    """Run all combinations of `arguments` and the sweeper's own params.

    Leaves with exit code 2 before anything is written if a job cannot be simulated; raises
    CompactHydraException (exit code 1) after logging everything if jobs failed while they ran.
    """
    assert sweeper.config is not None and sweeper.launcher is not None
    began_s = time.perf_counter()
    overrides = _combinations(sweeper, arguments)
    composed = _compose(sweeper, overrides)
    try:
        runs = check_jobs(
            (" ".join(o for o in own if "hydra" not in o), config)
            for own, config in zip(overrides, composed, strict=True)
        )
        folder = Path(str(sweeper.config.hydra.sweep.dir)).resolve()
        check_folder(folder, "hydra.sweep.dir")
    except ErsimError as error:
        print(f"ersim: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    _pin_folder(folder, [sweeper.config, *composed])
    write_text(folder / "multirun.yaml", OmegaConf.to_yaml(sweeper.config))
    write_json(folder / MANIFEST, manifest(folder, runs, overrides, composed))
    if hasattr(sweeper.launcher, "composed"):
        sweeper.launcher.composed = composed
    try:
        returns = sweeper.launcher.launch(overrides, initial_job_idx=0)
        _record_deaths(folder, composed, returns)
    finally:
        from experiments.report import finish

        finish(folder, elapsed_s=time.perf_counter() - began_s)
    failed = [item for item in returns if item.status is not JobStatus.COMPLETED]
    if failed:
        raise CompactHydraException(
            f"{len(failed)} of {len(returns)} jobs failed (error.json in their folders under {folder}); "
            f"the first: {failed[0]._return_value}"
        )
    return [returns]


def _pin_folder(folder: Path, configs: Sequence[DictConfig]) -> None:
    """Write the sweep's folder into every job's config: `now` would otherwise give each job its own."""
    for config in configs:
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = str(folder)


def _record_deaths(folder: Path, composed: list[DictConfig], returns: Sequence[JobReturn]) -> None:
    """Write error.json for jobs whose process died before it could."""
    for config, result in zip(composed, returns, strict=True):
        path = folder / _subfolder(config) / ERROR
        if result.status is not JobStatus.COMPLETED and not path.exists():
            write_json(path, {"error": str(result._return_value), "kind": "ProcessDied"})


def _combinations(sweeper: ErsimSweeper, arguments: list[str]) -> list[list[str]]:
    """Every combination of the sweeper's params and the command line's overrides, which win."""
    assert sweeper.hydra_context is not None
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    parsed = parser.parse_overrides([*sweeper._parse_config(), *arguments])
    return [job for batch in sweeper.split_arguments(parsed, None) for job in batch]


def _compose(sweeper: ErsimSweeper, overrides: list[list[str]]) -> list[DictConfig]:
    """Every job's config, with its number set.

    Hydra takes 0.2 s to compose one. Jobs that differ in `users` and `seed` alone, two plain
    numbers, are therefore copies of one composed config with these two set.
    """
    assert sweeper.hydra_context is not None and sweeper.config is not None
    loader = sweeper.hydra_context.config_loader
    composed: dict[tuple[str, ...], DictConfig] = {}
    configs = []
    for number, own in enumerate(overrides):
        numbers = _plain_numbers(own)
        rest = tuple(item for item in own if item.partition("=")[0] not in numbers)
        if rest not in composed:
            composed[rest] = config = loader.load_sweep_config(sweeper.config, own)
        else:
            config = copy.deepcopy(composed[rest])
        with open_dict(config):
            for key, value in numbers.items():
                config[key] = value
            config.hydra.job.id = number
            config.hydra.job.num = number
            config.hydra.overrides.task = [item for item in own if not item.startswith("hydra.")]
            config.hydra.job.override_dirname = ",".join(config.hydra.overrides.task)
        configs.append(config)
    return configs


def _plain_numbers(overrides: list[str]) -> dict[str, int]:
    """The overrides of `users` and `seed` that are whole numbers."""
    pairs = (item.split("=", 1) for item in overrides if "=" in item)
    return {
        key: int(value) for key, value in pairs if key in ("users", "seed") and value.lstrip("-").isdigit()
    }


def manifest(
    folder: Path, runs: list[RunConfig], overrides: list[list[str]], composed: list[DictConfig]
) -> dict[str, Any]:
    """What will run and where: all that a later report needs, also if no job ever ends."""
    chosen = [dict(item.split("=", 1) for item in own if not item.startswith("hydra")) for own in overrides]
    swept = [key for key in chosen[0] if len({str(item.get(key)) for item in chosen}) > 1]
    jobs = []
    for number, (run, own, config) in enumerate(zip(runs, chosen, composed, strict=True)):
        jobs.append(
            {
                "job": number,
                "folder": _subfolder(config),
                "line": _line(run, own, swept, label=False),
                "label": _line(run, own, swept, label=True),
                "fleet": run.fleet.name,
                "users": run.users,
                "seed": run.seed,
                "prompt_set": preparations().prompt_set(run.workload.prompts).identity(),
                "overrides": own,
            }
        )
    first = runs[0]
    tracking = first.tracking
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:6]
    return {
        "name": first.name,
        "sweep_id": f"{first.name}-{time.strftime('%Y%m%d-%H%M%S')}-{digest}",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "swept": swept,
        "tracking": {
            "enabled": tracking.enabled is not False,
            "uri": tracking.uri,
            "experiment": tracking.experiment,
        },
        "jobs": jobs,
    }


def _subfolder(config: DictConfig) -> str:
    """Where the job writes, relative to the sweep's folder."""
    from hydra.core.hydra_config import HydraConfig

    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        return str(config.hydra.sweep.subdir)
    finally:
        HydraConfig.instance().cfg = before


def _line(run: RunConfig, chosen: dict[str, str], swept: list[str], *, label: bool) -> str:
    """The name of the line that this job is a point of: what was swept besides users and seed.

    With `label`, fleets go by their labels, as figures show them; without, by their names.
    """
    fleet = run.fleet.label or run.fleet.name if label else run.fleet.name
    named = [key for key in swept if key not in NOT_LINES and "." not in key]
    parts = [fleet if key == "fleet" else chosen[key] for key in named]
    parts += [f"{key.split('.')[-1]}={chosen[key]}" for key in swept if "." in key]
    return (", " if label else " ").join(parts) or fleet
