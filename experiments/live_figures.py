"""Figures of the live side: predicted against measured steps, and validation by load."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

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
    "median_gateway_ms": "gateway overhead median, ms",
    "p99_gateway_ms": "gateway overhead p99, ms",
}
SHARE = "share_"
"""Rows of validation.csv that begin so hold an expert's share of the requests."""
LEGEND_COLUMNS = 3


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


def validation_figure(rows: pd.DataFrame, title: str, path: Path) -> None:
    """Measured and predicted by load: one panel per metric of `SHOWN`, then the shares of the experts.

    rows: columns users, metric, measured, predicted, low, high, as in validation.csv.
    """
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(3, 3, figsize=(13.5, 10.8))
        for axes, metric in zip(grid.flat, SHOWN, strict=False):
            _lines(axes, rows[rows["metric"] == metric].sort_values("users"), SHOWN[metric])
        grid.flat[0].legend(frameon=False, loc="upper left")
        _shares(grid.flat[-1], rows)
        figure.suptitle(title)
        figure.tight_layout()
        write_atomically(path, lambda temporary: figure.savefig(temporary, bbox_inches="tight"))
        plt.close(figure)


def _lines(axes: Axes, part: pd.DataFrame, label: str) -> None:
    """One metric against users; the band is the predicted interval."""
    if part["low"].notna().all():
        axes.fill_between(
            part["users"], part["low"], part["high"], color=COLOURS[0], alpha=0.2, linewidth=0,
            label="predicted interval",
        )  # fmt: skip
    axes.plot(part["users"], part["predicted"], color=COLOURS[0], marker="o", label="predicted")
    axes.plot(part["users"], part["measured"], color=COLOURS[1], marker="s", ls="--", label="measured")
    axes.set_xscale("log", base=2)
    axes.set_xticks(part["users"], [str(users) for users in part["users"]])
    axes.minorticks_off()
    axes.set(xlabel="users", ylabel=label, ylim=(0, None))


def _shares(axes: Axes, rows: pd.DataFrame) -> None:
    """Two columns for each load, predicted and measured, divided by expert."""
    part = rows[rows["metric"].str.startswith(SHARE)]
    table = part.pivot(index="users", columns="metric", values=["predicted", "measured"])
    experts = list(dict.fromkeys(part["metric"]))
    places = np.arange(len(table))
    for side, kind in enumerate(("predicted", "measured")):
        bottom = np.zeros(len(table))
        for metric, colour in zip(experts, cycle(COLOURS[2:]), strict=False):
            height = 100 * table[kind, metric].to_numpy(dtype=float)
            axes.bar(
                places + 0.4 * side - 0.2, height, 0.36, bottom, color=colour,
                alpha=0.55 if side else 1.0, hatch="//" if side else None, edgecolor="white", linewidth=0,
                label=None if side else metric.removeprefix(SHARE),
            )  # fmt: skip
            bottom += height
    axes.set_xticks(places, [str(users) for users in table.index])
    legend_rows = -(-len(experts) // LEGEND_COLUMNS)
    axes.set(xlabel="users (left predicted, right measured)", ylabel="requests by expert, %")
    axes.set_ylim(0, 108 + 17 * legend_rows)
    axes.set_yticks(range(0, 101, 25))
    axes.legend(frameon=False, loc="upper center", ncols=LEGEND_COLUMNS)
