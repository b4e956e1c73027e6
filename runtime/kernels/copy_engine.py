"""All-reduce transport by copy engines: it takes no SMs.

`copy_engine` sends this rank's partial rows into an inbox on every peer and waits until the peers'
rows have arrived here. It does not sum: the norm that reads the rows does, from its own partial and
the inbox (`Received`), in rank order. `copy_engine_add` sums in place with a small kernel.

One exchange of rows is, on the lane's stream, with stream memory operations and peer copies only:

    tell each peer "my inbox is free"; wait for theirs; put those signals back to 0
    copy the rows to each peer
    tell each peer "sent"; wait for theirs; put those signals back to 0

Why this is right
- Visibility: a stream's write of a signal comes behind a system-wide fence for all that the stream
  did before (CUDA driver API, CUstreamWriteValue_flags), so whoever sees "sent" sees the rows; what
  reads them is ordered behind the wait by the stream or by an event. With `signals="copy"` a signal
  is a copy of four bytes, which starts when the copy of the rows has completed (NCCL's way).
- Reuse: the inbox has a place for each row of the dense batch, for both all-reduces of a layer. A
  rank says "free" only when its own stream reaches the exchange, hence, by the plan's local data
  dependencies (all-reduce <- GEMM <- ... <- the norm that read these rows before), after it has
  read the former rows. No double buffering, no reasoning across ranks, layers or replays.
- Signals are constants, 1 and 0, so that a CUDA graph can be replayed. They belong to the first row
  of the exchange: exchanges that can be under way at once have different rows. A peer raises "free"
  again only in its next exchange, which it enters after it has seen this rank's "sent", which comes
  after the reset of "free"; likewise for "sent" with the next "free".
- No deadlock: a stream waits without occupying an SM, and all ranks issue the same exchanges in the
  same order, each signal before its wait.

Every rank sends its whole rows to every peer: the least for two ranks. From four ranks on, copies
in two phases (reduce-scatter, all-gather) would send less, (N-1)/N twice instead of N - 1 times.
`Inbox.scatter` is the first of them: each peer gets the rows that it sums and normalises, and
`GatherBuffer.exchange_rows` sends normalised rows to all. Between two ranks that moves as much over
the links, but half of the norm's reads and writes and of the inbox's are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .registry import Received, register
from .row_signals import FREE, SENT, RowSignals, Signals, copy, shard_of, signal_bytes
from .symmetric import SymmetricBuffer
from .symmetric_all_reduce import add_received

VARIANT = "copy_engine"
_MIN_ROWS = 2048
_SPARE_ROWS = 16
"""Rows behind those asked for, which nothing may write: the audit looks at them."""


class Inbox:
    """Places for the peers' rows of one dense batch on this rank, and the way into theirs."""

    def __init__(
        self, num_rows: int, width: int, dtype: torch.dtype, signals: Signals = "write"
    ) -> None:
        """Allocate on all ranks; collective."""
        import torch.distributed as dist

        self.num_rows, self.width, self.dtype = num_rows, width, dtype
        self._slot_rows = num_rows + _SPARE_ROWS
        self._row_bytes = width * dtype.itemsize
        world_size = dist.get_world_size()
        num_bytes = world_size * self._slot_rows * self._row_bytes
        self._buffer = SymmetricBuffer(num_bytes, signal_bytes(num_rows, world_size))
        self.rank, self.world_size = self._buffer.rank, world_size
        self._signals = RowSignals(self._buffer, num_rows, signals)
        slots = self._buffer.data(dtype)[: world_size * self._slot_rows * width]
        self._slots_WTD = slots.view(world_size, self._slot_rows, width)

    def received(self, start: int, end: int) -> Received:
        """What the peers sent for rows [start, end)."""
        return Received(parts_WTD=self._slots_WTD[:, start:end], rank=self.rank)

    def named(self) -> dict[str, Tensor]:
        """Each peer's rows by name, with the spare rows behind them."""
        return {f"received_from_{peer}": self._slots_WTD[peer] for peer in self._signals.peers}

    def exchange(self, x_TD: Tensor, first_row: int) -> None:
        """Send rows and wait for the peers'; only copies and signals on the current stream.

        Raises:
            ValueError: rows that do not fit the inbox.
            CudaDriverError: the driver refuses.
        """
        every = (0, x_TD.shape[0])
        self._send(x_TD, first_row, dict.fromkeys(self._signals.peers, every))

    def scatter(self, x_TD: Tensor, first_row: int) -> None:
        """Send each peer its shard of the rows and wait for the peers' part of this rank's.

        What arrives are rows `first_row + start` to `first_row + end` of `received`, where
        (start, end) is this rank's `shard_of` the rows.

        Raises:
            ValueError: rows that do not fit the inbox.
            CudaDriverError: the driver refuses.
        """
        shards = {
            peer: shard_of(x_TD.shape[0], peer, self.world_size) for peer in self._signals.peers
        }
        self._send(x_TD, first_row, shards)

    def _send(self, x_TD: Tensor, first_row: int, parts: Mapping[int, tuple[int, int]]) -> None:
        """Send each peer a part of the rows, (start, end) within `x_TD`, between two meetings."""
        end = first_row + x_TD.shape[0]
        if x_TD.shape[1] != self.width or x_TD.dtype != self.dtype or end > self.num_rows:
            raise ValueError(
                f"the inbox holds {self.num_rows} rows of {self.width} {self.dtype}, but got rows "
                f"[{first_row}, {end}) of {x_TD.shape[1]} {x_TD.dtype}"
            )
        if not x_TD.is_contiguous():
            raise ValueError(f"`x_TD` must be contiguous, but has strides {x_TD.stride()}")
        self._signals.meet(FREE, first_row)
        for peer, (start, stop) in parts.items():
            place = self.rank * self._slot_rows + first_row + start
            target = self._buffer.addresses[peer] + self._buffer.flag_bytes
            source = x_TD.data_ptr() + start * self._row_bytes
            if stop > start:
                num_bytes = (stop - start) * self._row_bytes
                copy(target + place * self._row_bytes, source, num_bytes)
        self._signals.meet(SENT, first_row)


