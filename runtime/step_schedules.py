"""Schedules for dense batches between the sizes of a plan: little of a step is padding. No torch.

sequential   one nano-batch with any number of rows
overlapped   the last rows left out, whole tiles of them
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .plan import NanoBatch, Schedule

SMALLEST_ROWS = 16
TILE_ROWS = 128
"""Rows of the largest GEMM tiles."""
LEAST_LAST_ROWS = 2 * TILE_ROWS
"""Of the last nano-ops, when rows are left out: smaller ones run badly beside others."""


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
    """A schedule without its last rows.

    Args:
        schedule: of several nano-batches.
        rows: those that stay; every nano-op must keep some.

    Raises:
        ValueError: more rows than the schedule has, or none of a nano-op.
    """
    last = schedule.nano_batches[-1]
    start = max(nano_op.tokens[0] for nano_op in schedule.nano_ops)
    if not start < rows <= last.tokens[1]:
        raise ValueError(
            f"the rows that stay must be more than {start} and at most {last.tokens[1]}, so that "
            f"every nano-op keeps some, but got {rows}"
        )
    kept = last.decode_tokens * (rows - last.tokens[0]) // last.num_tokens
    shorter = NanoBatch(tokens=(last.tokens[0], rows), decode_tokens=kept)
    return replace(
        schedule,
        nano_batches=(*schedule.nano_batches[:-1], shorter),
        nano_ops=tuple(
            replace(nano_op, tokens=(nano_op.tokens[0], min(rows, nano_op.tokens[1])))
            for nano_op in schedule.nano_ops
        ),
    )


def sizes_below(schedule: Schedule, smallest: int) -> Iterator[int]:
    """Rows, descending in whole tiles, with which an overlapped schedule is still worth running.

    Args:
        schedule: whose own rows are not among them.
        smallest: rows that they are more than.
    """
    start = max(nano_op.tokens[0] for nano_op in schedule.nano_ops)
    whole = (schedule.dense_batch_tokens - 1) // TILE_ROWS * TILE_ROWS
    yield from range(whole, max(smallest, start + LEAST_LAST_ROWS - 1), -TILE_ROWS)
