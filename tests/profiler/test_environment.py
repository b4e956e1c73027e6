from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from nanoflow_tune.profiler import environment
from nanoflow_tune.profiler.environment import (
    library_version,
    read_environment,
    read_nvml,
    read_sm_split,
)
from nanoflow_tune.runtime.cuda_driver import CudaDriverError


class NvmlError(Exception):
    pass


class FakeNvml:
    """Two GPUs over NVLink; the second keeps its power and clocks to itself."""

    NVMLError = NvmlError
    NVML_CLOCK_SM = 1
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0

    def __init__(self):
        self.is_open = False

    def nvmlInit(self):  # noqa: N802
        self.is_open = True

    def nvmlShutdown(self):  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlSystemGetCudaDriverVersion(self):  # noqa: N802
        return 13000

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return "580.159.04"

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(total=150_000, free=149_000)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        return [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=-1)]

    def nvmlDeviceGetMigMode(self, handle):  # noqa: N802
        return [0, 0]

    def nvmlDeviceGetNvLinkState(self, handle, link):  # noqa: N802
        if link >= 18:
            raise NvmlError("invalid argument")
        return int(link != 3)

    def nvmlDeviceGetP2PStatus(self, here, there, what):  # noqa: N802
        assert what == 2
        return 0

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):  # noqa: N802
        if handle == 1:
            raise NvmlError("not supported")
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle, what):  # noqa: N802
        return 345

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if handle == 1:
            raise NvmlError("not supported")
        return 1


def test_nvml_answers_become_records_and_silence_becomes_none():
    nvml = FakeNvml()
    driver, cuda, (first, second) = read_nvml(nvml)
    assert (driver, cuda) == ("580.159.04", "13.0")
    assert not nvml.is_open
    assert first.power_cap_w == 700.0
    assert first.other_processes == 1
    assert first.num_links == 17
    assert first.nvlink_peers == (1,)
    assert first.max_sm_clock_mhz is None  # this stand-in has no such call
    assert second.power_cap_w is None
    assert not second.has_energy_counter
    assert not second.is_mig


def sm(count):
    return SimpleNamespace(sm=SimpleNamespace(smCount=count))


class FakeDriver:
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)

    def __init__(self, error=0):
        self.error = error

    def cuInit(self, flags):  # noqa: N802
        return (self.error,)

    def cuDeviceGet(self, index):  # noqa: N802
        return 0, index

    def cuDeviceGetDevResource(self, device, kind):  # noqa: N802
        return 0, sm(132)

    def cuDevSmResourceSplitByCount(self, count, whole, flags, least):  # noqa: N802
        assert (count, flags, least) == (16, 0, 8)
        return 0, [sm(8)] * 16, 15, sm(12)


def test_sm_groups_are_what_one_split_gives():
    num_sms, split = read_sm_split(FakeDriver(), 8)
    assert num_sms == 132
    assert (split.granularity, split.num_groups, split.remainder) == (8, 15, 12)


def test_a_driver_that_refuses_is_named():
    with pytest.raises(CudaDriverError, match="cuInit failed: 100"):
        read_sm_split(FakeDriver(error=100), 8)


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "DRIVER_FILE", tmp_path / "none")
    found = read_environment(8)
    assert not found.has_driver
    assert found.gpus == ()
    assert found.sm_split is None
    assert found.libraries["optuna"]


def test_libraries_are_found_by_distribution_then_by_module():
    assert library_version("pytest", "pytest")[0].isdigit()
    assert library_version("no-such-thing", "json") == "?"
    assert library_version("no-such-thing", "no_such.thing") is None
