"""Power sampling against a stand-in for NVML: units, errors, GPUs that fail or tell less; figures of it."""

from __future__ import annotations

import dataclasses
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pynvml
import pytest

from ersim.config import EngineSettings, ExpertConfig, FleetConfig
from ersim.errors import DataError
from ersim.results import Gaps
from ersim.steptime.calibration import CALIBRATION_DIR
from ersim.steptime.calibration import load as load_calibration
from experiments import profile
from experiments.validate import _power, _power_kept
from testbed.expert_server import ServerSpec
from testbed.fleet import LiveFleet
from testbed.live_settings import read_live
from testbed.measured import power_figures
from testbed.measured_run import read_power, write_power
from testbed.plan import ProfilePlan
from testbed.power import COLUMNS, PowerLog, PowerSampler, power_model
from testbed.profile_fit import Profiled, fit
from testbed.profiling import PhaseTimes, Profiler, ProfileRun
from testbed.step_log import LoggedStep, StepLog

NAN = float("nan")
MEMORY_BYTES = 3 * 2**30
META = {
    "async_scheduling": False, "vllm_version": "0.32.0", "num_blocks": 1000, "max_num_seqs": 128,
    "max_num_batched_tokens": 2048, "max_model_len": 4096, "block_size": 16, "policy": "fcfs",
    "enable_chunked_prefill": True, "enable_prefix_caching": True, "long_prefill_token_threshold": 0,
    "watermark": 0.0, "scheduler_reserve_full_isl": True,
}  # fmt: skip


@dataclass
class Gpu:
    """A GPU that draws a steady power; lost after so many answers, and without what `lacks` names."""

    power_mw: int = 250_000
    answers: float = np.inf
    lacks: Sequence[str] = ()
    asked: int = 0


class FakeNvml(types.ModuleType):
    """The part of `pynvml` that is used: errors and structures are the real ones."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *gpus: Gpu, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.gpus, self.driver, self.shut = gpus, driver, False

    def nvmlInit(self) -> None:
        if not self.driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlShutdown(self) -> None:
        self.shut = True

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if index >= len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self.gpus[index]

    def nvmlDeviceGetPowerUsage(self, handle: Gpu) -> int:
        handle.asked += 1
        if handle.asked > handle.answers:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return handle.power_mw

    def nvmlDeviceGetMemoryInfo(self, handle: Gpu) -> Any:
        return pynvml.c_nvmlMemory_t(total=2**37, free=2**37 - MEMORY_BYTES, used=MEMORY_BYTES)

    def nvmlDeviceGetUtilizationRates(self, handle: Gpu) -> Any:
        self._told(handle, "utilisation")
        return pynvml.c_nvmlUtilization_t(gpu=75, memory=40)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Gpu) -> int:
        self._told(handle, "energy")
        return 5_000_000 + 2_000 * handle.asked

    def _told(self, handle: Gpu, what: str) -> None:
        if what in handle.lacks:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def sampled(
    monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, only: Sequence[int] = (), rounds: int = 6
) -> PowerLog:
    """What a sampler notes of these GPUs in at least so many rounds."""
    nvml = FakeNvml(*gpus)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    asked = [gpus[index] for index in only] or gpus
    deadline = time.monotonic() + 20
    with PowerSampler(0.001, only) as power:
        while min(gpu.asked for gpu in asked) < rounds:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    assert nvml.shut
    return power.log


def step(number: int, start_s: float, end_s: float, rows: int = 1) -> LoggedStep:
    context = rows * (32 + number % 20)
    return LoggedStep(
        number, start_s, start_s + 1e-4, end_s - 1e-4, end_s, rows, 0, 1, rows, context, 32 + number % 20,
        (), (), (), rows, 1e-5,
    )  # fmt: skip


def row(
    time_s: float, gpu: int, power_w: float, energy_j: float = NAN, memory_bytes: int = 0
) -> tuple[Any, ...]:
    return time_s, gpu, power_w, 0.5, memory_bytes, energy_j


def test_the_stand_in_has_the_names_of_nvml() -> None:
    names = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert len(names) == 8 and all(callable(getattr(pynvml, name)) for name in names)


def test_samples_have_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts milliwatts, percent, bytes and millijoules."""
    began_s = time.monotonic()
    log = sampled(monkeypatch, Gpu(), Gpu(power_mw=100_500))
    frame = log.frame()
    assert log.absent is None and tuple(frame) == COLUMNS
    assert frame["time_s"].between(began_s, time.monotonic()).all()
    assert frame["time_s"].is_monotonic_increasing
    assert frame["gpu"].tolist()[:4] == [0, 1, 0, 1]
    assert frame.groupby("gpu")["power_w"].unique().map(list).to_dict() == {0: [250.0], 1: [100.5]}
    assert set(frame["utilisation"]) == {0.75} and set(frame["memory_bytes"]) == {MEMORY_BYTES}
    first = frame[frame["gpu"] == 0]["energy_j"].to_numpy()
    assert first[0] == 5002.0 and np.diff(first).tolist() == [2.0] * (len(first) - 1)


