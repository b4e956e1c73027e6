"""From how many rows on overlap pays, by the winners of a book.

The question is asked of each mix and KV length, for one model, GPU and tensor-parallel degree.
Only a crossing that holds up to the largest size counts. Between the two grid points around it
the size is found by bisection, to the granularity of nano-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..runtime.plan import BreakEven, Bucket

MOST_LISTED = 3
"""More sizes than this are counted, not named."""


def find_break_even(series: Sequence[Bucket], step: int, pays: Callable[[int], bool]) -> BreakEven:
    """The break-even of buckets that differ in their size alone.

    Args:
        series: at least one bucket, of one mix and KV length, in any order.
        step: sizes between the buckets are multiples of this.
        pays: whether an overlapped schedule wins at a size, asked between two buckets only.
    """
    ordered = sorted(series, key=lambda bucket: bucket.dense_batch_tokens)
    sizes = [bucket.dense_batch_tokens for bucket in ordered]
    wins = [bucket.winner.schedule.is_overlapped for bucket in ordered]
    first = len(wins)
    while first and wins[first - 1]:
        first -= 1
    tokens = None
    if first < len(sizes):
        tokens = sizes[first]
        if first:
            tokens = _first_true(sizes[first - 1], sizes[first], step, pays)
    return BreakEven(
        mix=ordered[0].mix,
        decode_context_tokens=ordered[0].decode_context_tokens,
        smallest_tokens=sizes[0],
        largest_tokens=sizes[-1],
        tokens=tokens,
        wins_at=tuple(size for size, win in zip(sizes, wins, strict=True) if win),
    )


def _first_true(low: int, high: int, step: int, pays: Callable[[int], bool]) -> int:
    """Smallest multiple of `step` above `low` that pays, where `low` does not and `high` does."""
    below, above = low // step, -(-high // step)
    while above - below > 1:
        middle = (below + above) // 2
        if pays(middle * step):
            above = middle
        else:
            below = middle
    return min(high, above * step)


def sentence(found: BreakEven) -> str:
    """In words, without saying how it is known."""
    where = f"{found.mix.replace('_', ' ')} batches at {found.decode_context_tokens:.0f} keys"
    if found.tokens is None and found.wins_at:
        sizes = f"at {', '.join(map(str, found.wins_at))} tokens"
        if len(found.wins_at) > MOST_LISTED:
            first, last = found.wins_at[0], found.wins_at[-1]
            sizes = f"at {len(found.wins_at)} of the sizes from {first} to {last} tokens"
        return (
            f"overlap pays for {where} {sizes}, but not at the largest size looked at, "
            f"{found.largest_tokens}"
        )
    if found.tokens is None:
        return (
            f"overlap never pays on this card for {where}, from {found.smallest_tokens} to "
            f"{found.largest_tokens} tokens"
        )
    if found.tokens == found.smallest_tokens:
        return (
            f"overlap pays for {where} at every size looked at, {found.smallest_tokens} to "
            f"{found.largest_tokens} tokens"
        )
    if found.tokens == found.largest_tokens:
        return f"overlap pays for {where} at {found.tokens} tokens, the largest size looked at"
    return (
        f"overlap pays for {where} from {found.tokens} tokens up (looked at up to "
        f"{found.largest_tokens})"
    )
