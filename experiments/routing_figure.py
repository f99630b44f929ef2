"""What each router of a sweep did, side by side: who was asked, how evenly, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import COLOURS

SWEPT = "override:router"
ROW_INCHES = 0.34


@dataclass(frozen=True)
class Bar:
    """One panel of bars: the column, its heading, its scale, and what an ideal router would have."""

    column: str
    title: str
    scale: float = 1.0
    form: str = ",.0f"
    ideal: float | None = None


BARS = (
    Bar("mean_score", "answer quality,\n% correct", 100.0, ".1f"),
    Bar("misroute_rate_by_domain", "sent to another\ndomain's expert, %", 100.0, ".0f", 0.0),
    Bar("strong_call_share", "sent to the\nlargest model, %", 100.0, ".0f"),
    Bar("load_imbalance", "busiest expert over\nan even share", 1.0, ".2f", 1.0),
    Bar("output_throughput", "output tokens\nper second"),
    Bar("p99_ttft_ms", "p99 TTFT,\nseconds", 1e-3, ",.1f"),
    Bar("usd_per_mtok_output", "US$ per million\noutput tokens", 1.0, ",.2f"),
    Bar("usd_per_correct_answer", "US$ per 1,000\ncorrect answers", 1e3, ",.2f"),
)


def several_routers(done: pd.DataFrame) -> bool:
    """Whether the sweep compares routers."""
    return SWEPT in done and done[SWEPT].nunique() > 1


def draw_routers(done: pd.DataFrame, title: str) -> Figure:
    """Bars for every line at the sweep's highest load; a whisker spans the seeds where there are several."""
    users = int(done["users"].max())
    rows = done[done["users"] == users]
    lines = list(dict.fromkeys(rows["label"]))
    bars = [bar for bar in BARS if bar.column in rows and rows[bar.column].notna().any()]
    height = 1.9 + ROW_INCHES * len(lines)
    figure, grid = plt.subplots(1, len(bars), figsize=(3.2 + 1.85 * len(bars), height), squeeze=False)
    widest = max(len(line) for line in lines)
    figure.subplots_adjust(
        left=min(0.42, 0.085 * widest / (3.2 + 1.85 * len(bars)) + 0.01),
        right=0.985, top=1 - 1.25 / height, bottom=0.15 / height, wspace=0.12,
    )  # fmt: skip
    for number, (axes, bar) in enumerate(zip(grid[0], bars, strict=True)):
        _panel(axes, rows, lines, bar, COLOURS[number % len(COLOURS)])
        axes.set_yticks(range(len(lines)), lines if number == 0 else [""] * len(lines))
    seeds = rows["seed"].nunique()
    figure.suptitle(f"What the router changes, {users:,} users", x=0.01, y=0.99, ha="left", weight="bold")
    note = f"{title}; bar: mean of {seeds} seeds, whisker: least to greatest" if seeds > 1 else title
    figure.text(0.01, 1 - 0.5 / height, note, fontsize=9, color="#555555")
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, lines: list[str], bar: Bar, colour: str) -> None:
    """One figure's bars, the value written at each."""
    groups = [
        rows.loc[rows["label"] == line, bar.column].dropna().to_numpy(float) * bar.scale for line in lines
    ]
    top = max((float(group.max()) for group in groups if len(group)), default=1.0)
    for place, group in enumerate(groups):
        if not len(group):
            continue
        mean = float(group.mean())
        spread = np.array([[mean - group.min()], [group.max() - mean]])
        axes.barh(place, mean, color=colour, alpha=0.75, height=0.7)
        if len(group) > 1:
            axes.errorbar(mean, place, xerr=spread, color="#333333", linewidth=0.9, capsize=2)
        axes.text(
            1.02 * max(mean, group.max()) + 0.01 * top, place, f"{mean:{bar.form}}", va="center", fontsize=8
        )
    if bar.ideal is not None:
        axes.axvline(bar.ideal, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.32 * top if top > 0 else 1)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_title(bar.title, fontsize=9, weight="normal")
