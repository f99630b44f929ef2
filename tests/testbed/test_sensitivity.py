"""What steps make of the host's speed, fitted to synthetic steps of known exponents."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ersim.config import ExpertConfig
from ersim.errors import DataError
from ersim.steptime import load
from ersim.steptime.calibration import CALIBRATION_DIR
from testbed.probe_works import FORMER, WITH_PRODUCT
from testbed.profile_fit import Profiled, _alone, cleared_steps, fit
from testbed.profiling import PhaseTimes, ProfileRun
from testbed.sensitivity import (
    KEY,
    LEAST_EXPONENT,
    MORE,
    MORE_STD,
    ONE_ROW_EXPONENT,
    ONE_ROW_STD,
    Sensitivity,
    fit_sensitivity,
    one_row_share,
)
from testbed.speed_probe import UsualProbe
from testbed.step_log import LoggedStep, StepLog


def steps(plain: float, reads: float, wobble: float, count: int = 6000) -> tuple[np.ndarray, ...]:
    """Measured seconds, told seconds, share and slowness of steps on a host that wobbles for seconds."""
    rng = np.random.default_rng(3)
    share = rng.choice([1.0, 0.6, 0.2], count)
    told = 0.03 / share
    slow = np.exp(wobble * np.repeat(rng.standard_normal(count // 40), 40))
    noise = np.exp(0.05 * rng.standard_normal(count))
    return told * slow ** (plain + reads * share) * noise, told, share, slow


def test_exponents_are_found_where_the_host_moved() -> None:
    """As far from what is usual as one in ten may be."""
    for plain, reads in ((0.85, 0.3), (1.15, -0.3), (1.9, -0.5)):
        found = fit_sensitivity(*steps(plain, reads, wobble=0.3))
        assert found.plain == pytest.approx(plain, abs=0.06)
        assert found.reads == pytest.approx(reads, abs=0.1)


def test_a_quiet_profile_keeps_to_what_others_said() -> None:
    found = fit_sensitivity(*steps(0.2, 2.0, wobble=0.003))
    assert found.exponent(1.0) == pytest.approx(ONE_ROW_EXPONENT, abs=0.05)
    assert found.reads == pytest.approx(-MORE, abs=0.05)


def test_without_a_probe_every_step_is_as_it_was() -> None:
    measured, told, share, _ = steps(1.0, 0.0, wobble=0.2)
    assert fit_sensitivity(measured, told, share, np.ones(len(told))) == Sensitivity()
    assert fit_sensitivity(100 * told, told, share, np.full(len(told), 1.1)) == Sensitivity(), "stalls only"


def test_stalls_do_not_move_the_fit() -> None:
    measured, told, share, slow = steps(0.9, 0.5, wobble=0.2)
    plain = fit_sensitivity(measured, told, share, slow)
    stalled = (slow > 1.1) & (np.random.default_rng(0).random(len(slow)) < 0.15)
    found = fit_sensitivity(np.where(stalled, 3.0 * measured, measured), told, share, slow)
    assert (found.plain, found.reads) == pytest.approx((plain.plain, plain.reads), abs=0.1)


def test_no_step_is_faster_on_a_slower_host() -> None:
    found = fit_sensitivity(*steps(-0.8, 0.0, wobble=0.3))
    assert found.plain >= 0.0 and found.reads >= 0.0
    falling = fit_sensitivity(*steps(1.0, -3.0, wobble=0.3))
    assert falling.reads < 0.0 <= falling.plain + falling.reads and falling.is_sound()
    drawn = [falling.drawn(np.random.default_rng(seed)) for seed in range(50)]
    assert min(min(one.plain, one.plain + one.reads) for one in drawn) >= 0.0
    assert found.exponent(0.0) == found.exponents(np.array([0.0]))[0] == LEAST_EXPONENT


def test_exponents_are_drawn_as_wide_as_the_profile_leaves_them() -> None:
    quiet, moved = fit_sensitivity(*steps(0.9, 0.5, 0.003)), fit_sensitivity(*steps(0.9, 0.5, 0.3))
    spread = {}
    for name, found in (("quiet", quiet), ("moved", moved)):
        draws = [found.drawn(np.random.default_rng(seed)) for seed in range(300)]
        spread[name] = np.std([one.exponent(1.0) for one in draws]), np.std([one.reads for one in draws])
        assert np.mean([one.plain for one in draws]) == pytest.approx(found.plain, abs=0.06)
    assert spread["quiet"] == pytest.approx((ONE_ROW_STD, MORE_STD), rel=0.2), "it keeps to the prior"
    assert max(spread["moved"]) < 0.6 * ONE_ROW_STD
    assert Sensitivity(0.8, 0.4).drawn(np.random.default_rng(0)) == Sensitivity(0.8, 0.4)


def test_the_share_of_a_step_of_one_row_is_at_most_all_of_it() -> None:
    class Slow:
        def step_s(self, batch: object) -> float:
            return 0.02

    np.testing.assert_allclose(one_row_share(Slow(), np.array([0.01, 0.02, 0.08])), [1.0, 1.0, 0.25])
    felt = Sensitivity(0.8, 0.6)
    each = felt.slowed_each(np.array([1.5, 1.5, 1.0]), np.array([1.0, 0.25, 1.0]))
    np.testing.assert_allclose(each, [1.5**1.4, 1.5**0.95, 1.0])
    assert felt.slowed(1.5, 0.25) == pytest.approx(each[1])


def test_a_calibration_tells_what_its_profile_found() -> None:
    known = load(sorted(CALIBRATION_DIR.rglob("*.json"))[0])
    assert Sensitivity.of(known) == Sensitivity(), "no live profile"
    live = dataclasses.replace(known, provenance={KEY: {"plain": 0.8, "reads": 0.4}})
    assert Sensitivity.of(live) == Sensitivity(0.8, 0.4)
    for wrong in (
        {"plain": -0.1},
        {"plain": 0.5, "reads": -0.6},
        {"reads": "much"},
        {"plain": float("nan")},
        {"plain": "0.9"},
        {"covariance": [[1.0, 2.0], [2.0, 1.0]]},
        {"covariance": [[float("nan"), 0.0], [0.0, 1.0]]},
        {"covariance": [[1.0]]},
        {"x": 1},
    ):
        with pytest.raises(DataError, match=f"{KEY}: .*; profile again"):
            Sensitivity.of(dataclasses.replace(known, provenance={KEY: wrong}))


def profiled(plain: float, reads: float, probed: bool = True) -> tuple[StepLog, ProfileRun]:
    """A server alone, decode steps of 20 ms and 1 ms a row, on a host that wobbles for seconds."""
    rng, steps, clock = np.random.default_rng(4), [], 0.0
    for number in range(4000):
        if number % 80 == 0:
            slow = float(np.exp(0.3 * rng.standard_normal()))
        rows = (1, 4, 16, 64)[number // 20 % 4]
        told = 0.02 + 0.001 * rows
        took = told * slow ** (plain + reads * min(1.0, 0.021 / told)) if probed else told
        context = rows * (32 + number % 20)
        steps.append(
            LoggedStep(
                number, clock, clock + 1e-4, clock + took - 1e-4, clock + took, rows, 0, 1, rows, context,
                32 + number % 20, (), (), (), rows, 1e-5, None, 2e-4 * slow if probed else None,
            )
        )  # fmt: skip
        clock += took
    meta = {
        "async_scheduling": False, "vllm_version": "0.32.0", "num_blocks": 1000, "max_num_seqs": 128,
        "max_num_batched_tokens": 2048, "max_model_len": 4096, "block_size": 16, "policy": "fcfs",
        "enable_chunked_prefill": True, "enable_prefix_caching": True, "long_prefill_token_threshold": 0,
        "watermark": 0.0, "scheduler_reserve_full_isl": True,
    }  # fmt: skip
    return StepLog(meta, steps, {}), ProfileRun([PhaseTimes("decode", -1.0, clock + 1.0, 1, 0)])


def test_a_profile_is_fitted_to_what_steps_take_on_a_steady_host() -> None:
    log, run = profiled(0.9, 0.2)
    expert = ExpertConfig(model="llama-36m", precision="bf16", gpu="cpu")
    found = fit(Profiled(expert, "tiny", log, run, "cpu", 0))
    felt = Sensitivity.of(found)
    assert felt.plain == pytest.approx(0.9, abs=0.1) and felt.reads == pytest.approx(0.2, abs=0.12)
    assert found.fit["held_out_mape"] < 0.03
    alone = _alone(found)
    batches, cleared = cleared_steps(log, run, found, alone)
    usual = UsualProbe.of(found)
    assert usual is not None and usual.work == FORMER
    named = dataclasses.replace(log, meta={**log.meta, "speed_probe": WITH_PRODUCT})
    again = UsualProbe.of(fit(Profiled(expert, "tiny", named, run, "cpu", 0)))
    assert again == dataclasses.replace(usual, work=WITH_PRODUCT)
    at_reference = np.array([alone.step_s(batch) for batch in batches])
    assert np.median(np.abs(cleared / at_reference - 1)) < 0.03


def test_a_profile_without_probes_is_fitted_once_and_as_it_is() -> None:
    log, run = profiled(0.8, 0.6, probed=False)
    expert = ExpertConfig(model="llama-36m", precision="bf16", gpu="cpu")
    found = fit(Profiled(expert, "tiny", log, run, "cpu", 0))
    assert Sensitivity.of(found) == Sensitivity() and UsualProbe.of(found) is None
    assert found.fit["held_out_mape"] < 0.01
