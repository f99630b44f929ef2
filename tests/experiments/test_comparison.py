"""The comparison table: what is marked as best, and how unfinished jobs show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ersim.errors import DataError
from ersim.results import prediction_interval
from experiments.comparison import compare, judge, read_jobs, read_manifest, show
from experiments.figures import pareto_front, write_figures
from experiments.pairs import ALL_PAIRS, write_differences


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


def sweep_of(tmp_path: Path, lines: dict[str, list[float]], users: int = 1) -> list[dict[str, Any]]:
    """Finished jobs whose replications had these throughputs, in folders of their own."""
    jobs = []
    for number, (line, values) in enumerate(lines.items()):
        home = tmp_path / str(number)
        home.mkdir(parents=True)
        (home / "replications.json").write_text(json.dumps([{"output_throughput": v} for v in values]))
        summary = {"output_throughput": float(np.mean(values)), "interval_level": 0.9}
        fixed = {"label": line, "fleet": line, "seed": 0, "folder": str(number), "overrides": {}}
        jobs.append(
            {"job": number, "line": line, "users": users, "home": home, "status": "finished"}
            | {"summary": summary, "error": None, **fixed}
        )
    return jobs


def test_pairs_tell_apart_what_overlapping_intervals_cannot(tmp_path: Path) -> None:
    shared = np.random.default_rng(4).normal(100.0, 10.0, 6)
    jobs = sweep_of(
        tmp_path,
        {"fast": list(1.05 * shared), "slow": list(shared), "twin": list(1.05 * shared)},
    )
    fast, slow = (prediction_interval([float(v) for v in values], 0.9) for values in (1.05 * shared, shared))
    assert fast is not None and slow is not None and fast[0] < slow[1], "the intervals do overlap"
    judged = judge(jobs)
    frame = compare(jobs, judged)
    text = show(frame)
    assert marked(text, "fast") == [True] and marked(text, "twin") == [True]
    assert marked(text, "slow") == [False]
    assert "paired by replication" in text
    row = frame.set_index("line").loc["slow"]
    assert row["output_throughput_vs_best"] == pytest.approx(1 / 1.05 - 1)
    assert row["output_throughput_vs_best_high"] < 0.0
    pairs = {frozenset((row.line, row.other)): row.told_apart for row in judged.itertuples()}
    assert pairs == {
        frozenset(("fast", "slow")): True,
        frozenset(("fast", "twin")): False,
        frozenset(("slow", "twin")): True,
    }
    assert write_differences(tmp_path, judged).read_text().startswith("users,figure,line,other,relative")


def test_what_differs_by_chance_alone_is_not_told_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    told = 0
    for trial in range(40):
        values = rng.normal(100.0, 10.0, (2, 5))
        told += int(
            judge(sweep_of(tmp_path / str(trial), {"a": list(values[0]), "b": list(values[1])}))[
                "told_apart"
            ].sum()
        )
    assert told <= 4


def test_single_replications_mark_only_the_best_and_say_so(tmp_path: Path) -> None:
    jobs = sweep_of(tmp_path, {"a": [2.0], "b": [1.9]})
    text = show(compare(jobs, judge(jobs)))
    assert marked(text, "a") == [True] and marked(text, "b") == [False]
    assert "not known" in text


def test_of_many_lines_each_is_judged_against_the_best_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = {f"line{i:02}": list((100.0 + i) * rng.normal(1.0, 0.01, 4)) for i in range(ALL_PAIRS + 1)}
    judged = judge(sweep_of(tmp_path, lines))
    assert len(judged) == ALL_PAIRS and judged["from_best"].all()


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


def test_the_cost_figure_names_the_loads_that_all_lines_share() -> None:
    from experiments.figures import COST_Y, _same_loads

    rows = [(name, users, users * 10.0, 1.0, 9.0) for name in ("a", "b") for users in (1, 10, 1000)]
    frame = frame_of(rows).assign(**{COST_Y: 1.0})
    assert _same_loads(frame) == "1, 10, 1,000"
    assert _same_loads(frame.iloc[:-1]) is None


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