def test_a_gpu_that_stops_answering_keeps_its_samples_and_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = sampled(monkeypatch, Gpu(), Gpu(answers=3))
    count = log.frame()["gpu"].value_counts()
    assert count[1] == 3 and count[0] >= 6
    assert log.absent == "GPU 1 stopped answering (GPU is lost)"
    write_power(log, tmp_path)
    kept = read_power(tmp_path)
    assert kept.absent == log.absent and kept.rows == log.rows
    figures = power_figures([kept], 10)
    assert figures["measured"] and figures["why"] == log.absent and figures["mean_w"] == 500.0


def test_a_gpu_without_an_energy_counter_is_integrated(monkeypatch: pytest.MonkeyPatch) -> None:
    log = sampled(monkeypatch, Gpu(lacks=["energy", "utilisation"]))
    frame = log.frame()
    assert log.absent is None and len(frame) >= 6
    assert frame["energy_j"].isna().all() and frame["utilisation"].isna().all()
    assert set(frame["power_w"]) == {250.0}
    seconds = frame["time_s"].iloc[-1] - frame["time_s"].iloc[0]
    assert log.joules() == pytest.approx(250.0 * seconds)


def test_only_the_gpus_asked_for_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpu(), Gpu(power_mw=90_000), Gpu(answers=0)
    log = sampled(monkeypatch, *gpus, only=[1])
    assert log.absent is None and set(log.frame()["gpu"]) == {1} and set(log.frame()["power_w"]) == {90.0}
    assert gpus[0].asked == gpus[2].asked == 0


def test_a_gpu_that_is_not_there_is_named_and_the_others_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(Gpu(), gpu := Gpu())
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with PowerSampler(0.001, [1, 7]) as power:
        while gpu.asked < 3:
            time.sleep(0.002)
    log = power.log
    assert log.absent == "GPU 7 cannot be sampled (Invalid Argument)" and set(log.frame()["gpu"]) == {1}
    with PowerSampler(0.001, [7]) as power:
        nvml.shut = False
    assert power.log.absent == log.absent and not power.log.rows and nvml.shut


def test_why_nothing_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, why in (
        (None, "nvidia-ml-py is not installed"),
        (FakeNvml(driver=False), "no NVIDIA GPU (NVML Shared Library Not Found)"),
        (FakeNvml(), "no NVIDIA GPU (NVML counts none)"),
    ):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        with PowerSampler(0.001) as power:
            pass
        assert power.log.absent == why and not power.log.rows
        assert power_figures([power.log], 5) == {"measured": False, "why": why}
    assert power_figures([], 5) == {"measured": False, "why": "not asked for"}


def test_an_interval_and_what_is_read_back(tmp_path: Path) -> None:
    rows = [row(float(t), t % 2, 100.0 + t, NAN if t % 2 else 10.0 * t) for t in range(8)]
    log = PowerLog(rows, "GPU 1 ...")
    part = log.between(2.0, 5.0)
    assert [item[0] for item in part.rows] == [2.0, 3.0, 4.0, 5.0] and part.absent == "GPU 1 ..."
    assert read_power(tmp_path).absent == "not measured"
    write_power(log, tmp_path)
    pd.testing.assert_frame_equal(read_power(tmp_path).frame(), log.frame())
    assert read_power(tmp_path).absent == "GPU 1 ..."
    (tmp_path / "whole").mkdir()
    write_power(PowerLog(log.rows), tmp_path / "whole")
    assert read_power(tmp_path / "whole").absent is None
    (tmp_path / "none").mkdir()
    write_power(PowerLog(absent="no NVIDIA GPU"), tmp_path / "none")
    assert read_power(tmp_path / "none") == PowerLog(absent="no NVIDIA GPU")


def test_what_was_sampled_is_kept_when_a_measurement_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(Gpu(), gpu := Gpu()))
    with pytest.raises(KeyboardInterrupt), _power_kept(tmp_path, [1]):
        while gpu.asked < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert set(read_power(tmp_path).frame()["gpu"]) == {1}


