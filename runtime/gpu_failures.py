"""Failures of GPUs and of ranks as a user reads them: what failed, with which values, what helps.

    with memory_for("the KV cache", "lower --kv-cache-gib"):
        cache = PagedKvCache(...)

PyTorch, the CUDA driver, cuBLAS and NCCL each say in their own words that memory ran out or that a
peer is gone. `explained` knows those words; whoever knows what the memory was for says so with
`memory_for`, and what nobody named is named by the call that met it. No torch is imported here.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

GPU_FAILED = 5
"""Exit code of both commands: no fault of the input, and none of this package's code."""

ErrorT = TypeVar("ErrorT", bound=BaseException)
_GIB = 2**30
_OUT_OF_MEMORY = (
    *("out of memory", "out_of_memory", "cudaerrormemoryallocation", "cublas_status_alloc_failed"),
    *("cusolver_status_alloc_failed", "can't allocate memory", "not enough memory: you tried"),
)
_OTHER_MEMORY = ("shared memory", "out of resource")
"""A kernel that wants more of an SM than it has is a bad kernel, not a full GPU."""
_COLLECTIVE = (
    *("nccl", "gloo", "connection closed by peer", "connection reset by peer", "broken pipe"),
    *("processgroup", "process group", "tcpstore", "c10d", "recvvalue failed"),
)
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))")
_FREE_SOME = "end what else runs on the GPU, or spread the model over more GPUs (--num-gpus)"
_SIGNALS = {
    signal.SIGKILL: "somebody killed it, or the system did because host memory ran out (`dmesg` "
    "says so): free host memory, or run less beside it",
    signal.SIGTERM: "somebody ended it: run the same command again",
    signal.SIGABRT: "a library gave up, and said why above: NCCL does when a collective fails or "
    "takes too long, which NCCL_DEBUG=INFO explains",
    signal.SIGBUS: "shared memory ran out: give the container a larger /dev/shm",
    signal.SIGSEGV: "a library crashed: `nvidia-smi` shows whether the GPU still answers",
}


class GpuFailureError(RuntimeError):
    """A GPU, or a rank on one, failed; the message has values, cause and remedy."""

    cause: ClassVar[str] = "the GPU failed"
    """For those who must not see the message: clients of a server, probes of its health."""


class OutOfMemoryError(GpuFailureError):
    """Memory of a GPU, or of the host for pinned buffers, ran out."""

    cause = "out of memory"


class CollectiveError(GpuFailureError):
    """A collective failed on this rank, most often because of what happened to another one."""

    cause = "a collective among the GPUs failed"


class StalledStepError(GpuFailureError):
    """The device did not end a step in time; the thread that waits for it cannot be ended."""

    cause = "the GPU does not answer"


@contextmanager
def memory_for(what: str, remedy: str) -> Generator[None, None, None]:
    """Say of memory that runs out in the body what it was for, and what helps.

    Args:
        what: `the KV cache`.
        remedy: with flags that the user's command has.

    Raises:
        OutOfMemoryError: in place of the libraries' own errors.
    """
    try:
        yield
    except Exception as err:
        told = explained(err, what, remedy)
        if told is err:
            raise
        raise told from err


def explained(err: ErrorT, what: str, remedy: str = _FREE_SOME) -> ErrorT | GpuFailureError:
    """The error in words for users, or itself where it tells of no failed GPU.

    Args:
        err: what a library raised.
        what: needed the memory, or met the error.
        remedy: for memory; a collective's is the same everywhere.
    """
    if isinstance(err, GpuFailureError) or not isinstance(err, RuntimeError | MemoryError):
        return err
    text, words = str(err), f"{type(err).__name__} {err}".lower()
    has_run_out = any(phrase in words for phrase in _OUT_OF_MEMORY)
    if isinstance(err, MemoryError) or (
        has_run_out and not any(phrase in words for phrase in _OTHER_MEMORY)
    ):
        return OutOfMemoryError(_memory_told(text, what, remedy))
    module = type(err).__module__
    is_ours = module.startswith(__name__.partition(".")[0] + ".")
    is_distributed = module.startswith("torch.distributed")
    if is_distributed or (not is_ours and any(phrase in words for phrase in _COLLECTIVE)):
        return CollectiveError(
            f"a collective failed in {what} ({_first_line(text)}): another rank failed or ended, "
            "or the link between the GPUs broke; run the same command again, with "
            "NCCL_DEBUG=INFO to see what NCCL saw"
        )
    return err


