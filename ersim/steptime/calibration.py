"""The calibration file: one format for recorded steps, operator tables, layer profiles and rooflines.

A calibration is a list of terms (see `ersim.steptime.terms`), each worth ``theta[k]`` times its
seconds, with the covariance of theta and the relative spread of a single step around their sum:

    step = max(sum of gpu terms, sum of host terms) + sum of exposed terms     (asynchronous scheduling)
    step = sum of gpu, half of host and exposed terms                          (synchronous)

The file is JSON, versioned and checked on load: a bad one raises DataError naming file, field, fix.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from ersim.errors import DataError, unknown_choice
from ersim.steptime.specs import CONF_DIR
from ersim.steptime.terms import SIDES, check_term

FORMAT = "ersim-calibration"
VERSION = 1
SOURCES = ("steps", "profile", "tables", "transfer", "roofline")  # in the order "auto" prefers them
UNCALIBRATED = ("transfer", "roofline")
LINEAR_MAPS = ("weights", "arithmetic", "linear maps", "all-reduce")  # what a derived precision changes
TINY_SHARE = 1e-6  # of a term's doubt or worth: rounding; added to doubts that several terms share wholly
MOST_TURNS = 3  # for each term, in a search that ends after fewer than one
CALIBRATION_DIR = CONF_DIR / "calibration"
RANGE_KEYS = ("tokens", "decode_seqs", "context_tokens", "prefill_chunk_tokens", "prefill_context_tokens")

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """How long steps of one model, precision, GPU and TP take, and how far to trust that.

    terms: plain mappings, checked by `check_term`. theta, covariance: one entry (row) per term.
    residual_rel_std: spread of single steps around the mean, as a share of it.
    valid: [low, high] per key of RANGE_KEYS that the data covered; beyond it estimates are
    extrapolated and their interval widened. engine: the settings of the server it was recorded on.
    kv_blocks: its true block count, None when unknown. derived: how it was made when its own
    precision or GPU was not measured, else None. fit: rows, errors and how they were held out.
    frontend: seconds that the API server adds outside steps ({} when unknown).
    power: {idle_w, busy_w} of all GPUs of one replica together ({} when unknown).
    """

    name: str
    source: str
    model: str
    precision: str
    gpu: str
    tp: int
    terms: tuple[Mapping[str, Any], ...]
    theta: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    residual_rel_std: float
    valid: Mapping[str, Sequence[float]]
    vllm_version: str | None = None
    date: str | None = None
    derived: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    kv_blocks: int | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    frontend: Mapping[str, float] = field(default_factory=dict)
    power: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def calibrated(self) -> bool:
        """False where nothing was measured on this model, precision and GPU: carried over, or a roofline."""
        return self.source not in UNCALIBRATED

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the content that decides times; equal calibrations, equal digest."""
        return hashlib.sha256(dumps(self).encode()).hexdigest()

    def sample_theta(self, rng: np.random.Generator | None, mirrored: bool = False) -> FloatArray:
        """One draw of the coefficients, shape (terms,), or their mean when `rng` is None.

        None is below zero (`within_bounds`). mirrored: the draw's reflection at the mean; a draw and its
        reflection average out first order where neither meets a bound.
        Two calibrations that draw from equal generators share the doubts they have in common: equal
        terms get equal normal numbers (`_doubts`), and the symmetric root of the correlation spreads
        what is common to all terms over all of them, whatever their number. (The eigenvectors that
        numpy's own draw would take have arbitrary signs, which turns shared doubts against each other.)
        """
        mean = np.asarray(self.theta)
        if rng is None:
            return mean
        covariance = np.asarray(self.covariance)
        spread = np.sqrt(np.diag(covariance))
        scale = np.where(spread > 0.0, spread, 1.0)
        values, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
        root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
        seed = int(rng.integers(2**63))
        streams = [np.random.default_rng([seed, crc32(name.encode())]) for name in self._doubts()]
        step: FloatArray = spread * (root @ np.asarray([stream.standard_normal() for stream in streams]))
        return self.within_bounds(mean - step if mirrored else mean + step)

    def within_bounds(self, drawn: FloatArray) -> FloatArray:
        """Drawn coefficients, shape (terms,), with none below zero.

        Where each term was measured by itself (tables, layer profiles) those below are cut. A fit to
        recorded steps tells the sum of its terms better than the terms: cutting one would leave another too
        large beside it, and steps too long in the mean. So the nearest coefficients stand for those drawn.
        """
        if self.source != "steps":
            cut: FloatArray = np.maximum(drawn, 0.0)
            return cut
        return drawn if (drawn >= 0.0).all() else _nearest_within(drawn, np.asarray(self.covariance))

    def _doubts(self) -> list[str]:
        """A name for what makes each term doubtful, equal in calibrations that share that doubt.

        Host terms are the same everywhere. Terms from tables or profiles share their method's doubt; the
        loading of weights has kernels by precision; what was derived is doubtful by GPU and precision;
        fits to recorded steps have statistical errors of their own.
        """
        names: list[str] = []
        seen: dict[str, int] = {}
        for term in self.terms:
            name = f"{term['label']} {term.get('low')} {term.get('high')}"
            linear = term["label"] in LINEAR_MAPS
            if self.source == "steps":
                name += f" {self.name}"
            elif term["side"] == "gpu":
                name += f" {self.source}"
                if self.source == "transfer" or (self.derived is not None and linear):
                    name += f" {self.gpu} {self.precision}"
                elif term["label"] in ("weights", "linear maps"):
                    name += f" {self.precision}"
            seen[name] = seen.get(name, 0) + 1
            names.append(f"{name} {seen[name]}")
        return names


