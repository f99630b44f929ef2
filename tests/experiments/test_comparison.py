"""The comparison table: what is marked as best, and how unfinished jobs show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ersim.errors import DataError
from experiments.comparison import compare, read_jobs, read_manifest, show
from experiments.figures import pareto_front, write_figures


def frame_of(rows: list[tuple[str, int, float, float, float]]) -> pd.DataFrame:
    """(line, users, throughput, low, high) as a comparison frame."""
    return pd.DataFrame(
        [
            {
                "line": line,
                "label": f"{line} label",
                "users": users,
                "status": "finished",
                "output_throughput": mean,
                "output_throughput_low": low,
                "output_throughput_high": high,
            }
            for line, users, mean, low, high in rows
        ]
    )


def marked(text: str, line: str) -> list[bool]:
    """Which cells of a line carry the mark of the best."""
    row = next(row for row in text.splitlines() if row.startswith(line))
    return ["*" in cell for cell in row.split()[1:]]


def test_the_best_and_what_cannot_be_told_apart_from_it_are_marked() -> None:
    frame = frame_of(
        [
            ("fast", 1, 100.0, 95.0, 105.0),
            ("alike", 1, 98.0, 90.0, 106.0),
            ("slow", 1, 50.0, 45.0, 55.0),
            ("fast", 10, 100.0, 95.0, 105.0),
            ("alike", 10, 200.0, 190.0, 210.0),
            ("slow", 10, 50.0, 45.0, 55.0),
        ]
    )
    text = show(frame)
    assert marked(text, "fast") == [True, False]
    assert marked(text, "alike") == [True, True]
    assert marked(text, "slow") == [False, False]


def test_without_intervals_only_the_best_is_marked() -> None:
    frame = frame_of([("a", 1, 2.0, 0, 0), ("b", 1, 1.0, 0, 0)])
    frame = frame.drop(columns=["output_throughput_low", "output_throughput_high"])
    assert marked(show(frame), "a") == [True] and marked(show(frame), "b") == [False]


def test_a_line_without_a_result_at_one_load_shows_a_gap() -> None:
    text = show(frame_of([("a", 1, 2.0, 1, 3), ("a", 10, 4.0, 3, 5), ("b", 1, 1.0, 0, 2)]))
    assert next(row for row in text.splitlines() if row.startswith("b")).split()[-1] == "-"


def test_jobs_are_finished_failed_or_missing(tmp_path: Path) -> None:
    jobs = [
        {
            "job": i,
            "folder": str(i),
            "line": "a",
            "label": "a",
            "fleet": "a",
            "users": 1,
            "seed": 0,
            "overrides": {},
        }
        for i in range(3)
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    for name, file in (("0", "summary.json"), ("1", "error.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps({"error": "broke", "output_throughput": 1.0}))
    manifest = read_manifest(tmp_path)
    frame = compare(read_jobs(tmp_path, manifest))
    assert list(frame["status"]) == ["finished", "failed", "missing"]
    assert frame.loc[1, "error"] == "broke"


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sweep"):
        read_manifest(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(DataError, match="no jobs"):
        read_manifest(tmp_path)


def test_figures_draw_every_line_in_a_colour_of_its_own(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    rows = [
        (name, users, users * 10.0 * (i + 1), 1.0, 9.0) for i, name in enumerate(names) for users in (1, 10)
    ]
    written = write_figures(frame_of(rows), tmp_path, "test")
    assert {path.name for path in written} == {"throughput.png", "overview.png"}
    from experiments.figures import COLOURS

    with Image.open(tmp_path / "throughput.png") as image:
        seen = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=2**24) or []}
    for colour in COLOURS[: len(names)]:
        assert tuple(bytes.fromhex(colour[1:])) in seen


def test_no_finished_job_no_figure(tmp_path: Path) -> None:
    frame = frame_of([("a", 1, 1.0, 0.0, 2.0)]).assign(status="failed")
    assert write_figures(frame, tmp_path, "test") == []
    assert show(frame) == "no job finished"


def test_the_pareto_front_is_what_nothing_beats_in_both() -> None:
    cost = np.array([3.0, 1.0, 2.0, 2.0, 4.0, 1.0, 5.0])
    quality = np.array([0.9, 0.5, 0.4, 0.7, 0.8, 0.6, 0.9])
    assert pareto_front(cost, quality) == [5, 3, 0]
    assert pareto_front(np.array([np.nan, 1.0]), np.array([1.0, 0.5])) == [1]


def test_a_sweep_of_routers_is_shown_side_by_side(tmp_path: Path) -> None:
    rows = [(name, users, users * 10.0, 1.0, 9.0) for name in ("cluster", "random") for users in (1, 10)]
    frame = frame_of(rows)
    assert "routers.png" not in {path.name for path in write_figures(frame, tmp_path, "test")}
    routed = frame.assign(
        **{
            "override:router": frame["line"],
            "load_imbalance": [2.0, 2.5, 1.0, 1.1],
            "mean_score": 0.5,
            "seed": 0,
        }
    )
    written = {path.name: path for path in write_figures(routed, tmp_path, "test")}
    assert written["routers.png"].stat().st_size > 5_000
    table = show(routed)
    assert "busiest expert over an even share" in table and "2.50" in table
    assert "busiest expert" not in show(frame.assign(load_imbalance=1.0))