class CopyEngine:
    """The inboxes of a rank, one for each width and dtype, shared by all lanes."""

    def __init__(self, signals: Signals = "write") -> None:
        self._signals: Signals = signals
        self._inboxes: dict[tuple[int, torch.dtype], Inbox] = {}

    def inbox(self, num_rows: int, width: int, dtype: torch.dtype) -> Inbox:
        """An inbox for at least `num_rows`; collective when there is none yet.

        Whoever keeps launches keeps the inbox too: a later, larger one is another.
        """
        found = self._inboxes.get((width, dtype))
        if found is None or found.num_rows < num_rows:
            found = Inbox(max(num_rows, _MIN_ROWS), width, dtype, self._signals)
            self._inboxes[width, dtype] = found
        return found


def inbox_of(group: Mapping[str, Any], num_rows: int, width: int, dtype: torch.dtype) -> Inbox:
    """The inbox that a lane's group names, or the rank's own for that many rows."""
    transport: CopyEngine | Inbox = group[VARIANT]
    return transport if isinstance(transport, Inbox) else transport.inbox(num_rows, width, dtype)


@register("all_reduce", VARIANT, "cuda")
def copy_engine(
    x_TD: Tensor, group: Mapping[str, Any] | None, num_sms: int, first_row: int = 0
) -> None:
    """Exchange rows; x_TD keeps this rank's partial rows, the norm sums."""
    if group is not None:
        num_rows = first_row + x_TD.shape[0]
        inbox_of(group, num_rows, x_TD.shape[1], x_TD.dtype).exchange(x_TD, first_row)


@register("all_reduce", "copy_engine_add", "cuda")
def copy_engine_add(
    x_TD: Tensor, group: Mapping[str, Any] | None, num_sms: int, first_row: int = 0
) -> None:
    """Exchange rows, then sum them in place on the share."""
    if group is not None:
        num_rows = first_row + x_TD.shape[0]
        inbox = inbox_of(group, num_rows, x_TD.shape[1], x_TD.dtype)
        inbox.exchange(x_TD, first_row)
        add_received(x_TD, inbox.received(first_row, num_rows), num_sms)
