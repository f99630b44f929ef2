"""Figures of the live side: predicted against measured steps, and validation by load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy.typing as npt
import pandas as pd
from matplotlib import pyplot as plt

from ersim.steptime import Calibration
from ersim.util.files import write_atomically
from experiments.figures import COLOURS, STYLE

SHOWN: Mapping[str, str] = {
    "output_throughput": "output tokens per second",
    "median_ttft_ms": "TTFT median, ms",
    "median_tpot_ms": "TPOT median, ms",
    "p99_itl_ms": "ITL p99, ms",
    "median_e2el_ms": "E2E median, ms",
    "p99_e2el_ms": "E2E p99, ms",
}


def predicted_against_measured(
    predicted_s: npt.NDArray[Any], measured_s: npt.NDArray[Any], mixed: npt.NDArray[Any],
    calibration: Calibration, path: Path,
) -> None:  # fmt: skip
    """One dot per recorded step on logarithmic axes, the diagonal, and the held-out error."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 6.0))
        for chosen, label, colour in (
            (~mixed, "decode only", COLOURS[0]),
            (mixed, "with prefill", COLOURS[1]),
        ):
            axes.scatter(
                1e3 * measured_s[chosen], 1e3 * predicted_s[chosen], s=8, alpha=0.4, color=colour, label=label
            )
        low, high = 1e3 * measured_s.min(), 1e3 * measured_s.max()
        axes.plot([low, high], [low, high], color="black", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="measured step, ms", ylabel="predicted step, ms")
        held_out = 100 * calibration.fit["held_out_mape"]
        axes.set_title(f"{calibration.name}: held-out error {held_out:.1f} %")
        axes.legend(frameon=False)
        write_atomically(path, lambda temporary: figure.savefig(temporary, bbox_inches="tight"))
        plt.close(figure)


def validation_figure(
    rows: pd.DataFrame, title: str, path: Path, metrics: Sequence[str] = tuple(SHOWN)
) -> None:
    """Measured and predicted by load, one panel per metric; the band is the predicted interval."""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 3, figsize=(13.5, 7.6))
        for axes, metric in zip(grid.flat, metrics, strict=True):
            part = rows[rows["metric"] == metric].sort_values("users")
            if part["low"].notna().all():
                axes.fill_between(part["users"], part["low"], part["high"], color=COLOURS[0], alpha=0.2)
            axes.plot(part["users"], part["predicted"], color=COLOURS[0], marker="o", label="predicted")
            axes.plot(
                part["users"], part["measured"], color=COLOURS[1], marker="s", ls="--", label="measured"
            )
            axes.set_xscale("log", base=2)
            axes.set_xticks(part["users"], [str(users) for users in part["users"]])
            axes.set(xlabel="users", ylabel=SHOWN.get(metric, metric), ylim=(0, None))
        grid.flat[0].legend(frameon=False)
        figure.suptitle(title)
        figure.tight_layout()
        write_atomically(path, lambda temporary: figure.savefig(temporary, bbox_inches="tight"))
        plt.close(figure)
