"""The `ersim-calibrate` command: build a calibration from raw measurements, or show what there is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
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
from ersim.steptime.transfer import Setting, build_transfer, nearest
from experiments.folders import check_file
from experiments.group_values import leave_on_bad_groups
from experiments.names import check_names
from experiments.paths import conf_dir

TENSOR_PARALLEL = (1, 2, 4, 8)
SMALLEST_CONTEXT = 2048  # a model that cannot hold one such request at 95 % of memory is not calibrated


@dataclass
class CalibrateConfig:
    """What to build: one calibration, or with `all` every one that fits its GPU.

    source: tables, profile, steps, transfer (from the nearest other GPU) or roofline. data: folder or
    file of raw measurements. out: file to write, default conf/calibration/<gpu>/. list, show: only look.
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
        "held_out_prefill_mape": fit.get("held_out_prefill_mape"),
        "runs_tpot_mape": fit.get("runs_tpot_mape"),
        "step_interval": step_interval(calibration),
        "kv_blocks": calibration.kv_blocks,
        "digest": calibration.digest[:12],
        "file": path.name,
    }


def step_interval(calibration: Calibration) -> float:
    """Half width of the 90 % interval of a typical decode step, as a share of it.

    The step has up to 32 rows of 1,024 tokens each. From 4,096 draws of the coefficients' covariance; what
    each term is worth in the step is worked out once.
    """
    import numpy as np

    rows = int(min(32, calibration.valid.get("decode_seqs", (1, 32))[1])) or 1
    worth = np.asarray([_worth_s(term, rows, 1024) for term in calibration.terms])
    sides = np.asarray([term["side"] for term in calibration.terms])
    rng = np.random.default_rng(0)
    draws = rng.multivariate_normal(calibration.theta, calibration.covariance, 4096, method="eigh")
    for number in np.flatnonzero((draws < 0.0).any(axis=1)):
        draws[number] = calibration.within_bounds(draws[number])
    draws *= worth
    step = np.maximum(draws[:, sides != "host"].sum(axis=1), draws[:, sides != "gpu"].sum(axis=1))
    return round(1.645 * float(np.std(step) / np.mean(step)), 4)


def _worth_s(term: Mapping[str, Any], rows: int, context: int) -> float:
    """Seconds of one term per unit of its coefficient in a step of `rows` decode rows, unpadded."""
    import numpy as np

    from ersim.steptime.terms import curve, curve_rows, segment

    at = np.asarray([float(rows)])
    if term["kind"] == "tokens":
        return float(curve(at, term["tokens"], term["time_us"])[0]) * 1e-6
    if term["kind"] == "sampled":
        return float(curve(at, term["sequences"], term["time_us"])[0]) * 1e-6
    if term["kind"] == "decode_attention":
        table = np.asarray(term["time_us"], float).T
        contexts, sequences = (np.asarray(term[axis], float) for axis in ("context_tokens", "sequences"))
        column = curve_rows(np.asarray([float(context)]), contexts, table)[0]
        return float(curve_rows(at, sequences, column[:, None])[0, 0]) * 1e-6
    if term["kind"] != "linear":
        return 0.0
    values = {"step": 1.0, "decode_context_tokens": float(rows * context)}
    values |= dict.fromkeys(("tokens", "padded_tokens", "sampled_seqs", "decode_seqs"), float(rows))
    value = values.get(term["feature"], 0.0)
    if term.get("low") is None and term.get("high") is None:
        return value
    return float(segment(np.asarray([value]), term.get("low"), term.get("high"))[0])


def show_list() -> list[dict[str, Any]]:
    """Print one line per calibration; returns what was printed."""
    found = [describe(load(path), path) for path in list_files()]
    names = ("calibration", "source", "date", "vLLM", "tokens", "rows", "context")
    head = (*names, "decode", "prefill", "runs", "90 % step")
    print(f"{'':96} ---- held-out error ----")
    print("{:46} {:9} {:10} {:8} {:>9} {:>7} {:>9} {:>8} {:>8} {:>8} {:>9}".format(*head))
    for row in found:
        keys = ("held_out_mape", "held_out_prefill_mape", "runs_tpot_mape")
        errors = ["-" if row[key] is None else f"{100 * row[key]:.1f} %" for key in keys]
        label = row["source"] + ("*" if row["derived"] else "")
        tokens, rows, context = (_span(row["valid"], k) for k in ("tokens", "decode_seqs", "context_tokens"))
        print(
            f"{row['name']:46} {label:9} {row['date'] or '':10} {row['vllm_version'] or '':8} "
            f"{tokens:>9} {rows:>7} {context:>9} {errors[0]:>8} {errors[1]:>8} {errors[2]:>8} "
            f"±{100 * row['step_interval']:6.1f} %"
        )
    print(
        "held-out error, mean absolute: decode and prefill, of points of the curves by tokens, each guessed"
    )
    print("  from its neighbours without it (of recorded steps: of steps left out, all kinds);")
    print("  runs, of TPOTs of published runs with coefficients from others (-: no run has judged it)")
    print("90 % step: the interval of a decode step of 32 rows with 1,024 tokens each")
    print("tokens, rows, context: what one step may hold before a run warns and widens its interval")
    print("* derived from other measurements (show=NAME tells how), with a wider interval")
    return found


def _span(valid: Mapping[str, Sequence[float]], key: str) -> str:
    return "-".join(f"{bound:g}" for bound in valid.get(key, ()))


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
    if config.source == "transfer":
        target = Setting(load_model(model), load_gpu(gpu), precision, tp)
        base = nearest(target, leave_out=(gpu,))
        if base is None:
            raise ConfigError(f"no calibration of {model} to carry over to {gpu}; take source=roofline")
        return build_transfer(base, target)
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
    if config.out:
        check_file(Path(config.out), "out")
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
        check_names(config)
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
    keys = [key.name for key in fields(CalibrateConfig)]
    leave_on_bad_groups("ersim-calibrate", sys.argv[1:], conf / "calibrate", "calibrate", keys)
    ConfigStore.instance().store(name="calibrate_schema", node=CalibrateConfig)
    hydra.main(version_base="1.3", config_path=str(conf / "calibrate"), config_name="calibrate")(_task)()


if __name__ == "__main__":
    main()
