"""How many pages the running requests will need at their peak, from the decode lengths seen.

A request grows by one token a step until it ends, then all of its pages come back. So the demand
rises in a straight line between ends and peaks just before one of them; `peak_pages` looks at
these instants. Ends are not known: a request is taken to generate the average of the lengths seen,
one that outlives the average to double, and none more than it may.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

_FEW_TILES = 4
"""Below so many tiles of decodes the part of a tile is not weighed: each request counts more."""


class DecodeLengths:
    """The average of the generated lengths seen; recent ones weigh more."""

    def __init__(self, expected: float = 256.0, window: int = 512) -> None:
        """Start from an expectation that counts as one request.

        Args:
            expected: what requests are taken to generate before any has ended.
            window: an end moves the average by at least 1 / window of its distance.
        """
        self.mean = expected
        self._seen = 1
        self._window = window

    def add(self, length: int) -> None:
        """Count a request that has ended by itself."""
        self._seen = min(self._seen + 1, self._window)
        self.mean += (length - self.mean) / self._seen

    def remaining(self, num_generated: int, max_tokens: int) -> float:
        """Tokens that a request is expected to generate yet, at least 0."""
        total = max(1.0, self.mean)
        while total <= num_generated:
            total *= 2
        return max(0.0, min(float(max_tokens), total) - num_generated)


Growth = tuple[float, int]
"""Tokens that a request is expected to add, negated to sort the longest first; those it holds."""


def peak_pages(growths: Sequence[Growth], page_size: int) -> float:
    """Most pages in use at once while the given requests run to their expected ends.

    Args:
        growths: one for each request, sorted; a prefill holds its whole prompt.
        page_size: tokens of a page; half a page of each request is room not filled.
    """
    held = accumulate(tokens for _, tokens in growths)
    padding = (page_size - 1) / 2
    peak = max(
        (
            tokens + count * (padding - negated)
            for count, (tokens, (negated, _)) in enumerate(zip(held, growths, strict=True), 1)
        ),
        default=0.0,
    )
    return peak / page_size


def steady_rows(
    mean_prompt: float, mean_answer: float, room_pages: float, page_size: int
) -> tuple[float, float]:
    """Decode and prompt rows of each step while a full cache takes in what ends make room for.

    Requests are of all ages then, so one holds its prompt and half of its answer on average.
    """
    answer = max(1.0, mean_answer)
    decodes = room_pages * page_size / (mean_prompt + answer / 2 + page_size / 2)
    return decodes, decodes * mean_prompt / answer


def fits_peak(
    growths: Sequence[Growth],
    newcomer: Growth,
    *,
    num_waiting: int,
    room_pages: float,
    page_size: int,
    tile_rows: int,
) -> bool:
    """Whether the expected peak fits with a newcomer; alone it always does.

    Decodes beyond a whole GEMM tile of them cost as much as the next tile full, so the first of a
    tile comes in when those that wait, or as many of them as fill it, fit too.

    Args:
        growths: of the running requests and the newcomer, sorted.
        newcomer: stands for those behind it, too.
        num_waiting: requests that wait, the newcomer among them.
        room_pages: what the peak may take.
        page_size: tokens of a page.
        tile_rows: of a GEMM tile.
    """
    running = len(growths) - 1
    if running == 0:
        return True
    if peak_pages(growths, page_size) > room_pages:
        return False
    if running < _FEW_TILES * tile_rows or running % tile_rows:
        return True
    following = [newcomer] * (min(tile_rows, num_waiting) - 1)
    return peak_pages(sorted([*growths, *following]), page_size) <= room_pages
