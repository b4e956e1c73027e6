"""All-reduce variants over symmetric memory, on a chosen number of blocks.

`symm_one_shot_N`: each rank sends everything to all. `symm_two_shot_N`: each rank reduces one shard
and sends the result; fewer bytes from three ranks on. N blocks, at most the SMs of the share. Sums
are in fp32 and in rank order: all ranks get the same bits. Every lane has a buffer of its own,
since lanes run side by side. The kernels are in `cuda/all_reduce.cu`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .cuda_module import CudaKernel
from .registry import Received, register
from .symmetric import FLAG_BYTES, SymmetricBuffer

Algorithm = Literal["one_shot", "two_shot"]
BLOCKS = (8, 16, 32)
PACK_BYTES = 16
"""Kernels move 16 bytes at a time."""
MAX_BLOCKS = 256
"""Signals of one phase and peer in a lane's buffer."""
_NUM_PHASES = 3
THREADS = 512
_MIN_BYTES = 64 << 20
"""Smallest buffer: two ranks and 2048 rows of 8192 bf16 elements fit without growing."""
_ELEMENT_BYTES = {torch.bfloat16: 2, torch.float32: 4}


@functools.cache
def all_reduce_kernel(name: str, world_size: int, element_bytes: int) -> CudaKernel:
    """`one_shot`, `two_shot` or `add_received` for some ranks and bf16 (2) or fp32 (4)."""
    assert _NUM_PHASES * MAX_BLOCKS * world_size * 4 <= FLAG_BYTES, "signals outgrow their space"
    return CudaKernel(
        "all_reduce.cu",
        name,
        {
            "WORLD": world_size,
            "ELEMENT_BYTES": element_bytes,
            "MAX_BLOCKS": MAX_BLOCKS,
            "FLAG_BYTES": FLAG_BYTES,
        },
    )


def num_packs(x_TD: Tensor) -> int:
    """How many packs of 16 bytes the rows are.

    Raises:
        ValueError: another dtype, rows apart from each other, or no whole number of packs.
    """
    if x_TD.dtype not in _ELEMENT_BYTES:
        raise ValueError(
            f"all-reduce over symmetric memory takes bfloat16 or float32, but got {x_TD.dtype}: "
            "use an `nccl` variant"
        )
    num_bytes = x_TD.numel() * x_TD.element_size()
    if not x_TD.is_contiguous() or x_TD.data_ptr() % PACK_BYTES or num_bytes % PACK_BYTES:
        raise ValueError(
            f"all-reduce over symmetric memory takes contiguous rows in multiples of {PACK_BYTES} "
            f"bytes, but got shape {tuple(x_TD.shape)}, strides {x_TD.stride()}: use an `nccl` "
            "variant"
        )
    return num_bytes // PACK_BYTES


def slot_bytes(packs: int, world_size: int) -> int:
    """Bytes behind the signals that a call on `packs` packs needs, whichever the algorithm."""
    shard = -(-packs // world_size)
    return PACK_BYTES * max(world_size * packs, 2 * world_size * shard)


class SymmetricLane:
    """One lane's buffer. It grows when a call needs more, on all ranks at the same call."""

    def __init__(self) -> None:
        self._buffers: list[SymmetricBuffer] = []

    def buffer(self, num_bytes: int) -> SymmetricBuffer:
        """A buffer with at least `num_bytes`; former ones stay, captured graphs hold them."""
        if not self._buffers or self._buffers[-1].num_bytes < num_bytes:
            size = max(_MIN_BYTES, 1 << (num_bytes - 1).bit_length())
            self._buffers.append(SymmetricBuffer(size))
        return self._buffers[-1]

    def all_reduce(self, x_TD: Tensor, algorithm: Algorithm, num_blocks: int) -> None:
        """Sum over the ranks in place, on the current stream."""
        import torch.distributed as dist

        packs = num_packs(x_TD)
        buffer = self.buffer(slot_bytes(packs, dist.get_world_size()))
        kernel = all_reduce_kernel(algorithm, buffer.world_size, x_TD.element_size())
        addresses = (ctypes.c_uint64 * buffer.world_size)(*buffer.addresses)
        rank, count = ctypes.c_int(buffer.rank), ctypes.c_int(packs)
        kernel.launch((num_blocks, 1, 1), THREADS, 0, (x_TD, addresses, rank, count))


def add_received(x_TD: Tensor, received: Received, num_sms: int) -> None:
    """x_TD = x_TD and what the peers sent, summed in rank order; local, on the current stream."""
    world_size, slot_elements = received.parts_WTD.shape[0], received.parts_WTD.stride(0)
    packs = num_packs(x_TD)
    kernel = all_reduce_kernel("add_received", world_size, x_TD.element_size())
    slot_packs = ctypes.c_uint64(slot_elements * x_TD.element_size() // PACK_BYTES)
    rank, count = ctypes.c_int(received.rank), ctypes.c_int(packs)
    grid = max(1, min(num_sms, -(-packs // THREADS)))
    arguments = (x_TD, received.parts_WTD, slot_packs, rank, count)
    kernel.launch((grid, 1, 1), THREADS, 0, arguments)


def _register(algorithm: Algorithm, num_blocks: int) -> None:
    @register("all_reduce", f"symm_{algorithm}_{num_blocks}", "cuda")
    def kernel(
        x_TD: Tensor, group: Mapping[str, Any] | None, num_sms: int, first_row: int = 0
    ) -> None:
        if group is not None:
            lane: SymmetricLane = group["symmetric"]
            lane.all_reduce(x_TD, algorithm, min(num_blocks, num_sms))


for _algorithm in ("one_shot", "two_shot"):
    for _num_blocks in BLOCKS:
        _register(_algorithm, _num_blocks)