def is_out_of_memory(message: str) -> bool:
    """Whether a message that was kept, e.g. in a row of a profile, is an `OutOfMemoryError`'s."""
    return " has no memory for " in message


def release(err: BaseException) -> None:
    """Drop what the frames of an error hold, so that the next try has the memory."""
    seen: BaseException | None = err
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    torch: Any = sys.modules.get("torch")
    with suppress(Exception):
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def death_told(exit_code: int | None) -> str:
    """How a process ended, and what that means.

    Args:
        exit_code: of `multiprocessing`: below 0 is a signal; None: it still runs.
    """
    hint = ""
    if exit_code is None:
        how = "closed its pipe without a word"
    elif exit_code >= 0:
        how = f"died with exit code {exit_code}"
    else:
        how = f"died by signal {-exit_code}"
        with suppress(ValueError):  # a signal without a name
            name = signal.Signals(-exit_code)
            how, hint = f"died by {name.name}", _SIGNALS.get(name, "")
    told = f"the process {how}, so all ranks were ended"
    return f"{told}; {hint}" if hint else told


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryState:
    """Of one GPU, right after an allocation failed."""

    index: int
    free_bytes: int
    total_bytes: int
    own_bytes: int
    """What PyTorch holds of it in this process."""
    others: tuple[str, ...]
    """`process 4711 (python) holds 3.2 GiB`; only those that NVML shows and this system knows."""

    def told(self) -> str:
        """In one clause."""
        clauses = [
            f"{_gib(self.free_bytes)} of {_gib(self.total_bytes)} GiB are free",
            f"this process holds {_gib(self.own_bytes)} GiB",
            *self.others,
        ]
        rest = self.total_bytes - self.free_bytes - self.own_bytes
        if not self.others and rest > self.total_bytes // 20:
            clauses.append(f"{_gib(rest)} GiB are others' (`nvidia-smi` says whose)")
        return ", ".join(clauses)


def memory_state() -> MemoryState | None:
    """Of this thread's GPU; None where there is none, or where it does not answer."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    try:
        if not torch.cuda.is_initialized():
            return None
        index = int(torch.cuda.current_device())
        free, total = torch.cuda.mem_get_info(index)
        own = int(torch.cuda.memory_reserved(index))
        uuid = str(torch.cuda.get_device_properties(index).uuid)
    except Exception:  # a lost context answers nothing, and must not hide what is being told
        return None
    return MemoryState(
        index=index,
        free_bytes=int(free),
        total_bytes=int(total),
        own_bytes=own,
        others=_others_on(uuid),
    )


def _memory_told(text: str, what: str, remedy: str) -> str:
    asked = _ASKED.search(text)
    wanted = f"{asked[1]} were asked for" if asked else _first_line(text) or "no more was given"
    is_host = "cpu" in text.lower() or "can't allocate memory" in text.lower()
    state = None if is_host else memory_state()
    if state is None:
        place = "the host" if is_host or not text else "the GPU"
        return f"{place} has no memory for {what}: {wanted}; {remedy}"
    return f"GPU {state.index} has no memory for {what}: {wanted}, but {state.told()}; {remedy}"


def _others_on(uuid: str) -> tuple[str, ...]:
    """Other processes on a GPU, the largest first."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return ()
    found: list[tuple[int, str]] = []
    with suppress(Exception):  # this tells more of a failure, and must not become another one
        nvml.nvmlInit()
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid if "GPU-" in uuid else f"GPU-{uuid}")
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                name = _process_name(process.pid)
                # Inside a container NVML tells the host's ids: one that is unknown may be our own.
                if process.pid == os.getpid() or not name:
                    continue
                held = int(process.usedGpuMemory or 0)
                size = f"holds {_gib(held)} GiB" if held else "runs there too"
                found.append((held, f"process {process.pid} ({name}) {size}"))
        finally:
            nvml.nvmlShutdown()
    return tuple(told for _, told in sorted(found, reverse=True))


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text("utf-8").strip()
    except OSError:
        return ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200].rstrip(".;: ")
