"""What a calibration says of the engine that it was recorded on, and which engines it cannot be made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ersim.config import EngineSettings, ExpertConfig
from ersim.errors import ConfigError
from ersim.steptime import build_expert_model
from ersim.steptime.calibration import save
from testbed.core_time import stretch, waited_for_others_s
from testbed.front_end import FrontEnd
from testbed.profile_fit import Profiled, _alone, check_kv_cache, cleared_steps, fit, profile_steps
from testbed.profiling import PhaseTimes, ProfileRun
from testbed.standing import standing
from testbed.step_log import LoggedStep, StepLog

META = {
    "async_scheduling": False, "vllm_version": "0.32.0", "num_blocks": 4321, "max_num_seqs": 128,
    "max_num_batched_tokens": 2048, "max_model_len": 4096, "block_size": 16, "policy": "fcfs",
    "enable_chunked_prefill": True, "enable_prefix_caching": True, "long_prefill_token_threshold": 0,
    "watermark": 0.0, "scheduler_reserve_full_isl": True,
}  # fmt: skip


def decode_steps() -> StepLog:
    """Steps of 20 ms and 1 ms a row, of one to 64 rows."""
    steps, clock = [], 0.0
    for number in range(1200):
        rows = (1, 4, 16, 64)[number // 20 % 4]
        took, context = 0.02 + 0.001 * rows, 32 + number % 20
        steps.append(
            LoggedStep(
                number, clock, clock + 1e-4, clock + took - 1e-4, clock + took, rows, 0, 1, rows,
                rows * context, context, (), (), (), rows, 1e-5,
            )
        )  # fmt: skip
        clock += took
    return StepLog(META, steps, {})


def test_recorded_blocks_hold_for_the_cache_that_they_were_recorded_with(tmp_path: Path) -> None:
    expert = ExpertConfig("llama3.1-8b", "bf16", "h200-141gb")
    run = ProfileRun([PhaseTimes("decode", -1.0, 1e6, 1, 0)])
    path = tmp_path / "made.json"
    save(fit(Profiled(expert, "made", decode_steps(), run, "gpu", 0)), path)

    def blocks(**settings: object) -> int:
        engine = EngineSettings(max_num_seqs=128, max_num_batched_tokens=2048, block_size=16, **settings)  # type: ignore[arg-type]
        asked = ExpertConfig("llama3.1-8b", "bf16", "h200-141gb", calibration=str(path), engine=engine)
        return build_expert_model(asked, "e").engine.kv_blocks

    assert blocks() == 4321
    assert blocks(kv_cache_dtype="fp8") > 100_000, "16-bit blocks were taken for blocks of half the bytes"
    assert 20_000 < blocks(gpu_memory_utilization=0.5) < blocks(gpu_memory_utilization=0.9)


def test_a_profile_is_made_with_sixteen_bits_of_cache() -> None:
    check_kv_cache(ExpertConfig(), "fleet.experts.a")
    narrow = ExpertConfig(engine=EngineSettings(kv_cache_dtype="fp8"))
    with pytest.raises(
        ConfigError, match=r"^fleet\.experts\.a\.engine\.kv_cache_dtype must be auto for a prof"
    ):
        check_kv_cache(narrow, "fleet.experts.a")


def test_a_profiles_steps_are_those_of_its_phases_without_what_was_stolen() -> None:
    log = decode_steps()
    log = dataclasses.replace(log, steps=[dataclasses.replace(one, stolen_share=0.2) for one in log.steps])
    edge_s = log.steps[100].schedule_s - 1e-6
    phases = [PhaseTimes("warmup", -1.0, edge_s, 1, 0), PhaseTimes("decode", edge_s, 1e6, 1, 0)]
    batches, measured_s, slow = profile_steps(log, ProfileRun(phases), None)
    found = [(batch.decode_seqs, batch.decode_context_tokens) for batch in batches]
    assert found == [(step.decode_seqs, step.decode_context_tokens) for step in log.steps[100:]]
    np.testing.assert_allclose(measured_s, 0.8 * log.periods_s()[100:])
    np.testing.assert_array_equal(slow, np.ones(1100))


def test_what_the_front_end_takes_is_in_the_profile_and_in_what_is_laid_beside_it() -> None:
    """A tenth of each step's CPU time to the front end; every third step waits as long again for others.

    All of it on a clock on which a fifth of the time is stolen from the second half.
    """
    steps, clock, cpu_s, waited_s = [], 0.0, 0.0, 0.0
    for number, plain in enumerate(decode_steps().steps):
        worked = (plain.updated_s - plain.schedule_s) / 1.1
        waits, stretched = 0.1 * worked * (1 + (number % 3 == 0)), 1.25 if number >= 600 else 1.0
        end, began, queued = clock + stretched * (worked + waits), cpu_s, waited_s
        cpu_s, waited_s = cpu_s + worked, waited_s + stretched * waits
        moments = {"schedule_s": clock, "scheduled_s": clock + 1e-4, "update_s": end - 1e-4, "updated_s": end}
        counts = {"cpu_s": cpu_s, "cpu_start_s": began, "waited_s": waited_s, "waited_start_s": queued}
        steps.append(dataclasses.replace(plain, **moments, **counts))
        clock = end
    log = StepLog({**META, "one_thread": True}, steps, {})
    run = ProfileRun([PhaseTimes("decode", -1.0, 1e6, 1, 0)])
    expert = ExpertConfig("llama3.1-8b", "bf16", "cpu")
    made = fit(Profiled(expert, "made", log, run, "cpu", 0))
    own = FrontEnd.of(made)
    assert own is not None and own.by_kind == pytest.approx({"1": 0.1, "4": 0.1, "more": 0.1}, abs=2e-3)
    alone = _alone(made)
    rows = np.array([step.decode_seqs for step in steps])
    told_s = np.array([alone.step_s(step.batch()) for step in steps])
    np.testing.assert_allclose(told_s, 0.02 + 0.001 * rows, rtol=0.02)
    np.testing.assert_allclose(cleared_steps(log, run, made, alone)[1], 0.02 + 0.001 * rows, rtol=0.01)
    assert standing(log, run, alone, own=own).factor == pytest.approx(1.0, abs=0.01)
    assert standing(log, run, alone, own=None).factor < 0.95, "a start is not told without it"
    waits_s = waited_for_others_s(log, own) / stretch(log)
    assert waits_s.sum() == pytest.approx(0.1 * cpu_s / 3, rel=0.05)
