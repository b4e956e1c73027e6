"""Outputs of all-gathers in symmetric memory: the peers write their columns straight into them.

An all-gather over peers' memory has no pass of its own over the result: `out_TD` is rows of a
gather buffer, and whoever reads the gathered activation reads it there. So an executor binds the
full-width activation to `output_rows` once; every variant can write it, and nano-ops of one op may
use different variants. Copying into ordinary memory instead would read and write T x D elements
again, on the SMs that the collective was to leave alone.

A GEMM may also write this rank's columns of `out_TD` itself, and pass them as `x_TW`: then nothing
is copied on this rank.

Reuse: a peer's rows are written only after it has said that they are free, which its stream reaches
behind everything that read them (`copy_engine.py` has the argument). Two all-gathers may use the
same rows of one buffer when a plan's data dependencies put the readers of the first before the
second; an executor gives each its own all the same (`name`), so that what each may write can be
audited.

Shape legend: T rows, W columns of one rank, D = ranks x W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .row_signals import (
    FREE,
    SENT,
    RowSignals,
    Signals,
    copy,
    copy_rows,
    shard_of,
    signal_bytes,
)
from .symmetric import SymmetricBuffer

KEY = "gathered"
"""Of a lane's groups: the rank's `GatherBuffers`."""
_MIN_ROWS = 2048
_SPARE_ROWS = 16
"""Rows behind those asked for, which nothing may write: the audit looks at them."""


class GatherBuffer:
    """Gathered rows of one dense batch on this rank, and the way into the peers'."""

    def __init__(
        self, num_rows: int, width: int, dtype: torch.dtype, signals: Signals = "write"
    ) -> None:
        """Allocate on all ranks; collective."""
        import torch.distributed as dist

        self.num_rows, self.width, self.dtype = num_rows, width, dtype
        self.row_bytes = width * dtype.itemsize
        flag_bytes = signal_bytes(num_rows, dist.get_world_size())
        self._buffer = SymmetricBuffer((num_rows + _SPARE_ROWS) * self.row_bytes, flag_bytes)
        self.rank, self.world_size = self._buffer.rank, self._buffer.world_size
        self._signals = RowSignals(self._buffer, num_rows, signals)
        elements = self._buffer.data(dtype)[: (num_rows + _SPARE_ROWS) * width]
        self.rows_TD = elements.view(num_rows + _SPARE_ROWS, width)
        """Gathered rows, with the spare rows behind them."""

    def first_row(self, out_TD: Tensor) -> int | None:
        """The row that `out_TD` starts at; None when it is not whole rows of this buffer."""
        offset = out_TD.data_ptr() - self.rows_TD.data_ptr()
        row, rest = divmod(offset, self.row_bytes)
        is_inside = rest == 0 and row >= 0 and row + out_TD.shape[0] <= self.num_rows
        is_alike = out_TD.dtype == self.dtype and out_TD.shape[1] == self.width
        return row if is_inside and is_alike and out_TD.is_contiguous() else None

    def addresses(self, first_row: int) -> tuple[int, ...]:
        """Where this rank's columns of a row are, on every rank."""
        shard_bytes = self.row_bytes // self.world_size
        offset = self._buffer.flag_bytes + first_row * self.row_bytes + self.rank * shard_bytes
        return tuple(address + offset for address in self._buffer.addresses)

    def exchange(self, x_TW: Tensor, first_row: int) -> None:
        """Copy engines send this rank's columns; only copies and signals on the current stream.

        Raises:
            CudaDriverError: the driver refuses.
        """
        places, pitch = self.addresses(first_row), x_TW.stride(0) * x_TW.element_size()
        width_bytes = self.row_bytes // self.world_size
        is_in_place = x_TW.data_ptr() == places[self.rank]
        self._signals.meet(FREE, first_row)
        for rank in (*self._signals.peers, *(() if is_in_place else (self.rank,))):
            copy_rows(
                places[rank], self.row_bytes, x_TW.data_ptr(), pitch, width_bytes, x_TW.shape[0]
            )
        self._signals.meet(SENT, first_row)

    def exchange_rows(self, first_row: int, num_rows: int) -> None:
        """Copy engines send this rank's `shard_of` some rows of this buffer to all peers, in place.

        Only copies and signals on the current stream. Whoever read the rows on this rank before
        must be ahead of it there, as for `exchange`.

        Raises:
            ValueError: rows outside of the buffer.
            CudaDriverError: the driver refuses.
        """
        if first_row < 0 or first_row + num_rows > self.num_rows:
            raise ValueError(
                f"the gather buffer holds {self.num_rows} rows, but got rows [{first_row}, "
                f"{first_row + num_rows}): ask `output_rows` for more"
            )
        start, end = shard_of(num_rows, self.rank, self.world_size)
        offset = self._buffer.flag_bytes + (first_row + start) * self.row_bytes
        places = [address + offset for address in self._buffer.addresses]
        self._signals.meet(FREE, first_row)
        for peer in self._signals.peers:
            if end > start:
                copy(places[peer], places[self.rank], (end - start) * self.row_bytes)
        self._signals.meet(SENT, first_row)


