"""Schedules for dense batches between the sizes of a plan: little of a step is padding. No torch.

sequential   one nano-batch with any number of rows
overlapped   all nano-batches somewhat smaller, in whole tiles
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from .plan import NanoBatch, Schedule

SMALLEST_ROWS = 16
TILE_ROWS = 128
"""Rows of the largest GEMM tiles."""
LEAST_ROWS = 2 * TILE_ROWS
"""Of each nano-op, where schedules lose rows: smaller ones run badly beside others."""


def step_sizes(largest: int, wanted: set[int]) -> tuple[int, ...]:
    """Dense-batch sizes: powers of two and halfway between, in steps of a tile, those wanted.

    A GEMM computes whole tiles of `TILE_ROWS` rows anyway, so coarser steps would be padding that
    costs, and finer ones would not save any.
    """
    sizes = set(wanted) | {largest}
    size = SMALLEST_ROWS
    while size < min(largest, 4 * TILE_ROWS):
        sizes.add(size)
        if size >= 4 * SMALLEST_ROWS and size * 3 // 2 < largest:
            sizes.add(size * 3 // 2)
        size *= 2
    sizes.update(range(4 * TILE_ROWS, largest, TILE_ROWS))
    return tuple(sorted(sizes))


def with_rows(schedule: Schedule, rows: int) -> Schedule:
    """A schedule of one nano-batch with another number of rows."""
    (nano_batch,) = schedule.nano_batches
    decodes = nano_batch.decode_tokens * rows // nano_batch.num_tokens
    return replace(
        schedule,
        nano_batches=(NanoBatch(tokens=(0, rows), decode_tokens=decodes),),
        nano_ops=tuple(replace(nano_op, tokens=(0, rows)) for nano_op in schedule.nano_ops),
    )


def with_fewer_rows(schedule: Schedule, rows: int) -> Schedule:
    """A schedule whose nano-batches all lose about the same part of their rows.

    Args:
        schedule: of several nano-batches.
        rows: those that stay. Boundaries between nano-ops go to whole tiles.

    Raises:
        ValueError: more rows than the schedule has, or too few for its nano-ops.
    """
    total = schedule.dense_batch_tokens
    ends = sorted({row for nano_op in schedule.nano_ops for row in nano_op.tokens})
    place = {end: round(end * rows / total / TILE_ROWS) * TILE_ROWS for end in ends[:-1]}
    place[total] = rows
    if rows > total or any(place[b] <= place[a] for a, b in pairwise(ends)):
        raise ValueError(
            f"a schedule of {total} rows with nano-ops that end at {ends[1:]} cannot have {rows}: "
            f"each must keep a tile of {TILE_ROWS}"
        )
    batches: list[NanoBatch] = []
    for batch in schedule.nano_batches:
        start, end = (place[row] for row in batch.tokens)
        decodes = batch.decode_tokens * (end - start) // batch.num_tokens
        batches.append(NanoBatch(tokens=(start, end), decode_tokens=decodes))
    nano_ops = tuple(
        replace(nano_op, tokens=(place[nano_op.tokens[0]], place[nano_op.tokens[1]]))
        for nano_op in schedule.nano_ops
    )
    return replace(schedule, nano_batches=tuple(batches), nano_ops=nano_ops)


def pace(schedule: Schedule, shorter: Schedule) -> float:
    """Part of its time that a schedule takes with fewer rows.

    What lost least sets the pace where lanes wait for each other, all rows do where power is the
    limit: half way between is taken.
    """
    pairs = zip(schedule.nano_ops, shorter.nano_ops, strict=True)
    slowest = max(few.num_tokens / many.num_tokens for many, few in pairs)
    return (slowest + shorter.dense_batch_tokens / schedule.dense_batch_tokens) / 2


def sizes_below(schedule: Schedule, smallest: int) -> Iterator[int]:
    """Rows, descending in whole tiles, with which an overlapped schedule may be worth running.

    Three quarters of its own at least: what does not fall with the rows weighs more and more.

    Args:
        schedule: whose own rows are not among them.
        smallest: rows that they are more than.
    """
    total = schedule.dense_batch_tokens
    least = min(nano_op.num_tokens for nano_op in schedule.nano_ops)
    enough = max(-(-LEAST_ROWS * total // least), -(-3 * total // 4))
    whole = (total - 1) // TILE_ROWS * TILE_ROWS
    yield from range(whole, max(smallest, enough - 1), -TILE_ROWS)
