"""fleet.json: what it may say, and that it belongs to the calibrations beside it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ersim.config import ExpertConfig, FleetConfig
from ersim.errors import DataError
from ersim.prepare import Preparations
from ersim.steptime import Calibration
from ersim.steptime.calibration import CALIBRATION_DIR
from ersim.steptime.calibration import load as load_calibration
from ersim.steptime.calibration import save as save_calibration
from testbed.contention import Contention
from testbed.fleet_calibration import (
    FleetCalibration,
    calibration_digests,
    check_digests,
    load,
    save,
    with_calibrations,
)
from testbed.step_scatter import StepScatter

SHIPPED = CALIBRATION_DIR / "h100-80gb" / "llama3.1-8b_bf16_tp1_tables.json"
KNOWN = FleetCalibration(
    "f", {"a": "a.json"},
    {"a": Contention({"b": 0.1}, [[1.0, 0.2, 1e-4]], StepScatter([0.9, 1.1], [1.0]), 1.1, [0.98], 2e-4)},
    {"network_s": 0.001, "base_s": 0.0002, "routing_s": 0.0004, "backend_network_s": 0.003},
    [3, 6], "0.32.0", [[1, 0.001, -0.002, 0.001]], {"a": "d" * 64},
)  # fmt: skip
Place = tuple[str | int, ...]
A = r"contention\.a"


@pytest.mark.parametrize("text", ["[]", "null", "5", '"fleet"', '{"format": "other", "version": 6}', "{}"])
def test_what_is_no_fleet_calibration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "fleet.json").write_text(text)
    with pytest.raises(DataError, match=r"fleet\.json: not a fleet calibration .*; profile the fleet again$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("contention",), None, "contention must be an object, got null"),
        (("contention", "a"), [], A + r" must be an object, got \[\]"),
        (("contention", "a", "base"), None, A + r"\.base must be a number > 0, got null"),
        (("contention", "a", "base"), -1.0, A + r"\.base must be a number > 0, got -1\.0"),
        (("contention", "a", "base"), float("nan"), A + r"\.base must be a number > 0, got nan"),
        (("contention", "a", "token_wait_s"), -1e-4, A + r"\.token_wait_s must be a number >= 0"),
        (("contention", "a", "hand_out_tokens"), "2", A + r"\.hand_out_tokens must be a number >= 0"),
        (("contention", "a", "row_s"), 0.1, A + r"\.row_s must be absent"),
        (("contention", "a", "slowdowns", "b"), -0.1, A + r"\.slowdowns\.b must be a number >= 0, got -0\.1"),
        (("contention", "a", "refits"), {}, A + r"\.refits must be a list"),
        (("contention", "a", "refits", 0), [1.0], A + r"\.refits\[0\] must be 3 numbers, got \[1\.0\]"),
        (("contention", "a", "refits", 0), [1.0, None, 0.0], A + r"\.refits\[0\]\[1\] must be .*, got null"),
        (("contention", "a", "scatter"), {}, A + r"\.scatter\.decode is missing"),
        (("contention", "a", "scatter", "decode"), [-1.0], A + r"\.scatter\.decode\[0\] must be .* >= 0"),
        (("contention", "a", "rounds"), None, A + r"\.rounds must be a list of numbers, got null"),
        (("gateway",), {}, r"gateway\.network_s must be a number >= 0, got null"),
        (("gateway", "base_s"), "0", r"gateway\.base_s must be a number >= 0, got '0'"),
        (("gateway", "to_engine_s"), None, r"gateway\.to_engine_s must be a number, got null"),
        (("users",), 3, "users must be a list, got 3"),
        (("users", 0), 0, r"users\[0\] must be an integer >= 1, got 0"),
        (("waits", 0), [1, 0.1], r"waits\[0\] must be 4 numbers"),
        (("waits", 0, 1), None, r"waits\[0\]\[1\] must be a number, got null"),
        (("fleet",), None, "fleet must be a string, got null"),
        (("calibrations", "a"), 1, r"calibrations\.a must be a non-empty string, got 1"),
        (("digests",), {}, r"digests\.a must be the digest of that expert's calibration, got null"),
    ],
)  # fmt: skip
def test_a_damaged_fleet_calibration_is_one_line(
    tmp_path: Path, place: Place, value: Any, message: str
) -> None:
    path = save(KNOWN, tmp_path)
    data: Any = json.loads(path.read_text())
    *outer, last = place
    inside = copy.copy(data) if not outer else data
    for key in outer:
        inside = inside[key]
    inside[last] = value
    path.write_text(json.dumps(inside if not outer else data))
    with pytest.raises(DataError, match=rf"fleet\.json: {message}.*; profile the fleet again$"):
        load(tmp_path)


def test_one_that_lacks_a_key_names_it(tmp_path: Path) -> None:
    path = save(KNOWN, tmp_path)
    data = json.loads(path.read_text())
    for key in ("digests", "waits", "contention"):
        path.write_text(json.dumps({name: value for name, value in data.items() if name != key}))
        with pytest.raises(DataError, match=rf"fleet\.json: {key} is missing"):
            load(tmp_path)


def fitted(change: Callable[[Calibration], dict[str, Any]] = lambda _: {}) -> Calibration:
    """A calibration as a fit leaves it in memory, with NumPy's numbers and whole ones."""
    found = load_calibration(SHIPPED)
    theta = tuple(np.asarray(found.theta))
    return dataclasses.replace(found, **{"theta": theta, "residual_rel_std": 0, **change(found)})


def test_fleet_and_calibrations_belong_together(tmp_path: Path) -> None:
    """Here of a GPU, which no probe and no check ties to its calibration."""
    save_calibration(fitted(), tmp_path / "a.json")
    fleet = with_calibrations(FleetConfig("f", experts={"a": ExpertConfig()}), KNOWN, tmp_path)
    digests = calibration_digests(fleet, Preparations())
    known = dataclasses.replace(KNOWN, digests=digests)
    save(known, tmp_path)
    assert load(tmp_path) == known
    check_digests(load(tmp_path), calibration_digests(fleet, Preparations()), tmp_path)

    save_calibration(
        fitted(lambda item: {"theta": (2 * item.theta[0], *item.theta[1:])}), tmp_path / "a.json"
    )
    wrong = (
        r"a\.json: calibration of expert a \(\w{12}\) is not the one that .*fleet\.json was made with "
        r"\(\w{12}\); profile the fleet again$"
    )
    with pytest.raises(DataError, match=wrong):
        check_digests(load(tmp_path), calibration_digests(fleet, Preparations()), tmp_path)
    (tmp_path / "a.json").unlink()
    with pytest.raises(
        DataError, match=r"a\.json: no calibration of expert a there; profile the fleet again"
    ):
        calibration_digests(fleet, Preparations())
