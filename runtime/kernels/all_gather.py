"""All-gather variants: NCCL, kernels that push through symmetric memory, and copy engines.

`nccl`, `nccl_8`, `nccl_16` gather into a scratch tensor and lay the columns out in a second pass
over the result (a read and a write of T x D elements); `out_TD` may lie anywhere. `symm_N` pushes
with N blocks, at most the SMs of the share, and `copy_engine` takes no SMs: both write the peers'
outputs themselves, so that `out_TD` must be rows of `gather_buffer.output_rows`. The kernel is in
`cuda/all_gather.cu`. Columns that are not in place are copied on this rank too, which the driver
may do with SMs.

Shape legend: `gather_buffer`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .collectives import CTA_LIMITS, Groups
from .copy_engine import VARIANT as COPY_ENGINE
from .cuda_module import CudaKernel
from .gather_buffer import KEY, GatherBuffer, check_shapes
from .registry import register
from .symmetric_all_reduce import BLOCKS, MAX_BLOCKS, PACK_BYTES, THREADS, SymmetricLane

Gather = Callable[[Tensor, Tensor, Groups, int, int], None]
"""(x_TW, out_TD, group, num_sms, first_row)"""


@functools.cache
def all_gather_kernel(world_size: int) -> CudaKernel:
    """The push kernel for some ranks."""
    definitions = {"WORLD": world_size, "MAX_BLOCKS": MAX_BLOCKS}
    return CudaKernel("all_gather.cu", "all_gather", definitions)


def check_packs(x_TW: Tensor) -> None:
    """Refuse columns that kernels cannot move 16 bytes at a time.

    Raises:
        ValueError: start, width or distance of rows is no multiple of 16 bytes.
    """
    size = x_TW.element_size()
    sizes = (x_TW.data_ptr(), x_TW.shape[1] * size, x_TW.stride(0) * size)
    if any(number % PACK_BYTES for number in sizes):
        raise ValueError(
            f"all-gather over symmetric memory takes columns and rows in multiples of {PACK_BYTES} "
            f"bytes, but got {x_TW.dtype} of shape {tuple(x_TW.shape)}, strides {x_TW.stride()}: "
            "use an `nccl` variant"
        )


def gather_with_nccl(x_TW: Tensor, out_TD: Tensor, group: Any) -> None:  # noqa: ANN401
    """Gather by rank, then lay the columns out."""
    rows, width = x_TW.shape
    world_size = dist.get_world_size(group)
    check_shapes(x_TW, out_TD, world_size)
    by_rank_NTW = x_TW.new_empty(world_size, rows, width)
    columns = x_TW.contiguous().view(-1)
    # Its successor, `all_gather_single`, is not in torch 2.11.
    dist.all_gather_into_tensor(  # pyright: ignore[reportDeprecated]
        by_rank_NTW.view(-1), columns, group=group
    )
    out_TD.unflatten(1, (world_size, width)).copy_(by_rank_NTW.transpose(0, 1))


def gather_with_kernel(
    x_TW: Tensor, buffer: GatherBuffer, lane: SymmetricLane, num_blocks: int, first_row: int
) -> None:
    """Push this rank's columns into everybody's rows from `first_row` on."""
    check_packs(x_TW)
    signals = lane.buffer(0)
    pointers = ctypes.c_uint64 * buffer.world_size
    row_packs = x_TW.shape[1] * x_TW.element_size() // PACK_BYTES
    numbers = (
        x_TW.stride(0) * x_TW.element_size() // PACK_BYTES,
        buffer.row_bytes // PACK_BYTES,
        row_packs,
        x_TW.shape[0],
        buffer.rank,
    )
    arguments = (
        x_TW,
        pointers(*signals.addresses),
        pointers(*buffer.addresses(first_row)),
        *(ctypes.c_int(number) for number in numbers),
    )
    kernel = all_gather_kernel(buffer.world_size)
    kernel.launch((num_blocks, 1, 1), THREADS, 0, arguments)


def _output(x_TW: Tensor, out_TD: Tensor, group: Groups, first_row: int) -> GatherBuffer:
    buffer: GatherBuffer = group[KEY].find(out_TD, first_row)
    check_shapes(x_TW, out_TD, buffer.world_size)
    return buffer


def _register(variant: str, gather: Gather) -> None:
    @register("all_gather", variant, "cuda")
    def kernel(
        x_TW: Tensor, out_TD: Tensor, group: Groups | None, num_sms: int, first_row: int = 0
    ) -> None:
        if group is None:  # one rank: its columns are the result
            check_shapes(x_TW, out_TD, 1)
            out_TD.copy_(x_TW)
        else:
            gather(x_TW, out_TD, group, num_sms, first_row)


def _by_nccl(variant: str) -> Gather:
    def gather(x_TW: Tensor, out_TD: Tensor, group: Groups, num_sms: int, first_row: int) -> None:
        gather_with_nccl(x_TW, out_TD, group[variant])

    return gather


def _by_kernel(most_blocks: int) -> Gather:
    def gather(x_TW: Tensor, out_TD: Tensor, group: Groups, num_sms: int, first_row: int) -> None:
        buffer = _output(x_TW, out_TD, group, first_row)
        blocks = min(most_blocks, num_sms)
        gather_with_kernel(x_TW, buffer, group["symmetric"], blocks, first_row)

    return gather


def _by_copy_engines(
    x_TW: Tensor, out_TD: Tensor, group: Groups, num_sms: int, first_row: int
) -> None:
    _output(x_TW, out_TD, group, first_row).exchange(x_TW, first_row)


for _limit in CTA_LIMITS:
    _register(_limit, _by_nccl(_limit))
for _most_blocks in BLOCKS:
    _register(f"symm_{_most_blocks}", _by_kernel(_most_blocks))
_register(COPY_ENGINE, _by_copy_engines)
