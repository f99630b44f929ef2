"""The figures of a sweep: each metric against users, one line per fleet; cost against tail latency.

Readable without the code: units on the axes, lines labelled where they end, colours of Okabe and
Ito's palette (distinguishable with every common colour blindness) and a marker of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ersim.util.files import write_atomically
from experiments.comparison import alike

# Okabe & Ito (2008), "Color Universal Design"; yellow left out: too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 110,
    "savefig.dpi": 110,
}


@dataclass(frozen=True)
class Panel:
    """One metric: its columns (line, lower and upper edge of the band), what to call it, its scale."""

    name: str
    title: str
    axis: str
    line: str
    low: str | None
    high: str | None
    scale: float = 1.0
    log: bool = True
    band: str = ""


PANELS = (
    Panel(
        "throughput",
        "Output throughput",
        "output tokens per second",
        "output_throughput",
        "output_throughput_low",
        "output_throughput_high",
        band="band: 90 % interval",
    ),
    Panel(
        "ttft",
        "Time to first token (TTFT)",
        "seconds",
        "median_ttft_ms",
        "median_ttft_ms",
        "p99_ttft_ms",
        scale=1e-3,
        band="line: median, bars: its 90 % interval, band: up to p99",
    ),
    Panel(
        "tpot",
        "Time per output token (TPOT)",
        "milliseconds",
        "median_tpot_ms",
        "median_tpot_ms",
        "p99_tpot_ms",
        band="line: median, bars: its 90 % interval, band: up to p99",
    ),
    Panel(
        "e2e",
        "End-to-end latency (E2E)",
        "seconds",
        "median_e2el_ms",
        "median_e2el_ms",
        "p99_e2el_ms",
        scale=1e-3,
        band="line: median, bars: its 90 % interval, band: up to p99",
    ),
)
ALIKE = "best, or not to be told apart from it"
COST_X, COST_Y, QUALITY = "p99_ttft_ms", "usd_per_mtok_output", "mean_score"


def write_figures(frame: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draw all figures that the finished jobs allow into `folder`; returns the PNGs written."""
    from experiments.routing_figure import draw_routers, several_routers

    done = finished = frame[frame["status"] == "finished"]
    if done.empty:
        return []
    used = {
        COST_X,
        COST_Y,
        QUALITY,
        *(name for panel in PANELS for name in (panel.line, panel.low, panel.high)),
        *(f"{panel.line}{end}" for panel in PANELS for end in ("_low", "_high")),
    }
    figures = [name for name in done.columns if name in used]
    done = pd.DataFrame(
        {"line": done["label"], "users": done["users"], **{name: done[name] for name in figures}}
        | {f"{panel.line} alike": _alike(finished, panel.line) for panel in PANELS if panel.line in finished}
    )
    lines = list(dict.fromkeys(done["line"]))
    points = done.groupby(["line", "users"], sort=False).mean(numeric_only=True).reset_index()
    written = []
    with plt.rc_context(STYLE):
        panels = [panel for panel in PANELS if panel.line in points and points[panel.line].notna().any()]
        for panel in panels:
            written.append(_save(_one(points, lines, panel, title), folder / f"{panel.name}.png"))
        if panels:
            written.append(_save(_overview(points, lines, panels, title), folder / "overview.png"))
        if {COST_X, COST_Y} <= set(points) and points[COST_Y].notna().any():
            written.append(_save(_cost(points, lines, title), folder / "cost.png"))
            if QUALITY in points and points[QUALITY].notna().any():
                written.append(_save(_quality(points, lines, title), folder / "quality.png"))
        if several_routers(finished):
            written.append(_save(draw_routers(finished, title), folder / "routers.png"))
    return written


def _alike(finished: pd.DataFrame, column: str) -> pd.Series:
    """1 for points that are the best of several lines at their load or cannot be told apart from it."""
    marks = alike(finished, column) if finished["line"].nunique() > 1 else set()
    pairs = zip(finished["line"], finished["users"], strict=True)
    return pd.Series([float(pair in marks) for pair in pairs], index=finished.index)


def _save(figure: Figure, path: Path) -> Path:
    write_atomically(path, lambda temporary: figure.savefig(temporary))
    plt.close(figure)
    return path


