"""``python -m experiments.second_opinion --data FOLDER``: calibrations beside data they were not made from.

No whole run has judged A100, int8 or int4. Their operators can be laid beside other people's: the A100's
linear maps, attention and all-reduces as another project measured them, and on H200 weight-only int4
kernels. Errors are of the calibration with its coefficients: told / measured - 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from ersim.errors import DataError, ErsimError
from ersim.steptime import load, load_gpu, load_model
from ersim.steptime.calibration import Calibration, find
from ersim.steptime.terms import curve, curve_rows
from experiments.op_tables import GemmTable, OpTables, layer_shapes, linear_maps_s

FloatArray = npt.NDArray[np.float64]
Check = tuple[str, FloatArray, str]
"""What is checked, relative errors, and what it is checked against."""
LINEAR = ("attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms")
MODELS = {"llama3.1-8b": "Meta-Llama-3-8B", "llama3.1-70b": "Meta-Llama-3-70B"}
RANGES = ((1, 128, "decode steps, 1 to 128 tokens"), (129, 4096, "prefill, 129 to 4,096 tokens"))
H200_PROXY = "gemm_h200_sxm_TRTLLM1.2.0rc5_weightonly_proxy.csv"


def _read(folder: Path, name: str) -> pd.DataFrame:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path} is missing; give the folder of operator tables with --data")
    return pd.read_csv(path)


def _calibration(gpu: str, model: str, precision: str, tp: int) -> Calibration | None:
    path = find(gpu, model, precision, tp)
    return None if path is None else load(path)


def _linear_us(calibration: Calibration, tokens: FloatArray) -> FloatArray:
    """Microseconds of all layers' linear maps with their coefficients."""
    total = np.zeros(len(tokens))
    for term, theta in zip(calibration.terms, calibration.theta, strict=True):
        if term["label"] in ("weights", "arithmetic"):
            total += theta * curve(tokens, term["tokens"], term["time_us"])
    return total


def linear_maps(folder: Path) -> Iterator[Check]:
    """bf16 linear maps of the A100 beside Vidur's medians, by model, TP and kind of step."""
    for model, name in MODELS.items():
        frame = _read(folder, f"a100_{name}_mlp_median_ms.csv")
        layers = load_model(model).num_layers
        for tp, rows in frame.groupby("tp"):
            calibration = _calibration("a100-80gb", model, "bf16", int(str(tp)))
            if calibration is None:
                continue
            tokens = rows.num_tokens.to_numpy(float)
            measured = layers * 1e3 * rows[list(LINEAR)].sum(axis=1).to_numpy()
            errors = _linear_us(calibration, tokens) / measured - 1
            for low, high, kind in RANGES:
                inside = (tokens >= low) & (tokens <= high)
                yield f"A100 linear maps, {model} bf16 tp{tp}, {kind}", errors[inside], "Vidur"


def _term(calibration: Calibration, label: str) -> tuple[dict[str, FloatArray], float]:
    for term, theta in zip(calibration.terms, calibration.theta, strict=True):
        if term["label"] == label:
            arrays = {key: np.asarray(term[key], float) for key in term if isinstance(term[key], list)}
            return arrays, theta
    raise DataError(f"{calibration.name}: has no term {label}")


def attention(folder: Path) -> Iterator[Check]:
    """The A100's attention beside Vidur's: decode by rows and context, prefill by chunk and prefix."""
    for model, tp, stem in (
        ("llama3.1-8b", 1, "a100_llama3-8b_attn_{}_anchor_rows.csv"),
        ("llama3.1-70b", 2, "a100_llama70b-geometry_tp2_attn_{}_ms.csv"),
    ):
        calibration, layers = _calibration("a100-80gb", model, "bf16", tp), load_model(model).num_layers
        assert calibration is not None  # committed
        frame = _of(_read(folder, stem.format("decode")), tp)
        frame = frame[(frame.batch_size >= 4) & (frame.kv_cache >= 256)]
        term, theta = _term(calibration, "decode attention")
        table = curve_rows(frame.kv_cache.to_numpy(float), term["context_tokens"], term["time_us"].T)
        rows = frame.batch_size.to_numpy(float)
        told = np.asarray(
            [np.interp(n, term["sequences"], line) for n, line in zip(rows, table, strict=True)]
        )
        errors = theta * told / (layers * 1e3 * frame.attn_decode_ms.to_numpy()) - 1
        yield f"A100 decode attention, {model} tp{tp}, 4 rows and 256 tokens up", errors, "Vidur"
        frame = _of(_read(folder, stem.format("prefill")), tp)
        frame = frame.assign(
            told=_prefill_us(calibration, frame), measured=layers * 1e3 * frame.attn_prefill_ms
        )
        yield from _by_prefix(f"{model} tp{tp}", frame)