def _nearest_within(drawn: FloatArray, covariance: FloatArray) -> FloatArray:
    """The coefficients nearest to those drawn, shape (terms,), of which none is below zero.

    Near in the metric of the covariance, shape (terms, terms): what the data told well stays. It is ``drawn
    + C l``, with l >= 0 the push off each bound and ``l * (drawn + C l) = 0``, found as in Lawson and
    Hanson (1974, chapter 23): of those below zero the lowest one is held at zero, then the next, and one
    whose push would have to be negative is let go again. Their library routine is not used: loading it
    takes longer than most simulations.
    """
    spread = np.sqrt(np.diag(covariance))
    free = spread > TINY_SHARE * np.abs(drawn)
    scale = np.outer(spread[free], spread[free])
    metric = covariance[np.ix_(free, free)] / scale + TINY_SHARE * np.eye(int(free.sum()))
    start = drawn[free] / spread[free]
    push, held = np.zeros(len(start)), np.zeros(len(start), dtype=bool)
    for _ in range(MOST_TURNS * len(start)):
        now = start + metric @ push
        if held.all() or now[~held].min() >= -TINY_SHARE:
            break
        held[np.flatnonzero(~held)[np.argmin(now[~held])]] = True
        while held.any():
            wanted = np.zeros(len(start))
            wanted[held] = np.linalg.solve(metric[np.ix_(held, held)], -start[held])
            if wanted[held].min() > 0.0:
                push = wanted
                break
            back = held & (wanted <= 0.0)
            share = np.min(push[back] / np.maximum(push[back] - wanted[back], TINY_SHARE))
            push = push + share * (wanted - push)
            held &= push > TINY_SHARE
            push[~held] = 0.0
    moved = np.maximum(drawn, 0.0)
    moved[free] = np.where(held, 0.0, np.maximum(spread[free] * (start + metric @ push), 0.0))
    return moved


def dumps(calibration: Calibration) -> str:
    """The calibration as JSON text, keys in a fixed order."""
    data = {"format": FORMAT, "version": VERSION, **asdict(calibration)}
    data.pop("warnings")
    return json.dumps(data, separators=(",", ":"), sort_keys=True, allow_nan=False)