def test_the_gpus_of_a_host_whose_experts_use_none_are_not_sampled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(gpu := Gpu()))
    with _power_kept(tmp_path, None):
        time.sleep(0.25)
    assert gpu.asked == 0 and read_power(tmp_path) == PowerLog(absent="no expert runs on a GPU")


def test_the_gpus_of_an_expert_rest_before_it_is_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drives:
        async def run(self, plan: ProfilePlan, max_num_seqs: int) -> ProfileRun:
            began_s = time.monotonic()
            return ProfileRun([PhaseTimes("decode", began_s, began_s, 0, 0)])

    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(Gpu(), Gpu()))
    monkeypatch.setattr(profile, "IDLE_S", 0.5)

    def driven(device: str, gpus: list[int], tp: int = 1) -> tuple[ProfileRun, PowerLog]:
        live = read_live({"device": device}, "bf16", "e")
        spec = ServerSpec("e", "e", "m", 1, tp, EngineSettings(), live, Path(), gpus=gpus)
        return profile._driven(cast(Profiler, Drives()), ProfilePlan(), 8, device, spec)

    run, power = driven("gpu", [1])
    assert len(power.between(0.0, run.phases[0].start_s).rows) >= 2
    assert set(power.frame()["gpu"]) == {1}
    assert driven("gpu", [1, 0], tp=2)[1].rows and not driven("cpu", [])[1].absent
    for gpus, tp, seen in (([], 1, "2 GPUs were sampled, the server has 1"), ([0], 2, "1 GPUs were")):
        _, power = driven("gpu", gpus, tp)
        assert not power.rows and power.absent is not None, "of others too, or not of all"
        assert power.absent.startswith(seen) and power.absent.endswith("give fleet.experts.e.live.gpus")


