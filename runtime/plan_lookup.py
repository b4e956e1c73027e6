"""Which bucket of a plan a step runs: by rows, by the part of them that decodes, by KV length.

    rows      the smallest dense batch that holds them; the rest of it is padding
    mix, KV   the nearest grid point of that size

The ranges of a schedule's nano-ops do not depend on how many of their rows decode, so a schedule
runs any mix of its size once its nano-batches are told how many (`with_decodes`). No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from math import log2

from .plan import Bucket, NanoBatch, Plan, Schedule

KV_WEIGHT = 0.25
"""Twice the KV length is as far away as a quarter of all rows changing from decode to prefill."""

LOST_GAIN = 0.35
"""Gain over the sequential plan that a winner loses for each unit of distance, at worst. From 120
random batches of llama3-8b on one H200, predicted: gains of 2 to 6 % at the point of the book."""


def bucket_sizes(plan: Plan) -> tuple[int, ...]:
    """Dense batches that the plan has, ascending."""
    return tuple(sorted({bucket.dense_batch_tokens for bucket in plan.buckets}))


def bucket_for(
    plan: Plan, decode_tokens: int, prefill_tokens: int, mean_context: float = 0.0
) -> Bucket:
    """The bucket for a step; its schedules have at least the step's rows.

    Args:
        plan: with at least one bucket.
        decode_tokens: decode rows of the step.
        prefill_tokens: prefill rows of the step.
        mean_context: mean KV length of the decode rows; at 0, or without any, it does not count.

    Raises:
        ValueError: no rows, or more than the largest dense batch holds.
    """
    tokens = decode_tokens + prefill_tokens
    if decode_tokens < 0 or prefill_tokens < 0 or tokens < 1:
        raise ValueError(
            "a step needs at least one row and no negative numbers of them, but got "
            f"decode_tokens={decode_tokens}, prefill_tokens={prefill_tokens}"
        )
    sizes = bucket_sizes(plan)
    size = next((size for size in sizes if size >= tokens), None)
    if size is None:
        raise ValueError(
            f"a step must fit the largest dense batch of the plan, {sizes[-1]} rows, but has "
            f"{tokens}; prefill in smaller chunks, or make the plan with a larger --buckets"
        )
    fraction = decode_tokens / tokens
    return nearest(
        (bucket for bucket in plan.buckets if bucket.dense_batch_tokens == size),
        fraction,
        mean_context,
    )


def nearest(buckets: Iterable[Bucket], decode_fraction: float, mean_context: float) -> Bucket:
    """The bucket nearest in mix and KV length; the first of equally near ones."""
    return min(buckets, key=lambda bucket: distance(bucket, decode_fraction, mean_context))


def distance(bucket: Bucket, decode_fraction: float, mean_context: float) -> float:
    """How far a bucket is from a mix and a KV length, in parts of all rows."""
    own = bucket.decode_tokens / bucket.dense_batch_tokens
    away = abs(own - decode_fraction)
    if mean_context > 0 and decode_fraction > 0 and bucket.decode_context_tokens > 0:
        octaves = abs(log2(mean_context / bucket.decode_context_tokens))
        away += KV_WEIGHT * max(own, decode_fraction) * octaves
    return away


def holds(bucket: Bucket, away: float) -> bool:
    """Whether its winner is still worth running at this distance, or the sequential plan is safer.

    What overlap hides is attention, and a batch with less of it has less to hide.
    """
    gain = bucket.sequential.best_known.period_us / bucket.winner.best_known.period_us - 1
    return gain >= LOST_GAIN * away


def is_interleaved(schedule: Schedule) -> bool:
    """Whether decodes follow prompt rows; otherwise they come first."""
    return any(
        batch.decode_tokens < batch.num_tokens and following.decode_tokens > 0
        for batch, following in pairwise(schedule.nano_batches)
    )


def with_decodes(schedule: Schedule, decode_tokens: int) -> Schedule:
    """The schedule with this many decode rows, in the row order that it has; the ranges stay.

    Raises:
        ValueError: a negative number, or more than the schedule has rows.
    """
    total = schedule.dense_batch_tokens
    if not 0 <= decode_tokens <= total:
        raise ValueError(
            f"`decode_tokens` must lie between 0 and the {total} rows of the schedule, but got "
            f"{decode_tokens}"
        )
    is_mixed = is_interleaved(schedule)

    def before(row: int) -> int:
        return round(decode_tokens * row / total) if is_mixed else min(row, decode_tokens)

    batches = tuple(
        NanoBatch(
            tokens=batch.tokens, decode_tokens=before(batch.tokens[1]) - before(batch.tokens[0])
        )
        for batch in schedule.nano_batches
    )
    return replace(schedule, nano_batches=batches)
