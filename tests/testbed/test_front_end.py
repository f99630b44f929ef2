"""What an expert's own front end takes of its core."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from ersim.errors import DataError
from ersim.steptime.calibration import CALIBRATION_DIR, load
from testbed.front_end import KEY, LARGEST, FrontEnd

SHIPPED = CALIBRATION_DIR / "h100-80gb" / "llama3.1-8b_bf16_tp1_tables.json"
KINDS = np.array(["1"] * 100 + ["prefill"] * 100 + ["4"] * 2)


def test_each_kind_has_its_own_share_and_a_few_steps_hardly_one() -> None:
    waited = np.array([0.1] * 100 + [0.05] * 100 + [0.9] * 2)
    found = FrontEnd.fit(waited, np.ones(202), KINDS)
    assert found is not None and found.usual == pytest.approx(0.1)
    assert found.by_kind == {
        "1": pytest.approx(0.1), "prefill": pytest.approx((100 * 0.05 + 10 * 0.1) / 110, abs=1e-4),
        "4": pytest.approx((2 * 0.9 + 10 * 0.1) / 12, abs=1e-4),
    }  # fmt: skip
    np.testing.assert_allclose(found.shares(np.array(["1", "more"])), 0.1)


def test_single_long_waits_are_others_work_and_no_share_is_beyond_reason() -> None:
    waited = np.full(202, 0.1)
    waited[::10] = 3.0
    found = FrontEnd.fit(waited, np.ones(202), KINDS)
    assert found is not None and found.by_kind["1"] == pytest.approx(0.1)
    busy = FrontEnd.fit(np.full(202, 0.6), np.ones(202), KINDS)
    assert busy is not None and {busy.usual, *busy.by_kind.values()} == {LARGEST}


def test_nothing_is_known_where_no_step_was_counted() -> None:
    assert FrontEnd.fit(np.full(202, np.nan), np.ones(202), KINDS) is None
    waited = np.concatenate([np.full(100, np.nan), np.full(102, 0.1)])
    found = FrontEnd.fit(waited, np.ones(202), KINDS)
    assert found is not None and "1" not in found.by_kind


def test_a_calibration_keeps_it() -> None:
    plain = load(SHIPPED)
    assert FrontEnd.of(plain) is None
    known = FrontEnd(0.1, {"1": 0.09})
    kept = dataclasses.replace(plain, provenance={KEY: dataclasses.asdict(known)})
    assert FrontEnd.of(kept) == known


@pytest.mark.parametrize(
    "stored", [5, {"usual": 0.1, "by_kind": [1]}, {"usual": "0.1"}, {"usual": 0.3}, {"by_kind": {"1": -0.1}}]
)
def test_what_no_front_end_can_take_is_refused(stored: Any) -> None:
    damaged = dataclasses.replace(load(SHIPPED), provenance={KEY: stored})
    with pytest.raises(DataError, match=r"provenance\.front_end must be shares by kind .*; profile again"):
        FrontEnd.of(damaged)
