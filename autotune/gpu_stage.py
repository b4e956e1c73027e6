"""The seam between the search, which needs no GPU, and what a GPU adds: profile and measure.

`tune.py` runs the same steps with or without a stage; only `find_stage` decides.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..profiler.profile import Profile
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Plan, Schedule, Timing
from ..search_spaces.schema import HardwareSpec, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """GPUs of this machine, as the driver names them."""

    name: str
    count: int
    memory_bytes: int
    note: str = ""
    """What kept us from looking closer."""


NO_DEVICES = Devices(name="", count=0, memory_bytes=0)


class GpuStage(Protocol):
    """What a GPU adds to a job."""

    def profile(self, graph: OpGraph, mix: RowMix) -> Profile:
        """Measure what the cost model needs, or take up measured files again."""
        ...

    def measure(self, schedules: Sequence[Schedule]) -> Sequence[Timing]:
        """Time whole iterations, interleaved, in one sustained run."""
        ...

    def verify(self, plan: Plan, model: ModelSpec, seed: int) -> Plan:
        """The plan with a record of each schedule, run at real widths on its partitions."""
        ...

    def close(self) -> None:
        """End the ranks and give the GPU back."""
        ...


def find_devices() -> Devices:
    """The NVIDIA GPUs that the driver lists; no torch, no child process."""
    if not Path("/proc/driver/nvidia/version").exists():
        return NO_DEVICES
    if importlib.util.find_spec("pynvml") is None:
        note = "an NVIDIA driver is loaded, but nvidia-ml-py is missing: install nanoflow-tune[gpu]"
        return Devices(name="", count=0, memory_bytes=0, note=note)
    return _ask_driver()


def _ask_driver() -> Devices:
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as err:
        return Devices(name="", count=0, memory_bytes=0, note=f"the NVIDIA driver said: {err}")
    try:
        count = int(nvml.nvmlDeviceGetCount())
        if not count:
            return NO_DEVICES
        first = nvml.nvmlDeviceGetHandleByIndex(0)
        memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(first).total)
        return Devices(
            name=str(nvml.nvmlDeviceGetName(first)), count=count, memory_bytes=memory_bytes
        )
    finally:
        nvml.nvmlShutdown()


def find_stage(devices: Devices, hardware: HardwareSpec, num_gpus: int) -> GpuStage | None:
    """The stage for this hardware, or None where this machine lacks it.

    NOTE: the measuring stage plugs in here (profiler/sweep.py, profiler/iteration.py, imported
    late); until then every job is predicted.
    """
    del devices, hardware, num_gpus
    return None
