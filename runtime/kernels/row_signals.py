"""Signals between ranks by stream memory operations, and peer copies: neither takes an SM.

A row of the dense batch has two signals from every peer, "you may write" and "it is written"; the
first row of an exchange stands for all of it. `copy_engine.py` says why exchanges are right.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

from ..cuda_driver import checked, driver
from .symmetric import SymmetricBuffer

Signals = Literal["write", "copy"]
"""How a rank raises a signal at a peer: by a stream memory operation, or by a copy."""
Phase = Literal[0, 1]
FREE: Phase = 0
SENT: Phase = 1
_WORD_BYTES = 4


def signal_bytes(num_rows: int, world_size: int) -> int:
    """Bytes at the start of a symmetric buffer that the signals of so many rows take."""
    return -(-2 * num_rows * world_size * _WORD_BYTES // 256) * 256


def shard_of(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, end) of the rows that a rank has of so many; the last ranks may have none."""
    shard = -(-num_rows // world_size)
    start = min(rank * shard, num_rows)
    return start, min(start + shard, num_rows)


class RowSignals:
    """The signals of one symmetric buffer, as seen from this rank."""

    def __init__(self, buffer: SymmetricBuffer, num_rows: int, signals: Signals) -> None:
        """Take the first `signal_bytes` of the buffer."""
        self._buffer, self._num_rows = buffer, num_rows
        self._signals: Signals = signals
        world_size = buffer.world_size
        self.peers = tuple((buffer.rank + turn) % world_size for turn in range(1, world_size))
        """Other ranks, the next one first."""
        device = buffer.data(torch.uint8).device
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        self._meetings: dict[tuple[Phase, int], list[Any]] = {}

    def meet(self, phase: Phase, first_row: int) -> None:
        """Signal every peer, wait for all of them, put their signals back; on the current stream.

        Raises:
            CudaDriverError: the driver refuses.
        """
        key = (phase, first_row)
        if key not in self._meetings:
            self._meetings[key] = self._meeting(phase, first_row)
        operations = self._meetings[key]
        if self._signals == "copy":
            for peer in self.peers:
                word = self._word(phase, first_row, peer, self._buffer.rank)
                copy(word, self._one.data_ptr(), _WORD_BYTES)
        _enqueue(operations)

    def _word(self, phase: Phase, first_row: int, rank: int, sender: int) -> int:
        """Address of the signal that `sender` raises at `rank`."""
        cell = (phase * self._num_rows + first_row) * self._buffer.world_size + sender
        return self._buffer.addresses[rank] + cell * _WORD_BYTES

    def _meeting(self, phase: Phase, first_row: int) -> list[Any]:
        rank, targets = self._buffer.rank, self.peers if self._signals == "write" else ()
        theirs = [self._word(phase, first_row, peer, rank) for peer in targets]
        mine = [self._word(phase, first_row, rank, peer) for peer in self.peers]
        return [
            *(_write(address, 1) for address in theirs),
            *(_wait(address) for address in mine),
            *(_write(address, 0) for address in mine),
        ]


@functools.cache
def _flush_flag(device: int) -> int:
    """CU_STREAM_WAIT_VALUE_FLUSH where the device has it: remote writes are visible behind it."""
    api = driver()
    attribute = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES
    value = checked(
        api.cuDeviceGetAttribute(attribute, device), "asking whether remote writes can be flushed"
    )
    return int(api.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_FLUSH) if value else 0


def _wait(address: int) -> Any:  # noqa: ANN401 - driver structure
    api = driver()
    equal = int(api.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ)
    operation = api.CUstreamBatchMemOpParams()
    operation.waitValue.operation = api.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WAIT_VALUE_32
    operation.waitValue.address = address
    operation.waitValue.value = 1
    operation.waitValue.flags = equal | _flush_flag(torch.cuda.current_device())
    return operation


def _write(address: int, value: int) -> Any:  # noqa: ANN401 - driver structure
    api = driver()
    operation = api.CUstreamBatchMemOpParams()
    operation.writeValue.operation = api.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
    operation.writeValue.address = address
    operation.writeValue.value = value
    operation.writeValue.flags = 0  # the default: behind a fence
    return operation


def _enqueue(operations: list[Any]) -> None:
    """Memory operations on the current stream, in their order."""
    stream = torch.cuda.current_stream().cuda_stream
    checked(
        driver().cuStreamBatchMemOp(stream, len(operations), operations, 0),
        "signals of a copy-engine exchange",
    )


def copy(target: int, source: int, num_bytes: int) -> None:
    """Copy between addresses of any GPUs, on the current stream."""
    stream = torch.cuda.current_stream().cuda_stream
    checked(
        driver().cuMemcpyAsync(target, source, num_bytes, stream),
        f"a peer copy of {num_bytes} bytes",
    )


def copy_rows(
    target: int, target_pitch: int, source: int, source_pitch: int, row_bytes: int, num_rows: int
) -> None:
    """Copy rows whose starts are a pitch (bytes) apart between addresses of any GPUs."""
    api = driver()
    region = api.CUDA_MEMCPY2D()
    region.srcMemoryType = region.dstMemoryType = api.CUmemorytype.CU_MEMORYTYPE_UNIFIED
    region.srcDevice, region.srcPitch = source, source_pitch
    region.dstDevice, region.dstPitch = target, target_pitch
    region.WidthInBytes, region.Height = row_bytes, num_rows
    stream = torch.cuda.current_stream().cuda_stream
    checked(
        api.cuMemcpy2DAsync(region, stream), f"a peer copy of {num_rows} rows of {row_bytes} bytes"
    )
