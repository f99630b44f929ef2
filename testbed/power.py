"""GPU power, utilisation and memory by NVML, sampled beside a run; absent without a GPU, and said so."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd

from testbed.step_log import StepLog

COLUMNS = ("time_s", "gpu", "power_w", "utilisation", "memory_bytes", "energy_j")


@dataclass
class PowerLog:
    """Samples of all GPUs; `absent` says why there are none."""

    rows: list[tuple[float, int, float, float, int, float]] = field(default_factory=list)
    absent: str | None = None

    def frame(self) -> pd.DataFrame:
        """One row per sample and GPU; time is monotonic seconds."""
        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    def between(self, start_s: float, end_s: float) -> PowerLog:
        """The samples of an interval of monotonic seconds."""
        return PowerLog([row for row in self.rows if start_s <= row[0] <= end_s], self.absent)


class PowerSampler:
    """Context manager that samples in a thread; without NVML or GPU it only notes the reason."""

    def __init__(self, period_s: float = 0.1) -> None:
        self.log = PowerLog()
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml: Any = None
        self._handles: Sequence[Any] = ()

    def __enter__(self) -> PowerSampler:
        try:
            import pynvml
        except ImportError:
            self.log.absent = "nvidia-ml-py is not installed"
            return self
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            self.log.absent = f"no NVIDIA GPU ({error})"
            return self
        self._nvml = pynvml
        self._thread = threading.Thread(target=self._loop, daemon=True, name="ersim-power")
        self._thread.start()
        return self

    def _loop(self) -> None:
        while not self._stop.wait(self._period_s):
            for index, handle in enumerate(self._handles):
                self._sample(index, handle)

    def _sample(self, index: int, handle: Any) -> None:
        nvml = self._nvml
        try:
            self.log.rows.append(
                (
                    time.monotonic(),
                    index,
                    nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                    nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                    nvml.nvmlDeviceGetMemoryInfo(handle).used,
                    nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
                )
            )
        except nvml.NVMLError as error:
            self.log.absent = f"NVML stopped answering ({error})"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()


def power_model(power: PowerLog | None, log: StepLog) -> dict[str, float]:
    """Mean power of all GPUs together while steps ran and while none did; {} without samples."""
    if power is None or not power.rows or not log.steps:
        return {}
    frame = power.frame()
    total = frame.groupby(frame.index // max(1, frame["gpu"].nunique())).agg(
        time_s=("time_s", "mean"), power_w=("power_w", "sum")
    )
    ends = log.ends_s()
    starts = ends - log.periods_s()
    index = np.searchsorted(starts, total["time_s"].to_numpy(), side="right") - 1
    busy = (index >= 0) & (total["time_s"].to_numpy() <= ends[np.maximum(index, 0)])
    if not busy.any() or busy.all():
        return {}
    watts = total["power_w"].to_numpy()
    return {"idle_w": float(watts[~busy].mean()), "busy_w": float(watts[busy].mean())}