def _of(frame: pd.DataFrame, tp: int) -> pd.DataFrame:
    return frame[frame.tp == tp] if "tp" in frame else frame


def _by_prefix(name: str, frame: pd.DataFrame) -> Iterator[Check]:
    """Prefill attention without a prefix, and what a prefix of at least 512 tokens adds to it."""
    alone = frame[frame.kv_cache == 0].set_index("prefill_chunk")
    errors = (alone.told / alone.measured - 1).to_numpy()
    yield f"A100 prefill attention, {name}, no prefix", errors, "Vidur (an older kernel)"
    over = frame[(frame.kv_cache >= 512) & frame.prefill_chunk.isin(alone.index)]
    base = alone.loc[over.prefill_chunk]
    added = over.measured.to_numpy() - base.measured.to_numpy()
    errors = (over.told.to_numpy() - base.told.to_numpy()) / added - 1
    for low, high in ((64, 511), (512, 4096)):
        inside = over.prefill_chunk.between(low, high).to_numpy() & (added > 0)
        if inside.any():
            what = f"A100 prefill attention, {name}, what a prefix adds to chunks of {low} to {high}"
            yield what, errors[inside], "Vidur"


def _prefill_us(calibration: Calibration, frame: pd.DataFrame) -> FloatArray:
    """Microseconds of prefill attention of each chunk over its prefix, all layers."""
    term, theta = _term(calibration, "prefill attention")
    by_prefix = curve_rows(frame.kv_cache.to_numpy(float), term["context_tokens"], term["time_us"].T)
    chunks = frame.prefill_chunk.to_numpy(float)
    told = [np.interp(n, term["chunk_tokens"], line) for n, line in zip(chunks, by_prefix, strict=True)]
    return theta * np.asarray(told)


def all_reduces(folder: Path) -> Iterator[Check]:
    """One all-reduce within a node beside Vidur's, from 64 kB to 64 MB."""
    for gpu, name in (("a100-80gb", "a100"), ("h100-80gb", "h100")):
        frame, tables = _read(folder, f"net_{name}_dgx_all_reduce_ms.csv"), OpTables(folder, load_gpu(gpu))
        frame = frame[(frame.num_workers == frame.devices_per_node) & frame.bytes.between(65536, 67108864)]
        for tp, rows in frame.groupby("num_workers"):
            told = tables.all_reduce_s(int(str(tp)), rows.bytes.to_numpy(float) / 2)
            yield f"{name.upper()} all-reduce of {tp} GPUs", told / (1e-3 * rows.ms.to_numpy()) - 1, "Vidur"


def weight_only(folder: Path) -> Iterator[Check]:
    """int4 linear maps of the H200, derived through the A100, beside TensorRT-LLM's kernels on the H200.

    Of the shapes that TensorRT-LLM's table holds; its bf16 kernels beside vLLM's show what is its own.
    """
    frame, tables = _read(folder, H200_PROXY), OpTables(folder, load_gpu("h200-141gb"))
    for precision, dtype in (("int4", "int4_wo"), ("bf16", "bfloat16")):
        proxy = GemmTable(frame, dtype)
        for low, high, kind in RANGES:
            tokens = np.asarray([m for m in sorted(frame.m.unique()) if low <= m <= high], dtype=float)
            errors = []
            for model, tp in (("llama3.1-8b", 1), ("llama3.1-70b", 1), ("llama3.1-70b", 2)):
                spec = load_model(model)
                measured = sum(proxy.seconds(tokens, n, k) for _, n, k in layer_shapes(spec, tp))
                told = linear_maps_s(tables, spec, precision, tp, tokens) / spec.num_layers
                errors.append(told / measured - 1)
            yield f"H200 linear maps in {precision}, {kind}", np.concatenate(errors), "TensorRT-LLM on H200"


def main() -> None:
    """Command line: one line per check, then all as one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gpu-op-tables"))
    folder: Path = parser.parse_args().data
    records = []
    try:
        for checks in (linear_maps, attention, all_reduces, weight_only):
            for what, errors, source in checks(folder):
                figures = [float(x) for x in (np.abs(errors).mean(), np.median(errors), np.abs(errors).max())]
                print(
                    f"{what:88} {len(errors):5} points: {figures[0]:6.1%} mean, {figures[1]:+6.1%} median, "
                    f"{figures[2]:6.1%} at most, of {source}"
                )
                named = dict(zip(("mean_absolute", "median", "largest"), figures, strict=True))
                records.append({"what": what, "against": source, "points": len(errors), **named})
    except ErsimError as error:
        print(f"second_opinion: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(json.dumps({"checks": records}))


if __name__ == "__main__":
    main()
