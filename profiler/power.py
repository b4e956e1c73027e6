"""Clocks, watts and joules of one GPU through NVML; a card without a counter is said, not guessed.

NVML's total energy counter advances only every 20 to 100 ms: measure joules over half a second.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from statistics import mean
from types import TracebackType
from typing import Any

from .visible_gpus import visible_gpus

_POLL_S, _POLLS_PER_CLOCK = 0.002, 20


class EnergyCounterMissingError(RuntimeError):
    """The driver gives no total energy counter for this GPU."""


class PowerMeter:
    """Reads one GPU, numbered as CUDA does; as a context manager watts, joules, clock of its time.

    The counter stands still between its updates, so a thread watches it and the watts are the
    slope between the first and the last update seen; joules are watts x enclosed time. Single
    readings of the clock differ by several percent at the power cap: the thread takes their mean.
    """

    def __init__(self, device_index: int) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self._handle = visible_gpus(pynvml)[device_index]
        self._updates: list[tuple[float, float]] = []
        self._clocks_mhz: list[float] = []
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self._start_s = 0.0
        self.joules = self.watts = self.mean_sm_clock_mhz = 0.0

    @property
    def sm_clock_mhz(self) -> float:
        """SM clock at this moment."""
        return float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

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
    def has_energy_counter(self) -> bool:
        """Without one, watts and joules are nan."""
        try:
            return self.total_joules >= 0
        except EnergyCounterMissingError:
            return False

    @property
    def other_processes(self) -> int:
        """Compute processes on this GPU beside the caller."""
        running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return sum(process.pid != os.getpid() for process in running)

    def _watch(self) -> None:
        last, polls = self.total_joules, 0
        while not self._stop.wait(_POLL_S):
            now, polls = self.total_joules, polls + 1
            if polls % _POLLS_PER_CLOCK == 0:
                self._clocks_mhz.append(self.sm_clock_mhz)
            if now != last:
                self._updates.append((time.perf_counter(), now))
                last = now

    def __enter__(self) -> PowerMeter:
        self._updates, self._clocks_mhz, self._start_s = [], [], time.perf_counter()
        self._stop.clear()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.has_energy_counter:
            self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        elapsed_s = time.perf_counter() - self._start_s
        self._stop.set()
        if self._watcher is not None and self._watcher.is_alive():
            self._watcher.join()
        self.watts = slope(self._updates)
        self.joules = self.watts * elapsed_s
        self.mean_sm_clock_mhz = mean(self._clocks_mhz) if self._clocks_mhz else self.sm_clock_mhz


def slope(updates: Sequence[tuple[float, float]]) -> float:
    """Watts between the first and the last (seconds, joules); nan with fewer than two."""
    if len(updates) < 2:
        return float("nan")
    (first_s, first_j), (last_s, last_j) = updates[0], updates[-1]
    return (last_j - first_j) / (last_s - first_s)
