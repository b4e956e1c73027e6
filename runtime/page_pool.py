"""Which pages of the KV cache are free: bookkeeping alone, for the scheduler.

Page 0 is never handed out: rows of padding write their keys there and nothing reads it.
"""

from __future__ import annotations

from collections.abc import Iterable

from .kv_sizes import pages_for


class PagePool:
    """Hands out pages 1 to `num_pages`, each to one owner at a time."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Make all pages free.

        Raises:
            ValueError: no pages, or pages without tokens.
        """
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"a cache has at least one page of at least one token, but got "
                f"num_pages={num_pages}, page_size={page_size}: give it more memory"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages, 0, -1))
        self._is_free = bytearray(b"\x00" + b"\x01" * num_pages)

    @property
    def num_free(self) -> int:
        """Pages that can be handed out."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that have an owner."""
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one request."""
        return pages_for(num_tokens, self.page_size)

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages; the caller has looked at `num_free`."""
        assert count <= len(self._free), "the scheduler asks for pages that are free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Take pages back from their owner."""
        for page in pages:
            assert not self._is_free[page], f"page {page} has no owner"
            self._is_free[page] = 1
            self._free.append(page)