def save(calibration: Calibration, path: Path) -> None:
    """Write the file atomically, after checking that it loads again."""
    text = dumps(calibration)
    _parse(json.loads(text), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path) -> Calibration:
    """Read and check a calibration file. Raises DataError naming the file, the field and the remedy."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: calibration cannot be read ({error}); give the path of a JSON file"
        ) from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not a whole JSON document (line {error.lineno}, column {error.colno}: {error.msg}); "
            "the file is cut or damaged: restore it or build it again with ersim-calibrate"
        ) from error
    return _parse(data, str(path))


def _fail(where: str, name: str, must: str, got: object) -> DataError:
    shown = repr(got)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return DataError(f"{where}: field {name} must be {must}, got {shown}")


def _parse(data: Any, where: str) -> Calibration:
    if not isinstance(data, dict):
        raise _fail(where, "(top level)", "a JSON object", data)
    if data.get("format") != FORMAT:
        raise _fail(where, "format", f"{FORMAT!r} (is this a calibration file?)", data.get("format"))
    if data.get("version") != VERSION:
        raise _fail(where, "version", f"{VERSION}; build it again with this ersim", data.get("version"))
    known = {name for name in Calibration.__dataclass_fields__ if name != "warnings"}
    unknown = sorted(set(data) - known - {"format", "version"})
    if unknown:
        raise _fail(where, unknown[0], "absent (no such field in version 1)", data[unknown[0]])
    for name in ("name", "source", "model", "precision", "gpu"):
        if not isinstance(data.get(name), str) or not data[name]:
            raise _fail(where, name, "a non-empty string", data.get(name))
    if data["source"] not in SOURCES:
        raise _fail(where, "source", f"one of {', '.join(SOURCES)}", data["source"])
    if not isinstance(data.get("tp"), int) or data["tp"] < 1:
        raise _fail(where, "tp", "an integer >= 1", data.get("tp"))
    terms = _checked_terms(data.get("terms"), where)
    theta, covariance = _checked_theta(data, len(terms), where)
    return Calibration(
        name=data["name"],
        source=data["source"],
        model=data["model"],
        precision=data["precision"],
        gpu=data["gpu"],
        tp=data["tp"],
        terms=terms,
        theta=theta,
        covariance=covariance,
        residual_rel_std=_number(data, "residual_rel_std", where),
        valid=_checked_range(data.get("valid"), where),
        kv_blocks=_optional(data, "kv_blocks", int, where),
        vllm_version=_optional(data, "vllm_version", str, where),
        date=_optional(data, "date", str, where),
        derived=_optional(data, "derived", str, where),
        engine=_mapping(data, "engine", where),
        fit=_mapping(data, "fit", where),
        provenance=_mapping(data, "provenance", where),
        frontend=_mapping(data, "frontend", where, numbers=True),
        power=_mapping(data, "power", where, numbers=True),
    )


def _checked_terms(terms: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(terms, list) or not terms:
        raise _fail(where, "terms", "a non-empty list of terms", terms)
    for index, term in enumerate(terms):
        check_term(term, f"{where}: field terms[{index}]")
    if not any(term["side"] == "gpu" for term in terms):
        raise _fail(where, "terms", f"at least one term of side gpu (sides: {', '.join(SIDES)})", "none")
    return tuple(terms)


def _checked_theta(
    data: Mapping[str, Any], count: int, where: str
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    theta = data.get("theta")
    if not isinstance(theta, list) or len(theta) != count or not all(_finite(x) and x >= 0 for x in theta):
        raise _fail(where, "theta", f"{count} numbers >= 0, one per term", theta)
    rows = data.get("covariance")
    square = isinstance(rows, list) and len(rows) == count
    if not square or not all(
        isinstance(r, list) and len(r) == count and all(map(_finite, r)) for r in rows or ()
    ):
        raise _fail(where, "covariance", f"{count} rows of {count} numbers", rows)
    matrix = np.asarray(rows, dtype=float)
    scale = max(float(np.abs(matrix).max()), 1e-300)
    if not np.allclose(matrix, matrix.T, rtol=0, atol=1e-6 * scale):
        raise _fail(where, "covariance", "symmetric", rows)
    if float(np.linalg.eigvalsh(matrix).min()) < -1e-6 * scale:
        raise _fail(where, "covariance", "positive semidefinite", rows)
    return tuple(map(float, theta)), tuple(tuple(map(float, row)) for row in rows or ())


def _checked_range(valid: Any, where: str) -> Mapping[str, Sequence[float]]:
    if not isinstance(valid, dict):
        raise _fail(where, "valid", f"an object with {', '.join(RANGE_KEYS)}", valid)
    for key, bounds in valid.items():
        if key not in RANGE_KEYS:
            raise _fail(where, f"valid.{key}", f"one of {', '.join(RANGE_KEYS)}", key)
        pair = isinstance(bounds, list) and len(bounds) == 2 and all(map(_finite, bounds))
        if not pair or bounds[0] > bounds[1]:
            raise _fail(where, f"valid.{key}", "[low, high] with low <= high", bounds)
    return valid


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(data: Mapping[str, Any], name: str, where: str) -> float:
    value = data.get(name)
    if not _finite(value) or value < 0:  # type: ignore[operator]
        raise _fail(where, name, "a number >= 0", value)
    return float(value)  # type: ignore[arg-type]


def _optional(data: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = data.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise _fail(where, name, f"{kind.__name__} or null", value)
    return value


def _mapping(data: Mapping[str, Any], name: str, where: str, numbers: bool = False) -> Mapping[str, Any]:
    value = data.get(name, {})
    if not isinstance(value, dict):
        raise _fail(where, name, "an object", value)
    for key, entry in value.items():
        if numbers and not (_finite(entry) and entry >= 0):
            raise _fail(where, f"{name}.{key}", "a number >= 0", entry)
    return value


def file_name(model: str, precision: str, tp: int, source: str) -> str:
    """Name of a committed calibration inside its GPU's folder; `find` looks for it."""
    return f"{model}_{precision}_tp{tp}_{source}.json"


def find(gpu: str, model: str, precision: str, tp: int, folder: Path = CALIBRATION_DIR) -> Path | None:
    """The committed calibration of this expert from the best source, None when there is none."""
    for source in SOURCES:
        path = folder / gpu / file_name(model, precision, tp, source)
        if path.is_file():
            return path
    return None


def list_files(folder: Path = CALIBRATION_DIR) -> list[Path]:
    """All calibration files below `folder`, sorted."""
    return sorted(folder.rglob("*.json"))


def resolve(name: str, key: str, folder: Path = CALIBRATION_DIR) -> Path:
    """The file that `calibration=<name>` means: a path, or a name relative to conf/calibration.

    Raises ConfigError listing the names there are.
    """
    for path in (Path(name), folder / name, folder / f"{name}.json"):
        if path.is_file():
            return path
    names = [str(path.relative_to(folder).with_suffix("")) for path in list_files(folder)]
    raise unknown_choice(f"{key}.calibration", name, ("auto", "roofline", "<path of a file>", *names))
