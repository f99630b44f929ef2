"""``python -m experiments.carried_over``: how far step times carry over to what was not measured.

Lays estimates beside committed calibrations on a few typical steps: another GPU (and the roofline),
another TP, another precision of the same GPU; then the published TPOTs with more and less left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from ersim.steptime import build_roofline, load, load_gpu, load_model
from ersim.steptime.calibration import Calibration, find
from ersim.steptime.evaluate import PreparedStepTime, graph_sizes
from ersim.steptime.transfer import Setting, build_transfer, nearest
from ersim.types import Batch
from experiments.overheads import (
    Observation,
    Overheads,
    load_observations,
    load_prior,
    posterior,
    predicted_tpot_ms,
)

FloatArray = npt.NDArray[np.float64]
DECODES = ((1, 512), (8, 1024), (32, 1024), (64, 2048), (128, 512))  # rows and context of each
STEPS = (
    *(Batch(rows, rows, rows * context, context, (), rows) for rows, context in DECODES),
    *(Batch(chunk, 0, 0, 0, [(chunk, 0)], 1) for chunk in (512, 2048)),
    Batch(544, 32, 32 * 1024, 1024, [(512, 512)], 33),
)
MEASURED = (
    ("a100-80gb", "llama3.1-8b", "bf16", 1),
    ("h100-80gb", "llama3.1-8b", "bf16", 1),
    ("h200-141gb", "llama3.1-8b", "bf16", 1),
    ("rtx4090", "llama3.1-8b", "bf16", 1),
    ("rtxpro6000", "llama3.1-8b", "bf16", 1),
    ("h100-80gb", "llama3.1-70b", "bf16", 4),
    ("a100-80gb", "llama3.1-70b", "bf16", 4),
    ("h100-80gb", "llama3.1-70b", "fp8", 2),
    ("h200-141gb", "llama3.1-70b", "fp8", 1),
    ("h200-141gb", "llama3.1-8b", "fp8", 1),
)


def seconds(calibration: Calibration) -> FloatArray:
    """Seconds of each of STEPS with the mean coefficients, shape (len(STEPS),)."""
    step = PreparedStepTime(
        calibration,
        np.asarray(calibration.theta),
        max_tokens=8192,
        max_seqs=256,
        max_context=8192,
        graphs=graph_sizes(256),
        asynchronous=True,
    )
    return np.asarray([step.step_s(batch) for batch in STEPS])


def measured(gpu: str, model: str, precision: str, tp: int) -> Calibration | None:
    """The committed calibration that was itself measured, else None."""
    path = find(gpu, model, precision, tp)
    calibration = None if path is None else load(path)
    return calibration if calibration is not None and calibration.derived is None else None


def estimates() -> Iterator[tuple[str, str, FloatArray]]:
    """(kind, what from what, relative errors over STEPS) of every estimate that can be checked."""
    for gpu, model, precision, tp in MEASURED:
        own = measured(gpu, model, precision, tp)
        assert own is not None
        truth, target = seconds(own), Setting(load_model(model), load_gpu(gpu), precision, tp)
        base = nearest(target, leave_out=(gpu,))
        assert base is not None
        yield "another GPU", f"{own.name} from {base.name}", seconds(build_transfer(base, target)) / truth - 1
        roofline = build_roofline(target.model, target.gpu, precision, tp)
        yield "roofline", own.name, seconds(roofline) / truth - 1
        for kind, other in (
            ("another TP", measured(gpu, model, precision, 2 * tp if tp < 8 else 4)),
            ("fp8 from bf16", measured(gpu, model, "bf16", tp) if precision == "fp8" else None),
        ):
            if other is not None:
                yield (
                    kind,
                    f"{own.name} from {other.name}",
                    seconds(build_transfer(other, target)) / truth - 1,
                )


def left_out() -> Iterator[tuple[str, dict[str, float]]]:
    """Mean absolute error of the published TPOTs by run, with coefficients that left out so much."""
    rows = load_observations()
    keeps: Iterable[tuple[str, Callable[[Observation, Observation], bool]]] = (
        ("nothing", lambda judged, row: True),
        ("the row", lambda judged, row: row is not judged),
        ("its TP", lambda judged, row: (row.run, row.group) != (judged.run, judged.group)),
        ("its run", lambda judged, row: row.run != judged.run),
        ("everything", lambda judged, row: False),
        ("all TP but 1 and 2", lambda judged, row: row.group in ("all", "tp1", "tp2") and row is not judged),
        ("all TP but 4 and 8", lambda judged, row: row.group in ("all", "tp4", "tp8") and row is not judged),
    )
    prior = load_prior()
    for name, keep in keeps:
        errors: dict[str, list[float]] = {}
        for judged in rows:
            found = posterior(prior, [row for row in rows if keep(judged, row)])
            errors.setdefault(f"{judged.run} {judged.group}", []).append(abs(_error(judged, found, prior)))
        yield name, {run: float(np.mean(values)) for run, values in errors.items()}


def _error(row: Observation, found: Overheads, prior: Overheads) -> float:
    return predicted_tpot_ms(row, found, prior) / row.tpot_ms - 1


def main() -> None:
    """Print both tables, then their means as one line of JSON."""
    kinds: dict[str, list[float]] = {}
    for kind, what, errors in estimates():
        kinds.setdefault(kind, []).extend(np.abs(errors).tolist())
        shown = " ".join(f"{100 * error:+4.0f}" for error in errors)
        print(f"{kind:14} {np.mean(np.abs(errors)):6.1%}  [{shown} ] %  {what}")
    figures = {kind: {"mean": float(np.mean(v)), "most": float(np.max(v))} for kind, v in kinds.items()}
    print("\nTPOT of published runs, mean absolute error with what was left out:")
    for name, errors_by_run in left_out():
        print(f"{name:20} " + ", ".join(f"{run} {value:.1%}" for run, value in errors_by_run.items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
