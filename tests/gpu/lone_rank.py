"""One rank of a kernel over peers' memory, alone on one GPU: the peers have done their part before.

Every signal that the rank will wait for is raised beforehand, and its slots hold what the peers
would push. So the call ends by itself, in plain memory of exact sizes: what `compute-sanitizer`
checks best, and what tests can look at without a second GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow_tune.runtime.kernels.all_gather import all_gather_kernel
from nanoflow_tune.runtime.kernels.registry import Received
from nanoflow_tune.runtime.kernels.symmetric import FLAG_BYTES
from nanoflow_tune.runtime.kernels.symmetric_all_reduce import (
    MAX_BLOCKS,
    PACK_BYTES,
    THREADS,
    add_received,
    all_reduce_kernel,
    num_packs,
    slot_bytes,
)

PHASES = {"one_shot": 2, "two_shot": 3, "all_gather": 2}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a lone call left behind."""

    result: Tensor
    """What it should have made of this rank's rows, and made of them."""
    expected: Tensor
    own_signals: Tensor
    """Raised beforehand; all 0 after the call."""
    peer_signals: tuple[Tensor, ...]
    """Of each peer, at this rank's cells: all 1 after the call."""


def random_parts(world_size: int, rows: int, width: int) -> list[Tensor]:
    """Every rank's bf16 rows, each an allocation of its own."""
    generator = torch.Generator(device="cuda").manual_seed(rows * width)
    return [
        torch.randn(rows, width, device="cuda", generator=generator).bfloat16()
        for _ in range(world_size)
    ]


def sum_in_rank_order(parts: list[Tensor]) -> Tensor:
    """fp32 sums from rank 0 on, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.bfloat16()


def _shared_buffers(world_size: int, num_bytes: int) -> list[Tensor]:
    """Signals at 0, and slots full of NaN, on every rank."""
    buffers = [
        torch.full((FLAG_BYTES + num_bytes,), 0xFF, dtype=torch.uint8, device="cuda")
        for _ in range(world_size)
    ]
    for buffer in buffers:
        buffer[:FLAG_BYTES].zero_()
    return buffers


def _signals(buffer: Tensor, world_size: int, phases: int, num_blocks: int) -> Tensor:
    """Signals by (phase, block, sender), those that a grid of this size uses."""
    cells = buffer[:FLAG_BYTES].view(torch.int32)[: phases * MAX_BLOCKS * world_size]
    return cells.view(phases, MAX_BLOCKS, world_size)[:, :num_blocks]


def _outcome(
    buffers: list[Tensor], rank: int, phases: int, num_blocks: int, result: Tensor, expected: Tensor
) -> Outcome:
    views = [_signals(buffer, len(buffers), phases, num_blocks) for buffer in buffers]
    peers = [peer for peer in range(len(buffers)) if peer != rank]
    return Outcome(
        result=result,
        expected=expected,
        own_signals=views[rank],
        peer_signals=tuple(views[peer][:, :, rank] for peer in peers),
    )


def _raise_for(buffers: list[Tensor], rank: int, phases: int, num_blocks: int) -> None:
    signals = _signals(buffers[rank], len(buffers), phases, num_blocks)
    for peer in range(len(buffers)):
        if peer != rank:
            signals[:, :, peer] = 1


def all_reduce_alone(
    algorithm: str, rank: int, world_size: int, rows: int, width: int, num_blocks: int
) -> Outcome:
    """`one_shot` or `two_shot` of `cuda/all_reduce.cu`, as `rank` of `world_size` runs it."""
    parts = random_parts(world_size, rows, width)
    expected = sum_in_rank_order(parts)
    x = parts[rank].clone()
    packs = num_packs(x)
    shard = -(-packs // world_size)
    buffers = _shared_buffers(world_size, slot_bytes(packs, world_size))
    _raise_for(buffers, rank, PHASES[algorithm], num_blocks)
    slots = buffers[rank][FLAG_BYTES:].view(-1, PACK_BYTES)

    def in_packs(tensor: Tensor) -> Tensor:
        return tensor.view(torch.uint8).view(-1, PACK_BYTES)

    for peer in range(world_size):
        if peer == rank:
            continue
        if algorithm == "one_shot":
            slots[peer * packs : (peer + 1) * packs] = in_packs(parts[peer])
            continue
        mine = in_packs(parts[peer])[rank * shard : (rank + 1) * shard]
        slots[peer * shard : peer * shard + len(mine)] = mine
        theirs = in_packs(expected)[peer * shard : (peer + 1) * shard]
        first = (world_size + peer) * shard
        slots[first : first + len(theirs)] = theirs
    kernel = all_reduce_kernel(algorithm, world_size, x.element_size())
    addresses = (ctypes.c_uint64 * world_size)(*(buffer.data_ptr() for buffer in buffers))
    arguments = (x, addresses, ctypes.c_int(rank), ctypes.c_int(packs))
    kernel.launch((num_blocks, 1, 1), THREADS, 0, arguments)
    torch.cuda.synchronize()
    return _outcome(buffers, rank, PHASES[algorithm], num_blocks, x, expected)


def all_gather_alone(
    rank: int, world_size: int, rows: int, width: int, num_blocks: int
) -> tuple[Outcome, list[Tensor]]:
    """`cuda/all_gather.cu` as one rank runs it, with the outputs of all ranks; NaN elsewhere.

    `result` and `expected` are this rank's columns in every output.
    """
    parts = random_parts(world_size, rows, width)
    outputs = [
        torch.full((rows, world_size * width), float("nan"), device="cuda").bfloat16()
        for _ in range(world_size)
    ]
    buffers = _shared_buffers(world_size, 0)
    _raise_for(buffers, rank, PHASES["all_gather"], num_blocks)
    x, size = parts[rank], parts[rank].element_size()
    pointers = ctypes.c_uint64 * world_size
    row_packs = width * size // PACK_BYTES
    numbers = (row_packs, world_size * row_packs, row_packs, rows, rank)
    arguments = (
        x,
        pointers(*(buffer.data_ptr() for buffer in buffers)),
        pointers(*(output.data_ptr() + rank * width * size for output in outputs)),
        *(ctypes.c_int(number) for number in numbers),
    )
    all_gather_kernel(world_size).launch((num_blocks, 1, 1), THREADS, 0, arguments)
    torch.cuda.synchronize()
    columns = slice(rank * width, (rank + 1) * width)
    result = torch.stack([output[:, columns] for output in outputs])
    expected = torch.stack([x] * world_size)
    outcome = _outcome(buffers, rank, PHASES["all_gather"], num_blocks, result, expected)
    return outcome, outputs


def add_alone(
    rank: int, world_size: int, rows: int, width: int, num_sms: int, missing_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """(x after `add_received`, the sum in rank order).

    With `missing_rows` the inbox is that much too short: a fault on purpose, which a memory checker
    must see.
    """
    parts = random_parts(world_size, rows, width)
    inbox = torch.full((world_size * rows, width), float("nan"), device="cuda").bfloat16()
    for peer, part in enumerate(parts):
        if peer != rank:
            inbox[peer * rows : (peer + 1) * rows] = part
    kept = inbox[: world_size * rows - missing_rows].clone()  # an allocation that ends there
    slots = kept.as_strided((world_size, rows - missing_rows, width), (rows * width, width, 1))
    x = parts[rank].clone()
    add_received(x, Received(parts_WTD=slots, rank=rank), num_sms)
    torch.cuda.synchronize()
    return x, sum_in_rank_order(parts)