def test_damaged_power_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    write_power(PowerLog([row(0.0, 0, 90.0)]), tmp_path)
    pd.read_parquet(tmp_path / "power.parquet").drop(columns="gpu").to_parquet(tmp_path / "power.parquet")
    refused = r"power\.parquet or power\.json is damaged \(.*\); measure again, or remove both"
    with pytest.raises(DataError, match=refused.replace(".*", "power.parquet: no column gpu")):
        read_power(tmp_path)
    (tmp_path / "power.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=refused):
        read_power(tmp_path)
    (tmp_path / "power.parquet").unlink()
    for text in ("{", "{}", "[]"):
        (tmp_path / "power.json").write_text(text)
        with pytest.raises(DataError, match=refused):
            read_power(tmp_path)


def test_a_validation_samples_the_gpus_that_its_fleet_is_bound_to(tmp_path: Path) -> None:
    def gpus(*given: list[list[int]], device: str = "gpu") -> list[int]:
        experts = {
            f"e{index}": ExpertConfig(model="llama-36m", gpu="h200-141gb", replicas=max(1, len(one)))
            for index, one in enumerate(given)
        }
        for expert, one in zip(experts.values(), given, strict=True):
            expert.live = {"gpus": one, "device": device}
        return LiveFleet(FleetConfig("f", experts=experts), tmp_path).gpus

    assert gpus([[3], [1]], [[2]]) == [1, 2, 3]
    assert gpus([]) == [], "alone it takes what is there"
    assert gpus([[3]], device="cpu") is None


def test_energy_is_shared_by_all_tokens_that_arrived() -> None:
    """10 of the 30 came for requests that the end of their run cut off: no row, but gaps."""
    frame = pd.DataFrame({"output_tokens": [20]})
    gaps = Gaps(np.array([0.5, 0.9]), np.zeros(2), np.array([19, 9]), np.array([20, 10]))
    power = PowerLog([row(time_s, 0, 60.0) for time_s in (0.0, 1.0, 9.0)])
    figures = _power(power, [(0.0, 1.0)], [(frame, gaps)])
    assert (figures["joules"], figures["joules_per_output_token"]) == (60.0, 2.0)


def test_figures_are_of_all_gpus_and_all_stretches() -> None:
    """By the counter 30 J and 8 J; by the integral (100 + 200) / 2 + 2 * 200 = 550 J."""
    first = PowerLog([
        row(0.0, 0, 300.0, 10.0, 5), row(0.0, 1, 100.0, NAN, 7), row(1.0, 0, 320.0, 25.0, 6),
        row(1.0, 1, 200.0, NAN, 7), row(3.0, 0, 310.0, 40.0, 5), row(3.0, 1, 200.0, NAN, 8),
    ])  # fmt: skip
    second = PowerLog([row(8.0, 0, 100.0, 50.0, 20), row(9.0, 0, 200.0, 58.0, 4)])
    assert first.joules() == pytest.approx(580.0)
    figures = power_figures([first, PowerLog(), second], 147)
    assert figures == {
        "measured": True,
        "why": None,
        "mean_w": pytest.approx((310.0 + 500.0 / 3 + 150.0) / 2),
        "joules": pytest.approx(588.0),
        "joules_per_output_token": pytest.approx(4.0),
        "peak_memory_bytes": 20,
    }
    assert PowerLog([row(0.0, 0, 90.0, 10.0), row(2.0, 0, 90.0, NAN)]).joules() == 180.0, (
        "not told throughout"
    )
    assert power_figures([first], 0)["joules_per_output_token"] is None


def test_idle_and_busy_power_are_told_apart_by_the_steps() -> None:
    """Steps from 10 to 10.5 and from 10.7 to 11 seconds; a reading is the mean of its second (NVML).

    The first GPU draws 100 W idle and 400 W busy, the second 50 and 250 and is lost after two readings.
    """
    log = StepLog(META, [step(0, 10.0, 10.25), step(1, 10.25, 10.5), step(5, 10.7, 11.0)], {})
    shares = {9.0: 0.0, 10.0: 0.0, 10.25: 0.25, 10.6: 0.5, 11.0: 0.8, 11.6: 0.3, 12.5: 0.0}
    rows = [row(at, 0, 100.0 + 300.0 * share) for at, share in shares.items()]
    rows += [row(9.5, 1, 50.0), row(10.5, 1, 150.0)]
    found = power_model(PowerLog(rows), log)
    assert found == {"idle_w": pytest.approx(100.0 + 50.0), "busy_w": pytest.approx(400.0 + 250.0)}
    assert power_model(None, log) == power_model(PowerLog(absent="no NVIDIA GPU"), log) == {}
    assert power_model(PowerLog(rows), StepLog(META, [], {})) == {}
    assert power_model(PowerLog(rows[:2]), log) == {}, "nothing is known of a busy GPU"
    between = [item for item in rows if 10.0 < item[0] < 12.0]
    assert power_model(PowerLog(between), log) == {}, "no reading without steps in its second"


@pytest.mark.parametrize(("device", "power"), [("gpu", {"idle_w": 60.0, "busy_w": 400.0}), ("cpu", {})])
def test_a_calibration_has_the_power_of_the_gpus_it_ran_on(device: str, power: dict[str, float]) -> None:
    """Steps of 20 to 80 ms, each after an idle engine, ten a second; a rest before and after them."""
    steps = []
    for index in range(1200):
        rows, start_s = (1, 4, 16, 60)[index // 20 % 4], 0.1 * index
        steps.append(step(2 * index, start_s, start_s + 0.02 + 0.001 * rows, rows))
    log = StepLog(META, steps, {})
    shares = {-1.0: 0.0, 1.95: 0.21, 3.95: 0.24, 5.95: 0.36, 7.95: 0.8, 122.0: 0.0}
    samples = [row(at, 0, 60.0 + 340.0 * share) for at, share in shares.items()]
    expert = ExpertConfig(model="llama-36m", precision="bf16", gpu="h200-141gb")
    run = ProfileRun([PhaseTimes("decode", -1.0, 200.0, 1, 0)])
    found = fit(Profiled(expert, "tiny", log, run, device, 0, PowerLog(samples)))
    assert found.power == pytest.approx(power)


def test_a_profile_says_why_a_gpus_calibration_has_no_power(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(profile, "say", said.append)
    without = load_calibration(CALIBRATION_DIR / "h100-80gb" / "llama3.1-8b_bf16_tp1_tables.json")
    assert not without.power
    profile._warn_of_power("a", "cpu", without, PowerLog(absent="no NVIDIA GPU"))
    known = dataclasses.replace(without, power={"idle_w": 60.0, "busy_w": 400.0})
    profile._warn_of_power("a", "gpu", known, PowerLog(absent="GPU 1 stopped answering"))
    assert not said
    profile._warn_of_power("a", "gpu", without, PowerLog(absent="nvidia-ml-py is not installed"))
    profile._warn_of_power("b", "gpu", without, PowerLog())
    assert said[0] == "a: its calibration has no power (nvidia-ml-py is not installed)"
    assert said[1].startswith("b: its calibration has no power (no reading while it ran")
