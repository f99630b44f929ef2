"""Builds calibrations from raw measurements; `experiments.calibrate` is its command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ersim.errors import DataError
from ersim.steptime.calibration import Calibration, file_name
from ersim.steptime.specs import canonical_precision, load_gpu, load_model
from ersim.steptime.terms import curve
from experiments import layer_profile, op_tables
from experiments.overheads import Overheads, coefficients, held_out_runs, host_terms, load_overheads
from experiments.published_names import gpu_name, model_name

TABLES_SOURCE = "AIConfigurator-core 0.12.0 operator tables (Apache-2.0)"
DECODE_TOKENS, SMALLEST_TILE = 128, 16
# Of linear maps derived through another GPU: half of the 28 % by which int4 on H200 differs from the only
# kernels measured there, TensorRT-LLM's (experiments.second_opinion).
ACROSS_GPUS_REL_STD = 0.14
PROFILE_SOURCE = "LLMServingSim 2.0 layer profile (MIT), eager, dummy weights"


def from_tables(
    folder: Path, gpu: str, model: str, precision: str, tp: int, overheads: Overheads | None = None
) -> Calibration:
    """Add up the operator tables in `folder`. Raises DataError when they lack what is needed."""
    overheads = overheads or load_overheads()
    precision = canonical_precision(precision)
    tables = op_tables.OpTables(folder, load_gpu(gpu))
    terms = op_tables.gpu_terms(tables, load_model(model), precision, tp)
    derived = op_tables.derivation(gpu, precision)
    return _assemble(
        terms,
        overheads,
        source="tables",
        identity=(gpu, model, precision, tp),
        derived=derived,
        vllm_version=tables.vllm_version,
        date="2025-10",
        valid={
            "tokens": [1, int(tables.token_grid[-1])],
            "decode_seqs": [1, op_tables.DECODE_SEQS[-1]],
            "context_tokens": [0, 32768],
        },
        provenance={
            "source": TABLES_SOURCE,
            "statistic": "mean of 6 timed runs after 3 warm-ups, CUDA graphs",
        },
        fit=held_out(terms),
    )


def from_profile(
    folder: Path, gpu: str, model: str, tp: int, overheads: Overheads | None = None
) -> Calibration:
    """Add up the layer profile in `folder`. Raises DataError when it lacks what is needed."""
    overheads = overheads or load_overheads()
    profile = layer_profile.LayerProfile(folder, tp)
    _check_origin(profile.meta, folder, gpu, model)
    terms = layer_profile.gpu_terms(profile, load_model(model), load_gpu(gpu))
    _, mixed_error = layer_profile.fit_mixed(profile.attention())
    derived = "the all-reduce is datasheet and public reports" if tp > 1 else None
    return _assemble(
        terms,
        overheads,
        source="profile",
        identity=(gpu, model, "bf16", tp),
        derived=derived,
        vllm_version=str(profile.meta.get("vllm_version")),
        date=str(profile.meta.get("profiled_at", ""))[:10],
        valid={"tokens": [1, 2048], "decode_seqs": [1, 256], "context_tokens": [0, 16384]},
        provenance={"source": PROFILE_SOURCE, "gpu": str(profile.meta.get("gpu"))},
        fit={**held_out(terms), "mixed_attention_mape": round(mixed_error, 4)},
    )


def _check_origin(meta: Mapping[str, Any], folder: Path, gpu: str, model: str) -> None:
    """Raise DataError where the profile names another GPU or model than the one asked for."""
    for key, asked, name in (("gpu", gpu, gpu_name), ("model", model, model_name)):
        recorded = str(meta.get(key) or "")
        if recorded and name(recorded, str(folder / "meta.yaml")) != asked:
            raise DataError(
                f"{folder / 'meta.yaml'}: this is a profile of {recorded}, but {key}={asked} was asked"
            )


def _assemble(
    terms: list[dict[str, Any]],
    overheads: Overheads,
    *,
    source: str,
    identity: tuple[str, str, str, int],
    derived: str | None,
    **fields: Any,
) -> Calibration:
    gpu, model, precision, tp = identity
    name = f"{gpu}/{file_name(model, precision, tp, source).removesuffix('.json')}"
    judged = held_out_runs(name)
    maps_rel_std = ACROSS_GPUS_REL_STD if precision == "int4" and gpu != "a100-80gb" else 0.0
    if judged is not None:
        fields["fit"] |= {"runs_tpot_mape": round(judged[0], 4), "runs": judged[1]}
    # half of what twice the distance between points shows
    maps_rel_std = round(float(np.hypot(maps_rel_std, fields["fit"]["held_out_mape"] / 2)), 4)
    fields["fit"] |= {"maps_rel_std": maps_rel_std}
    every = [*terms, *host_terms()]
    theta, covariance = coefficients(
        every,
        overheads,
        calibration=name,
        source=source,
        precision=precision,
        derived=derived is not None,
        maps_rel_std=maps_rel_std,
    )
    for term in every:
        if "fp8_time_us" in term:
            ratio = overheads.value("decode attention fp8 KV") / overheads.value("decode attention")
            term["fp8_scale"] = round(ratio, 4)
    return Calibration(
        name=name,
        source=source,
        model=model,
        precision=precision,
        gpu=gpu,
        tp=tp,
        terms=tuple(every),
        theta=tuple(theta),
        covariance=tuple(map(tuple, covariance)),
        residual_rel_std=overheads.residual_rel_std,
        derived=derived,
        frontend=overheads.frontend,
        **fields,
    )


def held_out(terms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean relative error of the summed token curves at points left out one by one, by kind of step.

    held_out_mape: of up to DECODE_TOKENS tokens, as decode steps have; held_out_prefill_mape: of more. A
    kernel's tiles put steps into the curves, and the tables hold both ends of many a tile (512 and 513
    tokens). An end that is left out says where the next step comes, which no curve can know: ends are
    therefore guessed from the like ends of the tiles before and after, other points from their
    neighbours. In use every tile is there, twice as many as the guess has.
    """
    curves = [term for term in terms if term["kind"] == "tokens"]
    tokens = np.asarray(max((term["tokens"] for term in curves), key=len), dtype=float)
    times = np.sum([curve(tokens, term["tokens"], term["time_us"]) for term in curves], axis=0)
    step = (np.diff(tokens) == 1) & (tokens[:-1] >= SMALLEST_TILE)
    first, last = np.append(False, step), np.append(step, False)
    decode: list[float] = []
    prefill: list[float] = []
    for like in (first, last, ~(first | last)):
        index = np.flatnonzero(like)
        for before, at, after in zip(index, index[1:], index[2:], strict=False):
            guess = np.interp(tokens[at], tokens[[before, after]], times[[before, after]])
            error = abs(float(guess / times[at]) - 1)
            (decode if tokens[at] <= DECODE_TOKENS else prefill).append(error)
    return {
        "held_out": "points of the token curves, one by one; ends of tiles from those of other tiles",
        "held_out_mape": round(float(np.mean(decode)), 4),
        "held_out_prefill_mape": round(float(np.mean(prefill)), 4),
    }
