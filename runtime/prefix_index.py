"""Which finished requests' pages are kept in host memory and on disk, and for which prompts.

Pages are found by the tokens from the start of the request to their end, through a chain of
hashes; of two requests that share a chain up to some page, the later one is found. The least
recently used entry goes from host memory to disk, and from disk it is dropped. Bookkeeping alone:
it answers with `CacheOp`s, which every rank runs in the same order on its own part of the pages
(`kv_store`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from .step import CacheOp


@dataclass(slots=True)
class _Entry:
    digests: tuple[bytes, ...]
    """Of each page: everything from the start to its end."""
    is_on_disk: bool = False


def page_digests(token_ids: Sequence[int], page_size: int) -> tuple[bytes, ...]:
    """Hash of the tokens up to the end of each whole page."""
    digests: list[bytes] = []
    chain = hashlib.blake2b(digest_size=16)
    for end in range(page_size, len(token_ids) + 1, page_size):
        chain.update(array("q", token_ids[end - page_size : end]).tobytes())
        digests.append(chain.digest())
    return tuple(digests)


class PrefixIndex:
    """Entries by recency in two tiers, each bounded in pages."""

    def __init__(self, host_pages: int, disk_pages: int, page_size: int) -> None:
        """Start empty; without host pages nothing is ever kept."""
        self.host_limit, self.disk_limit, self.page_size = host_pages, disk_pages, page_size
        self.host_used = self.disk_used = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        """Least recently used first."""
        self._by_digest: dict[bytes, tuple[int, int]] = {}
        """Entry and pages up to there."""
        self._next_key = 0

    def match(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The entry that covers most of a prompt, and its pages that do; (-1, 0) for none.

        At least the last token of the prompt is left out: it must be computed to go on from.
        """
        if not self._entries:
            return -1, 0
        best = (-1, 0)
        for digest in page_digests(prompt[: len(prompt) - 1], self.page_size):
            found = self._by_digest.get(digest)
            if found is None:
                break
            best = found
        return best

    def load(self, key: int, pages: tuple[int, ...]) -> list[CacheOp]:
        """Bring the first pages of an entry to the device; it becomes the most recent."""
        self._entries.move_to_end(key)
        return [CacheOp(kind="load", key=key, pages=pages)]

    def save(self, token_ids: Sequence[int], pages: Sequence[int]) -> list[CacheOp]:
        """Keep the whole pages of a finished request.

        Args:
            token_ids: tokens whose keys are in the cache.
            pages: of the request on the device; they may be given back after.
        """
        digests = page_digests(token_ids, self.page_size)
        if not digests or len(digests) > self.host_limit:
            return []
        known = self._by_digest.get(digests[-1])
        if known is not None:
            self._entries.move_to_end(known[0])
            return []
        ops = self._shortened(digests)
        ops += self._make_room(len(digests))
        key, self._next_key = self._next_key, self._next_key + 1
        self._entries[key] = _Entry(digests)
        self.host_used += len(digests)
        for count, digest in enumerate(digests, 1):
            self._by_digest[digest] = (key, count)
        ops.append(CacheOp(kind="save", key=key, pages=tuple(pages[: len(digests)])))
        return ops

    def _shortened(self, digests: tuple[bytes, ...]) -> list[CacheOp]:
        """Drop the entry that the new one continues: an earlier round of one conversation."""
        for digest in reversed(digests):
            found = self._by_digest.get(digest)
            if found is not None:
                key, count = found
                return self._drop(key) if len(self._entries[key].digests) == count else []
        return []

    def _make_room(self, count: int) -> list[CacheOp]:
        ops: list[CacheOp] = []
        while self.host_used + count > self.host_limit:
            key = next(key for key, entry in self._entries.items() if not entry.is_on_disk)
            ops += self._demote(key)
        return ops

    def _demote(self, key: int) -> list[CacheOp]:
        entry = self._entries[key]
        num_pages = len(entry.digests)
        if num_pages > self.disk_limit:
            return self._drop(key)
        ops: list[CacheOp] = []
        while self.disk_used + num_pages > self.disk_limit:
            ops += self._drop(next(key for key, e in self._entries.items() if e.is_on_disk))
        entry.is_on_disk = True
        self.host_used -= num_pages
        self.disk_used += num_pages
        return [*ops, CacheOp(kind="demote", key=key)]

    def _drop(self, key: int) -> list[CacheOp]:
        entry = self._entries.pop(key)
        if entry.is_on_disk:
            self.disk_used -= len(entry.digests)
        else:
            self.host_used -= len(entry.digests)
        for digest in entry.digests:
            if self._by_digest.get(digest, (-1, 0))[0] == key:
                del self._by_digest[digest]
        return [CacheOp(kind="drop", key=key)]
