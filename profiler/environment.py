"""What this machine has: GPUs and their state, SM groups, libraries. Reads only; sets nothing.

Nothing here makes a CUDA context or imports torch: NVML and the driver API answer without either.
What a card or an older driver does not tell is None, never guessed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..runtime.cuda_driver import CudaDriverError, checked, driver, nvrtc
from ..runtime.partition_layout import SmSplit

DRIVER_FILE = Path("/proc/driver/nvidia/version")
LIBRARIES = {
    "torch": "torch",
    "triton": "triton",
    "cuda-bindings": "cuda.bindings",
    "nvidia-ml-py": "pynvml",
    "optuna": "optuna",
    "pulp": "pulp",
    "highspy": "highspy",
    "matplotlib": "matplotlib",
    "flashinfer-python": "flashinfer",
    "apache-tvm-ffi": "tvm_ffi",
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "transformers": "transformers",
    "safetensors": "safetensors",
}
"""Distributions that some part of the tool uses, by the module that each brings."""
_MAX_LINKS = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """One GPU at this moment, as NVML tells it; None: it does not."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    power_cap_w: float | None
    default_power_cap_w: float | None
    sm_clock_mhz: float | None
    max_sm_clock_mhz: float | None
    watts: float | None
    other_processes: int | None
    """Compute processes of others."""
    has_energy_counter: bool
    is_mig: bool
    num_links: int | None
    """NVLinks that are up."""
    nvlink_peers: tuple[int, ...]
    """Indices of GPUs reached over NVLink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Everything that `read_environment` found."""

    platform: str
    python: str
    has_driver: bool
    driver_version: str | None
    cuda_driver_version: str | None
    """Highest CUDA version that the driver speaks."""
    nvrtc_version: str | None
    gpus: tuple[GpuState, ...]
    sm_split: SmSplit | None
    """SM groups of the first GPU."""
    num_sms: int | None
    libraries: Mapping[str, str | None]
    """Version of each of `LIBRARIES`; None: not installed."""
    notes: tuple[str, ...] = ()
    """What could not be looked at, and why."""


def read_environment(granularity: int) -> Environment:
    """Look at this machine.

    Args:
        granularity: SMs of a group to ask the driver for, as in the GPU's spec.
    """
    has_driver = DRIVER_FILE.exists()
    libraries = {name: library_version(name, module) for name, module in LIBRARIES.items()}
    gpus: tuple[GpuState, ...] = ()
    driver_version = cuda_version = None
    split: SmSplit | None = None
    num_sms: int | None = None
    notes: list[str] = []
    if has_driver and libraries["nvidia-ml-py"]:
        nvml: Any = importlib.import_module("pynvml")
        try:
            driver_version, cuda_version, gpus = read_nvml(nvml)
        except nvml.NVMLError as err:
            notes.append(f"NVML said: {err}")
    if gpus and libraries["cuda-bindings"]:
        try:
            num_sms, split = read_sm_split(driver(), granularity)
        except (CudaDriverError, ImportError, AttributeError, RuntimeError) as err:
            notes.append(f"the driver tells no SM groups: {err}")
    return Environment(
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        has_driver=has_driver,
        driver_version=driver_version,
        cuda_driver_version=cuda_version,
        nvrtc_version=_nvrtc_version(libraries["cuda-bindings"], notes),
        gpus=gpus,
        sm_split=split,
        num_sms=num_sms,
        libraries=libraries,
        notes=tuple(notes),
    )


def library_version(distribution: str, module: str) -> str | None:
    """Version of an installed distribution; `?` for a module without one; None for neither."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        pass
    try:
        return "?" if importlib.util.find_spec(module) else None
    except ModuleNotFoundError:  # the parent package of `a.b` is missing
        return None


def read_nvml(nvml: Any) -> tuple[str, str, tuple[GpuState, ...]]:  # noqa: ANN401 - untyped module
    """Driver version, its CUDA version, and the GPUs.

    Args:
        nvml: the module `pynvml`, or a stand-in.
    """
    nvml.nvmlInit()
    try:
        handles = [
            nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())
        ]
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion())
        gpus = tuple(_gpu(nvml, index, handles) for index in range(len(handles)))
        return (
            str(nvml.nvmlSystemGetDriverVersion()),
            f"{cuda // 1000}.{cuda % 1000 // 10}",
            gpus,
        )
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, handles: list[Any]) -> GpuState:  # noqa: ANN401
    handle = handles[index]

    def ask(question: Callable[[], Any]) -> Any:  # noqa: ANN401
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            return question()
        return None

    def scaled(question: Callable[[], Any], factor: float = 1.0) -> float | None:
        value = ask(question)
        return None if value is None else float(value) * factor

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    processes = ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    mig = ask(lambda: nvml.nvmlDeviceGetMigMode(handle))
    links = [
        ask(partial(nvml.nvmlDeviceGetNvLinkState, handle, link)) for link in range(_MAX_LINKS)
    ]
    told = [state for state in links if state is not None]
    peers = [
        other
        for other in range(len(handles))
        if other != index
        and ask(lambda other=other: _over_nvlink(nvml, handle, handles[other])) is True
    ]
    return GpuState(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(memory.total),
        free_bytes=int(memory.free),
        power_cap_w=scaled(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle), 1e-3),
        default_power_cap_w=scaled(
            lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle), 1e-3
        ),
        sm_clock_mhz=scaled(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        max_sm_clock_mhz=scaled(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        watts=scaled(lambda: nvml.nvmlDeviceGetPowerUsage(handle), 1e-3),
        other_processes=None
        if processes is None
        else sum(process.pid != os.getpid() for process in processes),
        has_energy_counter=ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        is not None,
        is_mig=mig is not None and int(mig[0]) == 1,
        num_links=sum(int(state) == 1 for state in told) if told else None,
        nvlink_peers=tuple(peers),
    )


def _over_nvlink(nvml: Any, here: Any, there: Any) -> bool:  # noqa: ANN401
    status = nvml.nvmlDeviceGetP2PStatus(here, there, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    return int(status) == int(nvml.NVML_P2P_STATUS_OK)


def read_sm_split(api: Any, granularity: int) -> tuple[int, SmSplit]:  # noqa: ANN401
    """SMs of the first GPU, and the groups that one split makes of them; no context is made.

    Args:
        api: the module `cuda.bindings.driver`, or a stand-in.
        granularity: SMs of a group.

    Raises:
        CudaDriverError: the driver refuses.
    """
    checked(api.cuInit(0), "cuInit")
    device = checked(api.cuDeviceGet(0), "cuDeviceGet")
    whole = checked(
        api.cuDeviceGetDevResource(device, api.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM),
        "cuDeviceGetDevResource",
    )
    num_sms = int(whole.sm.smCount)
    groups, made, _ = checked(
        api.cuDevSmResourceSplitByCount(num_sms // granularity, whole, 0, granularity),
        "cuDevSmResourceSplitByCount",
    )
    size = int(next(iter(groups)).sm.smCount)
    return num_sms, SmSplit(
        granularity=size, num_groups=int(made), remainder=num_sms - size * int(made)
    )


def _nvrtc_version(has_bindings: str | None, notes: list[str]) -> str | None:
    if not has_bindings:
        return None
    try:
        major, minor = checked(nvrtc().nvrtcVersion(), "nvrtcVersion")
    except (CudaDriverError, ImportError, RuntimeError) as err:
        notes.append(f"NVRTC does not load: {err}")
        return None
    return f"{major}.{minor}"
