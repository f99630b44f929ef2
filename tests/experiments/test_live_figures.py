"""The figure that lays a live run beside its prediction: every panel shows what the table says."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from experiments.live_figures import SHOWN, _lines, _shares, validation_figure


def table(experts: tuple[str, ...] = ("large", "small", "tiny")) -> pd.DataFrame:
    """Two loads; shares of the experts in the ratio 1 : 2 : 3 predicted, alike measured."""
    rows = []
    for users in (1, 4):
        for place, metric in enumerate(SHOWN):
            told = 10.0 * users + place
            rows.append((users, metric, 1.1 * told, told, 0.9 * told, 1.2 * told))
        for place, name in enumerate(experts):
            weight = (place + 1) / sum(range(1, len(experts) + 1))
            rows.append((users, f"share_{name}", 1 / len(experts), weight, None, None))
    return pd.DataFrame(rows, columns=["users", "metric", "measured", "predicted", "low", "high"])


def test_every_kind_of_figure_has_a_panel(tmp_path: Path) -> None:
    for kind in ("throughput", "ttft", "tpot", "itl", "e2el", "gateway"):
        assert any(kind in metric for metric in SHOWN), kind
    path = tmp_path / "validation.png"
    validation_figure(table(), "two loads", path)
    height, width, _ = plt.imread(path).shape
    assert height > 900 and width > 1200
    assert not plt.get_fignums(), "nothing is left open"


def test_a_line_panel_holds_both_sides_and_the_interval() -> None:
    figure, axes = plt.subplots()
    part = table()[lambda rows: rows["metric"] == "median_gateway_ms"]
    _lines(axes, part, "gateway")
    told, real = axes.get_lines()
    assert list(told.get_ydata()) == part["predicted"].tolist()
    assert list(real.get_ydata()) == part["measured"].tolist()
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (part["low"].min(), part["high"].max())
    plt.close(figure)


def test_shares_stand_side_by_side_and_add_up() -> None:
    figure, axes = plt.subplots()
    _shares(axes, table())
    heights = [patch.get_height() for patch in axes.patches]
    predicted, measured = heights[:6], heights[6:]
    assert predicted == pytest.approx([100 / 6] * 2 + [200 / 6] * 2 + [300 / 6] * 2)
    assert measured == pytest.approx([100 / 3] * 6)
    tops = [patch.get_y() + patch.get_height() for patch in axes.patches]
    assert max(tops) == pytest.approx(100)
    assert max(tops) < axes.get_ylim()[1], "room for the legend"
    centres = [patch.get_x() + patch.get_width() / 2 for patch in axes.patches]
    assert centres[6] - centres[0] == pytest.approx(0.4), "measured stands to the right of predicted"
    plt.close(figure)
