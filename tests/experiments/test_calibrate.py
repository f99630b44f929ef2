"""The `ersim-calibrate` command's doings, without its command line."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest

from ersim.errors import ConfigError, DoesNotFitError
from ersim.steptime import list_files, load
from ersim.steptime.evaluate import PreparedStepTime
from ersim.types import Batch
from experiments.calibrate import CalibrateConfig, combinations, main, run, step_interval


def test_the_list_shows_every_calibration(capsys):
    figures = run(CalibrateConfig(list=True))
    shown = capsys.readouterr().out
    assert len(figures["calibrations"]) == len(list_files())
    assert "h100-80gb/llama3.1-8b_bf16_tp1_tables" in shown
    row = next(r for r in figures["calibrations"] if r["name"] == "h200-141gb/llama3.1-70b_int8_tp2_tables")
    measured = next(
        r for r in figures["calibrations"] if r["name"] == "h200-141gb/llama3.1-70b_fp8_tp2_tables"
    )
    assert row["derived"] and not measured["derived"]
    assert row["step_interval"] > measured["step_interval"]


def test_the_list_is_quick_and_its_interval_that_of_the_step_time():
    """What the list works out at once equals what drawn step times show (a second for a hundred files)."""
    path = next(p for p in list_files() if p.stem == "llama3.1-8b_bf16_tp1_tables")
    calibration = load(path)
    rng, batch = np.random.default_rng(1), Batch(32, 32, 32 * 1024, 1024, (), 32)
    sizes = {"max_tokens": 32, "max_seqs": 32, "max_context": 2048, "graphs": [], "asynchronous": True}
    times = [
        PreparedStepTime(calibration, calibration.sample_theta(rng), **sizes).step_s(batch)
        for _ in range(200)
    ]
    drawn = 1.645 * np.std(times) / np.mean(times)
    assert step_interval(calibration) == pytest.approx(drawn, rel=0.15)
    started = time.process_time()
    for file in list_files():
        step_interval(load(file))
    assert time.process_time() - started < 5.0  # about one on an idle core


def test_one_calibration_in_full(capsys):
    facts = run(CalibrateConfig(show="h100-80gb/llama3.1-8b_int4_tp1_tables"))
    assert "A100's ratio" in facts["derived"]
    assert json.loads(capsys.readouterr().out)["terms"]["weights"] > 0


def test_a_roofline_is_written_where_asked(tmp_path):
    path = tmp_path / "roofline.json"
    config = CalibrateConfig(source="roofline", gpu="l40s", precision="fp8", out=str(path))
    written = run(config)["written"]
    assert len(written) == 1
    assert not load(path).calibrated


def test_a_name_that_nobody_reads_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ersim-calibrate", "list=true", "+bogus=1"])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert end.value.code and "bogus is not known. There are at the top: data, gpu," in told.err
    assert not told.out


def test_all_leaves_out_what_does_not_fit():
    config = CalibrateConfig(gpu="h100-80gb", model="llama3.1-70b", precision="bf16,fp8", tp="all")
    assert [(p, tp) for _, _, p, tp in combinations(config)] == [
        *(("bf16", tp) for tp in (2, 4, 8)),
        *(("fp8", tp) for tp in (1, 2, 4, 8)),
    ]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"source": "guess"}, ConfigError, "source must be one of"),
        ({}, ConfigError, "data must be the path of the raw measurements"),
        ({"tp": "3"}, ConfigError, "tp must be one of"),
        ({"precision": "fp7"}, ConfigError, "precision must be one of"),
        ({"model": "llama3.1-70b"}, DoesNotFitError, "GB short on each GPU"),
        ({"source": "roofline", "tp": "all", "out": "x.json"}, ConfigError, "out names one file"),
        ({"source": "roofline", "out": "."}, ConfigError, "out must be a file to write"),
        ({"show": "nothing"}, ConfigError, "show.calibration must be one of"),
    ],
)
def test_what_cannot_be_done_is_explained(changes, error, match):
    with pytest.raises(error, match=match):
        run(CalibrateConfig(**changes))
