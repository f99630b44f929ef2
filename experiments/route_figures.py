"""Figures of a router comparison: quality curves with their spread, domain confusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ersim.util.files import write_atomically
from experiments.figures import COLOURS, STYLE
from experiments.route_baselines import SINGLE
from experiments.route_judging import Outcome


def _save(figure: Figure, path: Path) -> Path:
    write_atomically(path, lambda temporary: figure.savefig(temporary, bbox_inches="tight"))
    plt.close(figure)
    return path


def _legend_name(outcome: Outcome) -> str:
    spread = outcome.spread()
    if "apgr" in spread:
        return f"{outcome.router}: {spread['apgr'].mean:.3f}"
    return outcome.router


def draw_pair(outcomes: Sequence[Outcome], title: str, path: Path) -> Path:
    """Mean answer quality against the share of strong calls, the best router's band over splits."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.5, 5.2))
        ranked = sorted((o for o in outcomes if o.curves), key=lambda o: -o.spread()["apgr"].mean)
        best = next((o for o in ranked if not o.router.startswith(("random", "oracle"))), None)
        coloured = iter(COLOURS)
        for outcome in ranked:
            plain = outcome.router.startswith(("random", "oracle"))
            colour = "#999999" if plain else next(coloured, "#7F7F7F")
            quality = np.array([curve[1] for curve in outcome.curves])
            share = outcome.curves[0][0]
            style = ("--" if outcome.router == "random" else ":") if plain else "-"
            axes.plot(100 * share, quality.mean(axis=0), style, color=colour, label=_legend_name(outcome))
            if outcome is best:
                band = quality.min(axis=0), quality.max(axis=0)
                axes.fill_between(100 * share, *band, color=colour, alpha=0.15, lw=0)
        for outcome in outcomes:
            if outcome.router == SINGLE:
                axes.axhline(outcome.spread()["quality"].mean, color="#999999", lw=0.8, label=SINGLE)
        axes.set_xlabel("share of requests sent to the strong model (%)")
        axes.set_ylabel("mean answer quality (share correct)")
        axes.set_title(
            f"{title}; band: range of the best over {len(outcomes[0].figures)} splits", fontsize=11
        )
        axes.legend(title="router: APGR", fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _save(figure, path)


def draw_many(outcomes: Sequence[Outcome], title: str, path: Path) -> Path:
    """Mean answer quality against mean price, relative to the best single model's.

    Lines are the judged prompts' own curves; rings are the weight that training chose for 40 %.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.5, 5.2))
        grid = np.linspace(0.11, 1.0, 120)
        coloured = iter(COLOURS)
        for outcome in outcomes:
            if not outcome.curves or outcome.router.startswith("oracle"):
                continue
            rows = [[_best_within(curve, price) for price in grid] for curve in outcome.curves]
            mean = np.array(rows).mean(axis=0)
            colour = next(coloured, "#7F7F7F")
            axes.plot(100 * grid, mean, color=colour, label=outcome.router)
            found = outcome.spread()
            if "gain_chosen_40pct" in found:
                quality = found["best_single_quality"].mean + found["gain_chosen_40pct"].mean
                axes.plot(100 * found["price_chosen_40pct"].mean, quality, "o", mfc="none", mec=colour, ms=8)
        _draw_bounds(axes, outcomes)
        single = [
            o.spread()["best_single_quality"].mean for o in outcomes if "best_single_quality" in o.spread()
        ]
        axes.plot([100], [single[0]], "k*", ms=13, label="best single model")
        axes.axhline(single[0], color="#999999", lw=0.8)
        axes.axvline(40, color="#999999", lw=0.8)
        axes.set_xlabel(
            "mean price per token (% of the best single model's); rings: chosen in training for 40 %"
        )
        axes.set_ylabel("mean answer quality")
        axes.set_title(title)
        axes.legend(fontsize=9, loc="lower right")
        return _save(figure, path)


def _draw_bounds(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """The random choice as a point; the oracle in words, for its curve would flatten all others."""
    spreads = {outcome.router.split(" ")[0]: outcome.spread() for outcome in outcomes}
    random, oracle = spreads.get("random", {}), spreads.get("oracle", {})
    if "price" in random:
        point = 100 * random["price"].mean, random["quality"].mean
        axes.plot(*point, "x", color="#555555", ms=9, mew=2, label="random model")
    if "price_to_match_best_single" in oracle:
        matched, best = oracle["price_to_match_best_single"].mean, oracle["quality"].mean
        note = (
            f"oracle (sees the answers): {best:.3f}; matches the best single model at {100 * matched:.0f} %"
        )
        axes.text(0.02, 0.97, note, transform=axes.transAxes, fontsize=9, va="top", color="#555555")


def _best_within(curve: tuple[np.ndarray, np.ndarray], price: float) -> float:
    affordable = curve[0] <= price + 1e-9
    return float(curve[1][affordable].max()) if affordable.any() else float("nan")


def draw_confusion(outcome: Outcome, title: str, path: Path) -> Path:
    """Where each domain's prompts went, in per cent of the domain."""
    assert outcome.confusion is not None
    rows, columns, table = outcome.confusion
    share = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(7.5, 6.2))
        axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
        for i in range(len(rows)):
            for j in range(len(columns)):
                if share[i, j] >= 0.5:
                    colour = "white" if share[i, j] > 55 else "black"
                    axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel("expert that the router chose")
        axes.set_ylabel("domain of the prompt")
        axes.set_title(title)
        return _save(figure, path)


def draw(outcomes: Sequence[Outcome], name: str, train: str, folder: Path) -> list[Path]:
    """All figures that the outcomes allow."""
    if any("apgr" in outcome.spread() for outcome in outcomes):
        return [draw_pair(outcomes, f"{name}: routers trained on {train}", folder / "quality.png")]
    if any("best_single_quality" in outcome.spread() for outcome in outcomes):
        return [
            draw_many(
                outcomes,
                f"{name}: quality against price, routers trained on {train}",
                folder / "quality_price.png",
            )
        ]
    best = max(
        (o for o in outcomes if o.confusion is not None), key=lambda o: o.spread()["domain_accuracy"].mean
    )
    title = f"{name}, {best.router}: where each domain's prompts go (%)"
    return [draw_confusion(best, title, folder / "confusion.png")]
