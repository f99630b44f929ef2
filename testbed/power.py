"""GPU power, utilisation, memory and energy by NVML, sampled beside a run; absent without a GPU, and said so.

Power is what `nvmlDeviceGetPowerUsage` says: on GPUs since Ampere, A100 excepted, the mean of the last second
(NVML's reference).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd

from testbed.contention import busy_share
from testbed.step_log import StepLog

COLUMNS = ("time_s", "gpu", "power_w", "utilisation", "memory_bytes", "energy_j")
NAN = float("nan")
AVERAGED_S = 1.0  # what a power reading is the mean of
IDLE_S = 4.0  # as long a server rests before it is driven, so that its GPUs show what they draw idle


@dataclass
class PowerLog:
    """Samples of one or more GPUs; `absent` says why there are none, or which GPU some are missing of."""

    rows: list[tuple[float, int, float, float, int, float]] = field(default_factory=list)
    absent: str | None = None

    def frame(self) -> pd.DataFrame:
        """One row per sample and GPU; time is monotonic seconds, utilisation a share.

        energy_j is the GPU's own counter. It and utilisation are NaN where the GPU does not tell them.
        """
        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    def joules(self) -> float:
        """Energy of all sampled GPUs, each from its first to its last sample.

        By the GPU's energy counter; by power integrated over the samples' times where it has none.
        """
        return sum((_joules(rows) for _, rows in self.frame().groupby("gpu")), 0.0)

    def between(self, start_s: float, end_s: float) -> PowerLog:
        """The samples of an interval of monotonic seconds."""
        return PowerLog([row for row in self.rows if start_s <= row[0] <= end_s], self.absent)


def _joules(rows: pd.DataFrame) -> float:
    """Energy of one GPU over its samples."""
    counter_j = rows["energy_j"].to_numpy()
    if np.isnan(counter_j).any():
        return float(np.trapezoid(rows["power_w"].to_numpy(), rows["time_s"].to_numpy()))
    return float(counter_j[-1] - counter_j[0])


class PowerSampler:
    """Context manager that samples in a thread; without NVML or GPU it only notes the reason.

    gpus: indices of the GPUs to sample, in NVML's order (by bus); all GPUs of the host when there are none.
    """

    def __init__(self, period_s: float = 0.1, gpus: Sequence[int] = ()) -> None:
        self.log = PowerLog()
        self._period_s = period_s
        self._gpus = tuple(gpus)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml: Any = None
        self._handles: Mapping[int, Any] = {}

    def __enter__(self) -> PowerSampler:
        try:
            import pynvml
        except ImportError:
            self.log.absent = "nvidia-ml-py is not installed"
            return self
        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = self._found(self._gpus or range(pynvml.nvmlDeviceGetCount()))
        except pynvml.NVMLError as error:
            self.log.absent = f"no NVIDIA GPU ({error})"
            return self
        if not self._handles:
            self.log.absent = self.log.absent or "no NVIDIA GPU (NVML counts none)"
            return self
        self._thread = threading.Thread(target=self._loop, daemon=True, name="ersim-power")
        self._thread.start()
        return self

    def _found(self, indices: Sequence[int]) -> dict[int, Any]:
        """The GPUs to sample, by index; one that NVML does not give is named in `absent`."""
        found: dict[int, Any] = {}
        for index in indices:
            try:
                found[index] = self._nvml.nvmlDeviceGetHandleByIndex(index)
            except self._nvml.NVMLError as error:
                self.log.absent = f"GPU {index} cannot be sampled ({error})"
        return found

    def _loop(self) -> None:
        while not self._stop.wait(self._period_s):
            for index, handle in self._handles.items():
                self._sample(index, handle)

    def _sample(self, index: int, handle: Any) -> None:
        nvml = self._nvml
        try:
            power_w = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
            memory_bytes = nvml.nvmlDeviceGetMemoryInfo(handle).used
        except nvml.NVMLError as error:
            self.log.absent = f"GPU {index} stopped answering ({error})"
            return
        utilisation = self._told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        energy_j = self._told(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
        self.log.rows.append((time.monotonic(), index, power_w, utilisation, memory_bytes, energy_j))

    def _told(self, ask: Callable[[], float]) -> float:
        """The answer of a counter that not every GPU has; NaN without one."""
        try:
            return ask()
        except self._nvml.NVMLError:
            return NAN

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()


def power_model(power: PowerLog | None, log: StepLog) -> dict[str, float]:
    """Power of the sampled GPUs together while steps run and while none does; {} without samples of both.

    A reading is the mean of a second, so it counts as idle only when no step ran in that second; from the
    others busy power is fitted, by least squares, as that of the share of their second in which steps ran.
    The sum of the GPUs' own figures, so that one that stopped answering half-way counts with what it told.
    """
    if power is None or not power.rows or not log.steps:
        return {}
    idle_w = busy_w = 0.0
    for _, rows in power.frame().groupby("gpu"):
        times_s, watts = rows["time_s"].to_numpy(), rows["power_w"].to_numpy()
        share = busy_share(times_s - AVERAGED_S, times_s, log)
        idle = share == 0.0
        if idle.all() or not idle.any():
            return {}
        own_idle_w = float(watts[idle].mean())
        idle_w += own_idle_w
        busy_w += own_idle_w + float((watts - own_idle_w) @ share / (share @ share))
    return {"idle_w": idle_w, "busy_w": busy_w}