def _one(points: pd.DataFrame, lines: Sequence[str], panel: Panel, title: str) -> Figure:
    figure, axes = plt.subplots(figsize=(10.0, 5.4))
    figure.subplots_adjust(left=0.09, right=0.74, top=0.88, bottom=0.11)
    _draw(axes, points, lines, panel, bands=True, labels=True)
    axes.set_title(f"{panel.title}\n", loc="left")
    note = f"{title}; {panel.band}" if panel.high in points else title
    if len(lines) > 1:
        note += f"; hollow: {ALIKE}"
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=9, color="#555555")
    return figure


def _overview(points: pd.DataFrame, lines: Sequence[str], panels: Sequence[Panel], title: str) -> Figure:
    figure, grid = plt.subplots(2, 2, figsize=(14.0, 8.8))
    figure.subplots_adjust(left=0.075, right=0.825, top=0.90, bottom=0.07, wspace=0.18, hspace=0.32)
    for i, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
        _draw(axes, points, lines, panel, bands=False, labels=i % 2 == 1)
        median = "" if panel.name == "throughput" else ", median"
        axes.set_title(f"{panel.title}{median}")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    note = f"{title}; hollow: {ALIKE}" if len(lines) > 1 else title
    figure.suptitle(note, x=0.075, y=0.975, ha="left", fontsize=11, color="#555555")
    return figure


def _draw(
    axes: Axes, points: pd.DataFrame, lines: Sequence[str], panel: Panel, *, bands: bool, labels: bool
) -> None:
    """One line per fleet on log axes, with its band and a label where it ends."""
    ends = []
    for index, line in enumerate(lines):
        own = points[points["line"] == line].sort_values("users")
        users, values = own["users"].to_numpy(float), own[panel.line].to_numpy(float) * panel.scale
        colour, marker = _look(index)
        axes.plot(users, values, _dash(index), color=colour, marker=marker, markersize=5, linewidth=1.8)
        mark = own.get(f"{panel.line} alike")
        if mark is not None and mark.any():
            best = mark.to_numpy(bool)
            hollow: Any = {
                "markerfacecolor": "white",
                "markeredgecolor": colour,
                "markersize": 5,
                "zorder": 3,
            }
            axes.plot(users[best], values[best], linestyle="none", marker=marker, **hollow)
        if bands and panel.low in own and panel.high in own:
            low, high = own[panel.low].to_numpy(float), own[panel.high].to_numpy(float)
            axes.fill_between(
                users, low * panel.scale, high * panel.scale, color=colour, alpha=0.10, linewidth=0
            )
            axes.plot(users, high * panel.scale, color=colour, linewidth=0.8, linestyle=":")
        if bands:
            _interval_bars(axes, own, panel, colour)
        if len(values) and np.isfinite(values[-1]):
            ends.append((users[-1], float(values[-1]), line, colour))
    if points["users"].nunique() > 1:
        axes.set_xscale("log")
    if panel.log:
        axes.set_yscale("log")
    axes.set_xlabel("concurrent users")
    axes.set_ylabel(panel.axis)
    _plain_ticks(axes)
    axes.set_xticks(_user_ticks(sorted(points["users"].unique())))
    if labels:
        _label_ends(axes, ends)


def _interval_bars(axes: Axes, own: pd.DataFrame, panel: Panel, colour: str) -> None:
    """The line's own 90 % interval at each load, where the band shows something else."""
    low, high = f"{panel.line}_low", f"{panel.line}_high"
    if low in own and high in own and panel.low != low:
        ends = [own[name].to_numpy(float) * panel.scale for name in (low, high)]
        floor = 0.2 * own[panel.line].to_numpy(float) * panel.scale  # an end of zero has no place on log axes
        axes.vlines(own["users"], np.maximum(ends[0], floor), ends[1], color=colour, linewidth=2.2, alpha=0.5)


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of a line; no two alike among the first 64."""
    turn = index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], MARKERS[(index + turn) % len(MARKERS)]


def _dash(index: int) -> str:
    """Solid for the first lines, dashed once the colours come round again."""
    return "-" if index < len(COLOURS) else "--"


def _user_ticks(users: Sequence[int]) -> list[int]:
    """At most six ticks, powers of ten first."""
    tens = [count for count in users if str(count).strip("0") == "1"]
    return tens if len(tens) >= 2 else list(users)[:: max(1, len(users) // 6)]


def _plain_ticks(axes: Axes) -> None:
    """1,000 rather than 10^3."""
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log" and high / max(low, 1e-12) < 100:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name right of its last point, pushed apart so that none covers another."""
    if not ends:
        return
    to_share = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(to_share.transform((x, y))[1]), y, x, name, colour) for x, y, name, colour in ends)
    gap = 0.062
    heights: list[float] = []
    for height, *_ in placed:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    over = max(0.0, heights[-1] - 1.0)
    heights = [height - over for height in heights]
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for height, (_, y, x, name, colour) in zip(heights, placed, strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=10,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0.0, 0.5),  # from the text's left end: from its middle it would cross others
            },
        )


