"""Worker processes, one per tensor-parallel rank, that stay for many calls.

    with RankGroup(2, device="cuda") as ranks:
        results = ranks.call(measure, schedule)      # measure(ctx, schedule) on every rank

The parent imports no torch: functions travel by name, so a module whose functions are called
here imports torch inside them when the parent must stay light. A rank that dies or hangs ends all;
of several failures the first cause is told, not what it did to the other ranks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from .gpu_failures import CollectiveError, GpuFailureError, death_told, explained, release
from .rank_stacks import place_told, watch_stack

DeviceType = Literal["cpu", "cuda"]
ResultT = TypeVar("ResultT")

_PACKAGE = __name__.partition(".")[0]
_PARENT_POLL_S = 0.5
_LONGEST_WAIT_S = 86400.0
"""The system's poll takes no more than some weeks at a time; calls may take longer."""
_GRACE_S = 5.0
"""After one rank failed, the others have this long to finish before they are ended."""
PEER_FAILED = signal.SIGUSR2
"""Sent to ranks when another one has failed; ignored unless a rank handles it."""
_TERM_S = 1.0
"""Between asking a rank to end and killing it."""


class RankError(RuntimeError):
    """A rank raised, died or hung; the message names it and the cause."""


class LostRankError(RankError, GpuFailureError):
    """A rank died or hung: nothing of its own says why."""

    cause = "a process that drives a GPU died or hung"


@dataclass(slots=True)
class RankContext:
    """What a called function gets first."""

    rank: int
    world_size: int
    device: str
    """`cpu` or `cuda:<rank>`."""
    state: dict[str, Any] = field(default_factory=dict[str, Any])
    """Objects that a rank keeps between calls."""


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException | None
    """The exception itself when it is a domain error."""
    summary: str
    details: str
    is_death: bool = False
    exit_code: int | None = None

    @property
    def remoteness(self) -> int:
        """From the first cause: what another rank's failure may have led to comes later.

        When a peer is gone, NCCL aborts a rank or its collectives fail, and kernels that wrote to
        the peer's memory end in CUDA errors.
        """
        if self.is_death:
            return 3 if self.exit_code in (-signal.SIGABRT, -PEER_FAILED) else 1
        if self.error is not None:
            return 4 if isinstance(self.error, CollectiveError) else 0
        return 2


class RankGroup:
    """`world_size` processes with a process group among them (gloo or NCCL)."""

    def __init__(
        self, world_size: int, device: DeviceType = "cpu", timeout_s: float = 1800.0
    ) -> None:
        """Describe the ranks; they start on entry.

        Args:
            world_size: number of ranks, on this host.
            device: `cuda` gives each rank the GPU of its number.
            timeout_s: a call that takes longer counts as hung.

        Raises:
            ValueError: fewer than one rank.
        """
        if world_size < 1:
            raise ValueError(f"`world_size` must be at least 1, but got {world_size}")
        self.world_size = world_size
        self.device: DeviceType = device
        self.timeout_s = timeout_s
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None
        """Where ranks that hang write what they are doing."""

    def __enter__(self) -> Self:
        spawn = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="nanoflow-ranks-"))
        try:
            for rank in range(self.world_size):
                ours, theirs = spawn.Pipe()
                stack = str(self._folder / str(rank))
                arguments = (theirs, rank, self.world_size, self.device, self.timeout_s, stack)
                process = spawn.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            # Rank 0 opens the rendezvous on a port of the system's choice and tells the others.
            port = self._collect([0])[0]
            for pipe in self._pipes[1:]:
                pipe.send(port)
            self._collect(range(self.world_size))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def call(self, fn: Callable[..., ResultT], *args: object) -> list[ResultT]:
        """Run `fn(ctx, *args)` on every rank; the results in rank order.

        Args:
            fn: a module-level function.
            args: picklable.

        Raises:
            RankError: a rank raised; `LostRankError`: it died or hung. A `ValueError`, or an error
                of this package, keeps its type and carries the rank's traceback as a note; so do
                `OutOfMemoryError` and `CollectiveError`, whose causes are put in words.
        """
        if not self._processes:
            raise RankError("the ranks are not running: use `with RankGroup(...) as ranks`")
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((fn, args))
            except (BrokenPipeError, ConnectionError) as err:
                failure = self._death(rank)
                self._abort()
                raise _raised(rank, failure) from err
        return self._collect(range(self.world_size))

    def close(self) -> None:
        """End all ranks."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + _GRACE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes.clear()
        self._pipes.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _abort(self) -> None:
        """End all ranks at once: they hang, or would."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _TERM_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            process.kill()
        self.close()

    def _collect(self, ranks: Sequence[int]) -> list[Any]:
        waiting = {self._pipes[rank]: rank for rank in ranks}
        replies: dict[int, Any] = {}
        failed: dict[int, _Failure] = {}
        deadline = time.monotonic() + self.timeout_s
        while waiting:
            left_s = max(0.0, deadline - time.monotonic())
            ready = wait(list(waiting), timeout=min(left_s, _LONGEST_WAIT_S))
            if not ready and left_s > _LONGEST_WAIT_S:
                continue
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    replies[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    replies[rank] = self._death(rank)
                if isinstance(replies[rank], _Failure):
                    if not failed:
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
                        self._warn(waiting.values())
                    failed[rank] = replies[rank]
        if not failed and not waiting:
            return [replies[rank] for rank in ranks]
        hung = sorted(waiting.values())
        where = [] if failed else self._where(hung)
        if hung or not all(process.is_alive() for process in self._processes):
            self._abort()
        if failed:
            raise _raised(*_first_cause(failed))
        raise LostRankError(
            f"no answer from rank {', '.join(map(str, hung))} within {self.timeout_s:g} s, so "
            "all ranks were ended; a collective that some ranks never reach hangs like this"
            + "".join(f"; {told}" for told in where)
            + "; run the same command again, with NCCL_DEBUG=INFO if it hangs there again"
        )

    def _warn(self, ranks: Iterable[int]) -> None:
        """Tell ranks that one has failed, so that those who serve can say so before they end."""
        for rank in ranks:
            process = self._processes[rank]
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, PEER_FAILED)

    def _where(self, hung: Sequence[int]) -> list[str]:
        """What ranks that do not answer are doing."""
        assert self._folder is not None
        told = {
            rank: place_told(self._processes[rank].pid, self._folder / str(rank)) for rank in hung
        }
        return [f"rank {rank} was in {place}" for rank, place in told.items() if place]

    def _death(self, rank: int) -> _Failure:
        process = self._processes[rank]
        process.join(_GRACE_S)
        code = process.exitcode
        return _Failure(None, death_told(code), "", is_death=True, exit_code=code)


