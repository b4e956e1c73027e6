"""The seam between the search, which needs no GPU, and what a GPU adds: profile and measure.

`tune.py` runs the same steps with or without a stage; only `find_stage` decides.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..profiler.profile import Profile
from ..profiler.rank_jobs import IterationCase, OpTime
from ..profiler.visible_gpus import visible_gpus
from ..runtime.plan import Plan, Schedule, Timing
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .provenance import commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """GPUs of this machine, as the driver names them."""

    name: str
    count: int
    memory_bytes: int
    note: str = ""
    """What kept us from looking closer."""


MEMORY_TOLERANCE = 0.1
"""A 141 GB card reports 150.8e9 bytes."""
NO_DEVICES = Devices(name="", count=0, memory_bytes=0)


class GpuStage(Protocol):
    """What a GPU adds to a job."""

    def profile(self, path: Path, *, take_shipped: bool = True) -> Profile:
        """Measure what neither `path` nor the shipped profile of this GPU holds."""
        ...

    def measure(
        self, schedules: Sequence[Schedule], *, rounds: int = ..., turn_s: float = ...
    ) -> Sequence[Timing]:
        """Time whole iterations, interleaved, in one sustained run."""
        ...

    def timelines(self, schedules: Sequence[Schedule]) -> Sequence[Sequence[OpTime]]:
        """When each nano-op of each schedule ran, over one iteration."""
        ...

    def verify(self, plan: Plan, model: ModelSpec, seed: int) -> Plan:
        """The plan with a record of each schedule, run at real widths on its partitions."""
        ...

    def close(self) -> None:
        """End the ranks and give the GPU back."""
        ...


def find_devices() -> Devices:
    """The NVIDIA GPUs that the driver lists and CUDA shows; no torch, no child process."""
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
        handles = visible_gpus(nvml)
        if not handles:
            return NO_DEVICES
        first = handles[0]
        memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(first).total)
        return Devices(
            name=str(nvml.nvmlDeviceGetName(first)),
            count=len(handles),
            memory_bytes=memory_bytes,
        )
    finally:
        nvml.nvmlShutdown()


def has_gpus(devices: Devices, hardware: HardwareSpec, num_gpus: int) -> bool:
    """Whether this machine has that many GPUs of that kind.

    Raises:
        ValueError: the GPU has another memory size than its spec.
    """
    if devices.name != hardware.device_name or devices.count < num_gpus:
        return False
    if abs(devices.memory_bytes / hardware.memory_bytes - 1) > MEMORY_TOLERANCE:
        raise ValueError(
            f"`memory_bytes` of a spec must be within {MEMORY_TOLERANCE:.0%} of the card's, but "
            f"{hardware.name} says {hardware.memory_bytes} and {devices.name} reports "
            f"{devices.memory_bytes}; pass the right --gpu, or a corrected YAML"
        )
    return True


def find_stage(
    devices: Devices, case: IterationCase, *, command: str, say: Callable[[str], None]
) -> GpuStage | None:
    """The stage for this case, or None where this machine lacks its GPUs.

    Args:
        devices: GPUs of this machine.
        case: model, GPU, tensor-parallel degree and batch.
        command: what was called, for the header of new profiles.
        say: progress, one line at a time.

    Raises:
        ValueError: the GPU has another memory size than its spec.
    """
    if not has_gpus(devices, case.hardware, case.tp_degree):
        return None
    from .measuring_stage import MeasuringStage

    return MeasuringStage(case, devices.name, commit(), command, say)


def why_not(devices: Devices, hardware: HardwareSpec, num_gpus: int) -> str:
    """Why this machine predicts instead of measuring, "" when it simply has no GPU."""
    if devices.note:
        return f"No GPU was used: {devices.note}."
    if devices.count and devices.name != hardware.device_name:
        return (
            f"This machine has {devices.name}, the plan is for {hardware.device_name}: predicted."
        )
    if devices.count and devices.count < num_gpus:
        return f"This machine has {devices.count} GPU(s), the plan needs {num_gpus}: predicted."
    return ""
