"""Clocks, watts and joules of one GPU through NVML; a card without a counter is said, not guessed.

NVML's total energy counter advances only every 20 to 100 ms: measure joules over half a second.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any


class EnergyCounterMissingError(RuntimeError):
    """The driver gives no total energy counter for this GPU."""


class PowerMeter:
    """Reads one GPU. Use as a context manager to get watts and joules of the enclosed time."""

    def __init__(self, device_index: int) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(device_index)
        self._start_j = self._start_s = 0.0
        self.joules = self.watts = 0.0

    @property
    def sm_clock_mhz(self) -> float:
        """SM clock at this moment."""
        return float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    @property
    def instant_watts(self) -> float:
        """Board power as the driver reports it (averaged over its own window)."""
        return self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3

    @property
    def power_cap_w(self) -> float:
        """Enforced power limit."""
        return self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3

    @property
    def driver_version(self) -> str:
        """Driver version string."""
        return str(self._nvml.nvmlSystemGetDriverVersion())

    @property
    def total_joules(self) -> float:
        """Energy counter since the driver was loaded.

        Raises:
            EnergyCounterMissingError: the card has no counter.
        """
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        except self._nvml.NVMLError as err:
            raise EnergyCounterMissingError(f"no energy counter on this GPU: {err}") from err

    @property
    def other_processes(self) -> int:
        """Compute processes on this GPU beside the caller."""
        import os

        running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return sum(process.pid != os.getpid() for process in running)

    def __enter__(self) -> PowerMeter:
        self._start_j, self._start_s = self.total_joules, time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.joules = self.total_joules - self._start_j
        self.watts = self.joules / (time.perf_counter() - self._start_s)
