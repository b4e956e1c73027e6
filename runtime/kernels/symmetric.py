"""Symmetric memory: one buffer of the same size on every rank, mapped on all of them.

Kernels and copy engines of one GPU write straight into the buffers of the others, over NVLink and
without multicast. A buffer starts with FLAG_BYTES for signals, zero when nothing is under way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

FLAG_BYTES = 1 << 15
"""Signals at the start of each buffer; zeroed once, before any rank may write."""


class SymmetricBuffer:
    """One allocation on every rank of the default process group; making it is collective."""

    def __init__(self, num_bytes: int, flag_bytes: int = FLAG_BYTES) -> None:
        """Allocate `flag_bytes` of signals and `num_bytes` behind them, and map the peers' too.

        Raises:
            RuntimeError: a CUDA graph is being captured, or the GPUs cannot reach each other.
        """
        import torch.distributed._symmetric_memory as symm_mem

        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "symmetric memory cannot be allocated inside a CUDA graph: run the all-reduce once "
                "on as many rows before the capture"
            )
        group = dist.group.WORLD
        assert group is not None, "ranks join a process group first"
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.num_bytes, self.flag_bytes = num_bytes, flag_bytes
        device = torch.device("cuda", torch.cuda.current_device())
        self._bytes = symm_mem.empty(flag_bytes + num_bytes, dtype=torch.uint8, device=device)
        self._handle = symm_mem.rendezvous(self._bytes, group)  # keeps the mappings alive
        pointers = self._handle.buffer_ptrs
        offset = self._bytes.data_ptr() - pointers[self.rank]  # equal on all ranks
        self.addresses: tuple[int, ...] = tuple(pointer + offset for pointer in pointers)
        """Start of each rank's buffer, signals first, as mapped on this rank."""
        self._bytes.zero_()
        torch.cuda.synchronize()
        dist.barrier()

    def data(self, dtype: torch.dtype) -> Tensor:
        """This rank's bytes behind the signals, flat, as elements of a type."""
        return self._bytes[self.flag_bytes :].view(dtype)
