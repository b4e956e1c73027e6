from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch

from nanoflow_tune.runtime.cuda_driver import CudaDriverError
from nanoflow_tune.runtime.gpu_failures import (
    CollectiveError,
    OutOfMemoryError,
    death_told,
    explained,
    is_out_of_memory,
    memory_for,
    memory_state,
    release,
)

ASKED = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 3.10 GiB is free."
)


class FakeCuda:
    """What `torch.cuda` says of a card of 80 GiB, of which this process holds 70."""

    class Properties:
        uuid = "0f1e2d3c"

    def is_initialized(self):
        return True

    def current_device(self):
        return 1

    def mem_get_info(self, index):
        return 3 << 30, 80 << 30

    def memory_reserved(self, index):
        return 70 << 30

    def get_device_properties(self, index):
        return self.Properties()


def test_memory_that_runs_out_says_for_what_how_much_and_what_helps(monkeypatch):
    for name in dir(FakeCuda):
        if not name.startswith("_") and name != "Properties":
            monkeypatch.setattr(torch.cuda, name, getattr(FakeCuda(), name))
    with (
        pytest.raises(OutOfMemoryError) as caught,
        memory_for("the KV cache", "lower --kv-cache-gib"),
    ):
        raise torch.OutOfMemoryError(ASKED)
    assert str(caught.value) == (
        "GPU 1 has no memory for the KV cache: 20.00 GiB were asked for, but 3.00 of 80.00 GiB are "
        "free, this process holds 70.00 GiB, 7.00 GiB are others' (`nvidia-smi` says whose); lower "
        "--kv-cache-gib"
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert is_out_of_memory(str(caught.value))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(ASKED),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        CudaDriverError("cuGreenCtxCreate failed: CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 4000000000000 bytes."),
        torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:24],
)  # fmt: skip
def test_every_librarys_words_for_it_are_known(error):
    told = explained(error, "a step")
    assert isinstance(told, OutOfMemoryError)
    assert "no memory for a step: " in str(told)
    assert "end what else runs on the GPU" in str(told)


def test_a_real_refusal_of_the_hosts_allocator_is_known():
    with (
        pytest.raises(OutOfMemoryError, match="the host has no memory for weights"),
        memory_for("weights", "lower it"),
    ):
        torch.empty(1 << 60)


def test_collectives_are_told_apart_from_what_they_follow():
    errors = [
        torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:536] Connection closed "
                     "by peer [127.0.0.1]:1234"),
    ]  # fmt: skip
    for error in errors:
        told = explained(error, "`measure`")
        assert isinstance(told, CollectiveError)
        assert "NCCL_DEBUG=INFO" in str(told)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448. "
                     "out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        KeyError("nccl"),
    ],
    ids=lambda error: str(error)[:24],
)  # fmt: skip
def test_other_errors_stay_what_they_are(error):
    assert explained(error, "a step") is error
    with pytest.raises(type(error)) as caught, memory_for("x", "y"):
        raise error
    assert caught.value is error


def test_what_was_explained_once_is_not_explained_again():
    with (
        pytest.raises(OutOfMemoryError, match="for the weights"),
        memory_for("all", "nothing"),
        memory_for("the weights", "fewer of them"),
    ):
        raise torch.OutOfMemoryError(ASKED)


def test_release_lets_go_of_what_the_frames_held():
    class Held:
        pass

    kept = []

    def allocate():
        tensor = Held()
        kept.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError(ASKED)

    try:
        with memory_for("x", "y"):
            allocate()
    except OutOfMemoryError as err:
        gc.collect()
        assert kept[0]() is not None
        release(err)
        assert kept[0]() is None


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (7, "died with exit code 7, so all ranks were ended"),
        (-9, "died by SIGKILL, so all ranks were ended; somebody killed it, or the system did"),
        (-6, "died by SIGABRT.*NCCL_DEBUG=INFO"),
        (-7, "died by SIGBUS.*larger /dev/shm"),
        (-250, "died by signal 250, so all ranks were ended$"),
        (None, "closed its pipe"),
    ],
)
def test_deaths_are_told_by_name_with_what_they_mean(code, told):
    assert re.search(told, death_told(code))


def test_without_a_gpu_there_is_no_state_of_its_memory():
    if not torch.cuda.is_available():
        assert memory_state() is None