def _cost(points: pd.DataFrame, lines: Sequence[str], title: str) -> Figure:
    """Cost against p99 TTFT: one curve per fleet through its loads; lower left is better."""
    figure, axes = plt.subplots(figsize=(10.0, 5.6))
    figure.subplots_adjust(left=0.08, right=0.74, top=0.88, bottom=0.11)
    shared = _same_loads(points)
    for index, line in enumerate(lines):
        own = points[(points["line"] == line) & points[COST_Y].notna()].sort_values("users")
        if own.empty:
            continue
        x, y = own[COST_X].to_numpy(float) * 1e-3, own[COST_Y].to_numpy(float)
        colour, marker = _look(index)
        axes.plot(x, y, _dash(index), color=colour, marker=marker, markersize=5, linewidth=1.6, label=line)
        for users, here, cost in zip(own["users"], x, y, strict=True):
            if users == own["users"].max() and not shared:
                axes.annotate(
                    f"{users:,.0f}",
                    (here, cost),
                    textcoords="offset points",
                    xytext=(4, 5),
                    fontsize=8,
                    color=colour,
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("p99 TTFT, seconds")
    axes.set_ylabel("US$ per million output tokens")
    _plain_ticks(axes)
    axes.set_title("Cost against tail latency\n", loc="left")
    marked = (
        f"each curve's points: {shared} users, from its top" if shared else "users grow to the number shown"
    )
    note = f"{title}; {marked}; lower left is better"
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _same_loads(points: pd.DataFrame) -> str | None:
    """The users that every line was run with, as text; None if lines differ or there are too many."""
    loads = {tuple(sorted(group["users"])) for _, group in points[points[COST_Y].notna()].groupby("line")}
    if len(loads) != 1:
        return None
    (own,) = loads
    return ", ".join(f"{users:,.0f}" for users in own) if len(own) <= 8 else None


def _quality(points: pd.DataFrame, lines: Sequence[str], title: str) -> Figure:
    """Answer quality against cost, and against tail latency; a point's size is its throughput."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.0, 6.4), sharey=True)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.84, bottom=0.27, wspace=0.06)
    known = points[points[QUALITY].notna()]
    largest = float(known["output_throughput"].max())
    for axes, column, scale in ((left, COST_Y, 1.0), (right, COST_X, 1e-3)):
        routers = known[~known["line"].str.contains("oracle")]
        _draw_front(axes, routers[column].to_numpy(float) * scale, routers[QUALITY].to_numpy(float))
        for index, line in enumerate(lines):
            own = known[known["line"] == line].sort_values("users")
            colour, marker = _look(index)
            x, y = own[column].to_numpy(float) * scale, own[QUALITY].to_numpy(float)
            size = 20 + 180 * own["output_throughput"].to_numpy(float) / largest
            axes.plot(x, y, _dash(index), color=colour, linewidth=0.9, alpha=0.6)
            axes.scatter(x, y, s=size, color=colour, marker=marker, alpha=0.85, label=line)
    for axes, name in ((left, "US$ per million output tokens"), (right, "p99 TTFT, seconds")):
        axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel("answer quality (share correct)")
    figure.suptitle("Quality, cost, throughput and tail latency", x=0.07, ha="left", weight="bold")
    note = (
        f"{title}; along each line {known['users'].min():,.0f} to {known['users'].max():,.0f} users; larger "
        "points: more tokens per second; upper left is best,\ngrey: the Pareto front, which no other "
        "policy and load beats on both axes (the oracle, which sees the answers, left out)"
    )
    figure.text(0.07, 0.875, note, fontsize=9, color="#555555")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def pareto_front(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> list[int]:
    """Indices of the points that no other beats in both: x small, y large; x ascending."""
    front: list[int] = []
    for index in np.lexsort((-y, x)):
        if np.isfinite(x[index]) and (not front or y[index] > y[front[-1]]):
            front.append(int(index))
    return front


def _draw_front(axes: Axes, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> None:
    """The front as a broad grey step line behind the points."""
    front = pareto_front(x, y)
    axes.step(x[front], y[front], where="post", color="#BBBBBB", linewidth=7, alpha=0.6, zorder=0)
