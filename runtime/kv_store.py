"""Pages outside the device: preempted requests in host memory, finished ones there and on disk.

Runs `CacheOp`s in the order in which the scheduler decided on them; what they move belongs to this
rank alone. On a GPU pages are gathered behind the step that wrote them, by a short kernel, and
cross the bus on a stream of their own while the next steps run; pages that come back arrive while
the step before still runs. Only a move to or from disk waits for its copy. Host memory for
`host_pages` is pinned once, at the start: pinning takes longer than a step.

Shape legend: P pages, X layers x (keys, values), Y words of a page in one of these.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .kv_cache import PagedKvCache
from .step import CacheOp

_WORDS: tuple[tuple[int, torch.dtype], ...] = (
    (16, torch.complex128),
    (8, torch.int64),
    (4, torch.int32),
    (2, torch.int16),
)
"""Bytes and types that pages are moved in: the wider, the fewer elements a copy has."""
_BLOCK_BYTES = 1 << 30
"""The pinned allocator rounds up to powers of two: blocks of this size are not rounded far."""


@dataclass(slots=True)
class _Entry:
    pages: tuple[Tensor, ...]
    """In host memory, consecutive pages each, [P, X, Y]; empty: on disk."""
    slots: tuple[int, ...]
    """Places of the pinned memory that they take; empty: they have memory of their own."""
    num_pages: int
    saved: torch.cuda.Event | None
    """The copy to host memory has ended."""


class KvStore:
    """Saved pages by key; files lie in a folder of their own, which `close` removes."""

    def __init__(
        self, cache: PagedKvCache, disk_folder: Path | None = None, host_pages: int = 0
    ) -> None:
        """Start empty.

        Args:
            cache: pages come from here and go back here.
            disk_folder: where to make the folder of files; None takes the system's temporary one.
            host_pages: that host memory is pinned for; more are pinned when they come.
        """
        pool_LZPGBH = cache.pool_LZPGBH
        row_bytes = pool_LZPGBH.shape[-1] * pool_LZPGBH.element_size()
        word = next(dtype for size, dtype in _WORDS if row_bytes % size == 0)
        self._pool_PXY = pool_LZPGBH.view(word).flatten(3).flatten(0, 1).transpose(0, 1)
        self._page_bytes = self._pool_PXY[0].nbytes
        self._device, self._is_cuda = pool_LZPGBH.device, pool_LZPGBH.is_cuda
        self._copies = torch.cuda.Stream(self._device) if self._is_cuda else None
        self._blocks = list(self._new_blocks(host_pages))
        self._places = [
            (block, row) for block, pages in enumerate(self._blocks) for row in range(len(pages))
        ]
        self._free = list(range(len(self._places)))
        self._entries: dict[int, _Entry] = {}
        self._parent, self._folder = disk_folder, None
        self.host_bytes = self.disk_bytes = 0
        self.moved_bytes = 0
        """To and from the device, since the start."""

    def run(self, ops: Iterable[CacheOp]) -> None:
        """Carry out cache operations in order."""
        for op in ops:
            match op.kind:
                case "save":
                    self._save(op.key, op.pages)
                case "load":
                    self._load(op.key, op.pages)
                case "demote":
                    self._demote(op.key)
                case "drop":
                    self._drop(op.key)

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._entries.clear()
        self._free = list(range(len(self._places)))
        self.host_bytes = self.disk_bytes = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _save(self, key: int, pages: tuple[int, ...]) -> None:
        assert key not in self._entries, "the scheduler names each save differently"
        gathered_PXY = self._pool_PXY.index_select(0, self._indices(pages))
        slots = self._take(len(pages))
        host = self._runs(slots) if slots else (self._new_host(len(pages)),)
        saved = None
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            for part_PXY, whole_PXY in _pairs(host, gathered_PXY):
                part_PXY.copy_(whole_PXY, non_blocking=True)
            if self._copies is not None:
                saved = torch.cuda.Event()
                saved.record(self._copies)
                gathered_PXY.record_stream(self._copies)
        self._entries[key] = _Entry(host, slots, len(pages), saved)
        self.host_bytes += gathered_PXY.nbytes
        self.moved_bytes += gathered_PXY.nbytes

    def _load(self, key: int, pages: tuple[int, ...]) -> None:
        entry = self._entries[key]
        host = entry.pages or (self._read(key, entry),)
        # In order with the copy that saved them; the step before may still run meanwhile.
        with torch.cuda.stream(self._copies):
            shape = (len(pages), *self._pool_PXY.shape[1:])
            arrived_PXY = torch.empty(shape, dtype=self._pool_PXY.dtype, device=self._device)
            for part_PXY, whole_PXY in _pairs(host, arrived_PXY):
                whole_PXY.copy_(part_PXY, non_blocking=True)
        if self._copies is not None:
            main = torch.cuda.current_stream(self._device)
            main.wait_stream(self._copies)
            arrived_PXY.record_stream(main)
        self._pool_PXY.index_copy_(0, self._indices(pages), arrived_PXY)
        self.moved_bytes += arrived_PXY.nbytes

    def _demote(self, key: int) -> None:
        entry = self._entries[key]
        assert entry.pages, "it is in host memory"
        if entry.saved is not None:
            entry.saved.synchronize()
        with self._file(key).open("wb") as file:
            for part_PXY in entry.pages:
                file.write(_bytes_of(part_PXY).data)
        self.host_bytes -= entry.num_pages * self._page_bytes
        self.disk_bytes += entry.num_pages * self._page_bytes
        self._free += entry.slots
        entry.pages, entry.slots = (), ()

    def _read(self, key: int, entry: _Entry) -> Tensor:
        host_PXY = self._new_host(entry.num_pages)
        _bytes_of(host_PXY)[:] = np.fromfile(self._file(key), dtype=np.uint8)
        return host_PXY

    def _drop(self, key: int) -> None:
        entry = self._entries.pop(key)
        num_bytes = entry.num_pages * self._page_bytes
        if not entry.pages:
            self._file(key).unlink()
            self.disk_bytes -= num_bytes
            return
        # Copies take turns, so a place is free for the next save at once; the pinned allocator
        # keeps other memory until copies that use it have ended.
        self._free += entry.slots
        self.host_bytes -= num_bytes

    def _take(self, count: int) -> tuple[int, ...]:
        """Places of pinned memory; none when there are too few."""
        if count > len(self._free):
            return ()
        taken = sorted(self._free[len(self._free) - count :])
        del self._free[len(self._free) - count :]
        return tuple(taken)

    def _runs(self, slots: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The memory of places, neighbours together."""
        runs: list[Tensor] = []
        start = 0
        for end in range(1, len(slots) + 1):
            block, row = self._places[slots[end - 1]]
            if end == len(slots) or self._places[slots[end]] != (block, row + 1):
                runs.append(self._blocks[block][row + 1 - (end - start) : row + 1])
                start = end
        return tuple(runs)

    def _new_blocks(self, num_pages: int) -> Iterator[Tensor]:
        a_block = max(1, _BLOCK_BYTES // self._page_bytes)
        for first in range(0, num_pages, a_block):
            yield self._new_host(min(a_block, num_pages - first))

    def _new_host(self, num_pages: int) -> Tensor:
        shape = (num_pages, *self._pool_PXY.shape[1:])
        return torch.empty(shape, dtype=self._pool_PXY.dtype, pin_memory=self._is_cuda)

    def _indices(self, pages: tuple[int, ...]) -> Tensor:
        indices_P = torch.tensor(pages, dtype=torch.int64)
        if not self._is_cuda:
            return indices_P
        return indices_P.pin_memory().to(self._device, non_blocking=True)

    def _file(self, key: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="nanoflow-kv-", dir=self._parent))
        return self._folder / f"{key}.pages"


def _pairs(parts: Iterable[Tensor], whole_PXY: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts side by side with what they are of the whole, as far as it goes."""
    first = 0
    for part_PXY in parts:
        count = min(len(part_PXY), len(whole_PXY) - first)
        if count <= 0:
            return
        yield part_PXY[:count], whole_PXY[first : first + count]
        first += count


def _bytes_of(pages_PXY: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return pages_PXY.view(-1).view(torch.uint8).numpy()