class GatherBuffers:
    """The gather buffers of a rank, shared by all lanes: one for each name, width and dtype."""

    def __init__(self, signals: Signals = "write") -> None:
        self._signals: Signals = signals
        self._buffers: list[GatherBuffer] = []
        self._names: list[str] = []

    def buffer(self, num_rows: int, width: int, dtype: torch.dtype, name: str = "") -> GatherBuffer:
        """A buffer for at least `num_rows`; collective when there is none yet.

        Former, smaller ones stay: captured graphs hold them.
        """
        for buffer, known in zip(self._buffers, self._names, strict=True):
            is_alike = (known, buffer.width, buffer.dtype) == (name, width, dtype)
            if is_alike and buffer.num_rows >= num_rows:
                return buffer
        self._buffers.append(GatherBuffer(max(num_rows, _MIN_ROWS), width, dtype, self._signals))
        self._names.append(name)
        return self._buffers[-1]

    def find(self, out_TD: Tensor, first_row: int) -> GatherBuffer:
        """The buffer whose rows from `first_row` on are `out_TD`.

        Raises:
            ValueError: it lies elsewhere.
        """
        places = [(buffer, buffer.first_row(out_TD)) for buffer in self._buffers]
        for buffer, row in places:
            if row == first_row:
                return buffer
        found = [f"row {row}" for _, row in places if row is not None]
        raise ValueError(
            f"`out_TD` must be whole rows from {first_row} on of what `output_rows` gives, since "
            f"the peers write it, but it starts at {found[0] if found else 'other memory'}; "
            f"bind the activation to `output_rows`, or use an `nccl` variant"
        )


def output_rows(
    group: Any,  # noqa: ANN401 - as `AllGather` takes it
    num_rows: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    name: str = "",
) -> Tensor:
    """Memory for `out_TD` that every all-gather variant of a lane's group can write.

    On CUDA with several ranks it is symmetric memory, and making it is collective. Other names give
    other memory.
    """
    if isinstance(group, Mapping) and KEY in group:
        buffers: GatherBuffers = group[KEY]
        return buffers.buffer(num_rows, width, dtype, name).rows_TD[:num_rows]
    return torch.empty(num_rows, width, dtype=dtype, device=device)


def check_shapes(x_TW: Tensor, out_TD: Tensor, world_size: int) -> None:
    """Refuse operands that are no shard and whole of one activation.

    Raises:
        ValueError: rows, widths or dtypes that do not match.
    """
    rows, width = x_TW.shape
    if tuple(out_TD.shape) != (rows, world_size * width) or x_TW.dtype != out_TD.dtype:
        raise ValueError(
            f"`out_TD` must hold the columns of all {world_size} ranks, "
            f"{rows} x {world_size * width} {x_TW.dtype}, but is "
            f"{' x '.join(map(str, out_TD.shape))} {out_TD.dtype}"
        )
    if x_TW.stride(1) != 1 and width > 1:
        raise ValueError(f"columns of `x_TW` must be next to each other, but got {x_TW.stride()}")
