"""The `ersim-calibrate` command: build a calibration from raw measurements, or show what there is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from ersim.config import PRECISIONS
from ersim.errors import ConfigError, DoesNotFitError, ErsimError, bad_value, unknown_choice
from ersim.steptime.calibration import (
    CALIBRATION_DIR,
    SOURCES,
    Calibration,
    file_name,
    list_files,
    load,
    save,
)
from ersim.steptime.capacity import kv_cache_bytes
from ersim.steptime.roofline import build_roofline
from ersim.steptime.specs import canonical_precision, check_tensor_parallel, load_gpu, load_model
from experiments.paths import conf_dir

TENSOR_PARALLEL = (1, 2, 4, 8)
SMALLEST_CONTEXT = 2048  # a model that cannot hold one such request at 95 % of memory is not calibrated


@dataclass
class CalibrateConfig:
    """What to build: one calibration, or with `all` every one that fits its GPU.

    source: tables, profile, steps or roofline. data: folder or file of raw measurements. out: file
    to write, default conf/calibration/<gpu>/. list, show: only look.
    """

    source: str = "tables"
    gpu: str = "h100-80gb"
    model: str = "llama3.1-8b"
    precision: str = "bf16"
    tp: str = "1"
    data: Optional[str] = None
    out: Optional[str] = None
    list: bool = False
    show: Optional[str] = None
    seed: int = 0


def describe(calibration: Calibration, path: Path) -> dict[str, Any]:
    """Identity, origin, range and held-out error of one calibration."""
    fit = calibration.fit
    return {
        "name": calibration.name,
        "source": calibration.source,
        "derived": calibration.derived is not None,
        "date": calibration.date,
        "vllm_version": calibration.vllm_version,
        "valid": {key: list(bounds) for key, bounds in calibration.valid.items()},
        "held_out_mape": fit.get("held_out_mape"),
        "step_interval": step_interval(calibration),
        "kv_blocks": calibration.kv_blocks,
        "digest": calibration.digest[:12],
        "file": path.name,
    }


def step_interval(calibration: Calibration) -> float:
    """Half width of the 90 % interval of a typical decode step, as a share of it.

    From the coefficients' covariance, with each term worth what it is in a step of 32 rows of 1,024
    tokens; read off the evaluated step time of 64 draws.
    """
    import numpy as np

    from ersim.steptime.evaluate import PreparedStepTime, graph_sizes
    from ersim.types import Batch

    rows = int(min(32, calibration.valid.get("decode_seqs", (1, 32))[1])) or 1
    batch = Batch(rows, rows, rows * 1024, 1024, (), rows)
    rng, times = np.random.default_rng(0), []
    for _ in range(64):
        prepared = PreparedStepTime(
            calibration,
            calibration.sample_theta(rng),
            max_tokens=rows,
            max_seqs=rows,
            max_context=2048,
            graphs=calibration.engine.get("cudagraph_sizes") or graph_sizes(256),
            asynchronous=True,
        )
        times.append(prepared.step_s(batch))
    return round(1.645 * float(np.std(times) / np.mean(times)), 4)


def show_list() -> list[dict[str, Any]]:
    """Print one line per calibration; returns what was printed."""
    found = [describe(load(path), path) for path in list_files()]
    head = ("calibration", "source", "date", "vLLM", "tokens", "held-out", "90 % step")
    print("{:52} {:9} {:10} {:8} {:>12} {:>9} {:>9}".format(*head))
    for row in found:
        span = row["valid"].get("tokens", ["", ""])
        error = "" if row["held_out_mape"] is None else f"{100 * row['held_out_mape']:.1f} %"
        label = row["source"] + ("*" if row["derived"] else "")
        print(
            f"{row['name']:52} {label:9} {row['date'] or '':10} {row['vllm_version'] or '':8} "
            f"{f'{span[0]:g}-{span[1]:g}' if span[0] != '' else '':>12} {error:>9} "
            f"{100 * row['step_interval']:7.1f} %"
        )
    print("* derived from other measurements (show=NAME tells how), with a wider interval")
    return found


def show_one(name: str) -> dict[str, Any]:
    """Print everything about one calibration but its tables."""
    from ersim.steptime.calibration import resolve

    path = resolve(name, "show")
    calibration = load(path)
    facts = describe(calibration, path)
    facts |= {
        "derived": calibration.derived,
        "fit": dict(calibration.fit),
        "engine": dict(calibration.engine),
    }
    facts["provenance"] = {k: v for k, v in calibration.provenance.items() if k != "model_config"}
    facts["terms"] = {str(t["label"]): c for t, c in zip(calibration.terms, calibration.theta, strict=True)}
    print(json.dumps(facts, indent=1))
    return facts


def _chosen(key: str, value: str, all_of: tuple[str, ...]) -> tuple[str, ...]:
    return all_of if value == "all" else tuple(part.strip() for part in value.split(",")) or (key,)


def combinations(config: CalibrateConfig) -> Iterator[tuple[str, str, str, int]]:
    """(gpu, model, precision, tp) to build; with several, those that do not fit their GPU are left out."""
    from experiments.op_tables import TABLES

    gpus = _chosen("gpu", config.gpu, tuple(TABLES))
    models = _chosen("model", config.model, ("llama3.1-8b", "llama3.1-70b"))
    precisions = _chosen("precision", config.precision, ("bf16", "fp8", "int8", "int4"))
    degrees = _chosen("tp", config.tp, tuple(map(str, TENSOR_PARALLEL)))
    single = len(gpus) * len(models) * len(precisions) * len(degrees) == 1
    for gpu in gpus:
        for model in models:
            for precision in precisions:
                for degree in degrees:
                    tp = _degree(degree)
                    if _fits(gpu, model, precision, tp, raise_error=single):
                        yield gpu, model, canonical_precision(precision), tp


def _degree(text: str) -> int:
    if text not in map(str, TENSOR_PARALLEL):
        raise unknown_choice("tp", text, TENSOR_PARALLEL)
    return int(text)


def _fits(gpu: str, model: str, precision: str, tp: int, raise_error: bool) -> bool:
    if precision not in PRECISIONS:
        raise unknown_choice("precision", precision, PRECISIONS)
    spec = load_model(model)
    check_tensor_parallel(spec, tp, "calibrate")
    if gpu == "cpu":
        return True
    free = kv_cache_bytes(spec, load_gpu(gpu), precision, tp, 0.95, 2048, 64)
    short = SMALLEST_CONTEXT * spec.kv_bytes_per_token(tp) - free
    if short > 0 and raise_error:
        raise DoesNotFitError(
            f"{model} in {precision} with tp={tp} does not fit {gpu}: "
            f"{short / 1e9:.1f} GB short on each GPU; take"
            " a larger tp or a smaller precision"
        )
    return short <= 0


def build(config: CalibrateConfig, gpu: str, model: str, precision: str, tp: int) -> Calibration:
    """One calibration. Raises ConfigError or DataError for data that do not give it."""
    if config.source not in SOURCES:
        raise unknown_choice("source", config.source, SOURCES)
    if config.source == "roofline":
        return build_roofline(load_model(model), load_gpu(gpu), precision, tp)
    if config.data is None:
        raise bad_value("data", f"the path of the raw measurements for source={config.source}", None)
    data = Path(config.data)
    if config.source == "steps":
        from experiments.recorded_steps import from_steps

        return from_steps(data, gpu, model, precision, tp, config.seed)
    from experiments.build_calibration import from_profile, from_tables

    if config.source == "tables":
        return from_tables(data, gpu, model, precision, tp)
    if precision != "bf16":
        raise bad_value("precision", "bf16: the layer profiles hold no other", precision)
    return from_profile(data, gpu, model, tp)


def run(config: CalibrateConfig) -> dict[str, Any]:
    """Do what the configuration says; returns the figures for the last line of output."""
    if config.list:
        return {"calibrations": show_list()}
    if config.show:
        return show_one(config.show)
    written = []
    wanted = list(combinations(config))
    if config.out and len(wanted) != 1:
        raise ConfigError(f"out names one file but {len(wanted)} calibrations are asked for; leave it away")
    for gpu, model, precision, tp in wanted:
        calibration = build(config, gpu, model, precision, tp)
        target = CALIBRATION_DIR / gpu / file_name(model, precision, tp, calibration.source)
        path = Path(config.out) if config.out else target
        save(calibration, path)
        facts = describe(calibration, path)
        error = facts["held_out_mape"]
        shown = "" if error is None else f", held-out error {100 * error:.1f} %"
        print(f"wrote {path}: 90 % interval of a decode step ±{100 * facts['step_interval']:.1f} %{shown}")
        written.append(facts)
    return {"written": written}


def _task(config: DictConfig) -> None:
    try:
        figures = run(OmegaConf.to_object(config))  # type: ignore[arg-type]
    except ErsimError as error:
        raise CompactHydraException(str(error)) from error
    print(json.dumps(figures))


def main() -> None:
    """Run the command line in sys.argv."""
    try:
        conf = conf_dir()
    except ErsimError as error:
        print(f"ersim-calibrate: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    ConfigStore.instance().store(name="calibrate_schema", node=CalibrateConfig)
    hydra.main(version_base="1.3", config_path=str(conf / "calibrate"), config_name="calibrate")(_task)()


if __name__ == "__main__":
    main()