def _first_cause(failed: dict[int, _Failure]) -> tuple[int, _Failure]:
    """The failure closest to the first cause, of equal ones the earliest."""
    return min(failed.items(), key=lambda item: item[1].remoteness)


def _raised(rank: int, failure: _Failure) -> BaseException:
    if failure.error is not None:
        failure.error.add_note(f"on rank {rank}:\n{failure.details}")
        return failure.error
    kind = LostRankError if failure.is_death else RankError
    error = kind(f"rank {rank}: {failure.summary}")
    if failure.details:
        error.add_note(failure.details)
    return error


def _serve(
    pipe: Connection,
    rank: int,
    world_size: int,
    device: DeviceType,
    timeout_s: float,
    stack: str,
) -> None:
    """A rank's life: join the process group, answer calls until told to stop."""
    watch_stack(Path(stack))
    for number in (signal.SIGINT, PEER_FAILED):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    os.dup2(2, 1)  # whatever libraries print: the parent's stdout is for its results
    try:
        context = _join(pipe, rank, world_size, device, timeout_s)
    except Exception as err:
        pipe.send(_failure(err, "joining the other ranks"))
        return
    pipe.send(None)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            break
        except Exception as err:
            pipe.send(_failure(err, "reading a call"))
            continue
        if message is None:
            break
        _answer(pipe, context, *message)
    if world_size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def _end_with_parent(parent: int) -> None:
    """End this process when its parent is gone: a killed parent cannot end its ranks itself."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


def _answer(
    pipe: Connection, context: RankContext, fn: Callable[..., Any], args: tuple[object, ...]
) -> None:
    try:
        reply = pickle.dumps(fn(context, *args))
    except Exception as err:
        reply = pickle.dumps(_failure(err, f"`{fn.__name__}`"))
        release(err)
    pipe.send_bytes(reply)


def _join(
    pipe: Connection, rank: int, world_size: int, device: DeviceType, timeout_s: float
) -> RankContext:
    from datetime import timedelta

    # Of a peer that is gone, the parent tells more than what each rank's store says on stderr.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    import torch.distributed as dist

    context = RankContext(rank, world_size, f"cuda:{rank}" if device == "cuda" else "cpu")
    if device == "cuda":
        # Collectives write to the peers directly; NVLink multicast stays off.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)  # small ops; several ranks share the cores
    if world_size > 1 and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: no name look-up
    timeout = timedelta(seconds=timeout_s)
    make_store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented
    store = None
    if rank == 0:
        if world_size > 1:
            store = make_store("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
        pipe.send(store.port if store is not None else 0)
    else:
        store = make_store("127.0.0.1", pipe.recv(), None, False, timeout)
    if store is not None:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=torch.device(context.device) if device == "cuda" else None,
        )
    return context


def _failure(err: Exception, what: str) -> _Failure:
    details = "".join(traceback.format_exception(err))
    err = explained(err, what)
    is_domain = isinstance(err, ValueError) or type(err).__module__.startswith(_PACKAGE + ".")
    kept: BaseException | None = None
    if is_domain:
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(err))  # an exception with its own __init__ may not travel
            kept = err
    return _Failure(kept, f"{type(err).__name__}: {err}", details)
