"""Pages outside the device: preempted requests in host memory, finished ones there and on disk.

Runs `CacheOp`s in the order in which the scheduler decided on them; what they move belongs to this
rank alone. Copies are queued on the current stream, so they take turns with the steps that write
and read the pages; only a move to or from disk waits for its copy.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .kv_cache import PagedKvCache
from .step import CacheOp


@dataclass(slots=True)
class _Entry:
    pages_LZPGBH: Tensor | None
    """In host memory; None: on disk."""
    shape: torch.Size
    saved: torch.cuda.Event | None
    """The copy to host memory has ended."""


class KvStore:
    """Saved pages by key; files lie in a folder of their own, which `close` removes."""

    def __init__(self, cache: PagedKvCache, disk_folder: Path | None = None) -> None:
        """Start empty.

        Args:
            cache: pages come from here and go back here.
            disk_folder: where to make the folder of files; None takes the system's temporary one.
        """
        self._cache = cache
        self._is_cuda = cache.pool_LZPGBH.is_cuda
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
        self.host_bytes = self.disk_bytes = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _save(self, key: int, pages: tuple[int, ...]) -> None:
        assert key not in self._entries, "the scheduler names each save differently"
        gathered_LZPGBH = self._cache.pool_LZPGBH.index_select(2, self._indices(pages))
        event = None
        if self._is_cuda:
            host = torch.empty(gathered_LZPGBH.shape, dtype=gathered_LZPGBH.dtype, pin_memory=True)
            host.copy_(gathered_LZPGBH, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = gathered_LZPGBH
        self._entries[key] = _Entry(host, host.shape, event)
        self.host_bytes += host.nbytes
        self.moved_bytes += host.nbytes

    def _load(self, key: int, pages: tuple[int, ...]) -> None:
        entry = self._entries[key]
        host = entry.pages_LZPGBH if entry.pages_LZPGBH is not None else self._read(key, entry)
        if entry.saved is not None and len(pages) < entry.shape[2]:
            entry.saved.synchronize()  # the host gathers a part before it is copied
        part = host[:, :, : len(pages)].to(self._cache.pool_LZPGBH.device, non_blocking=True)
        self._cache.pool_LZPGBH.index_copy_(2, self._indices(pages), part)
        self.moved_bytes += part.nbytes

    def _demote(self, key: int) -> None:
        entry = self._entries[key]
        assert entry.pages_LZPGBH is not None, "it is in host memory"
        if entry.saved is not None:
            entry.saved.synchronize()
        _bytes_of(entry.pages_LZPGBH).tofile(self._file(key))
        self.host_bytes -= entry.pages_LZPGBH.nbytes
        self.disk_bytes += entry.pages_LZPGBH.nbytes
        entry.pages_LZPGBH = None

    def _read(self, key: int, entry: _Entry) -> Tensor:
        host = torch.empty(
            entry.shape, dtype=self._cache.pool_LZPGBH.dtype, pin_memory=self._is_cuda
        )
        _bytes_of(host)[:] = np.fromfile(self._file(key), dtype=np.uint8)
        return host

    def _drop(self, key: int) -> None:
        entry = self._entries.pop(key)
        num_bytes = entry.shape.numel() * self._cache.pool_LZPGBH.element_size()
        if entry.pages_LZPGBH is None:
            self._file(key).unlink()
            self.disk_bytes -= num_bytes
            return
        # The pinned allocator keeps the memory until copies that use it have ended.
        self.host_bytes -= num_bytes

    def _indices(self, pages: tuple[int, ...]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self._cache.pool_LZPGBH.device)

    def _file(self, key: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="nanoflow-kv-", dir=self._parent))
        return self._folder / f"{key}.pages"


def _bytes_of(pages: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return pages.view(-1).view(torch.uint8).numpy()
