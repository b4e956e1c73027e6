"""Which bucket of a plan a step runs: by rows, by the part of them that decodes, by KV length.

    bucket_for             the smallest dense batch that holds the rows, its nearest grid point
    gain_over_sequential   what a grid point's overlapped schedule gains in any mix and KV length

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
PREDICTED_MARGIN = 0.02
"""A schedule must be predicted faster than the sequential one by more than this part to be run: the
error of predictions against the measured iterations in results/."""
MEASURED_MARGIN = 0.005
"""The same for measured ones: medians of one interleaved run repeat to about this part."""
MIX_LOSS = 0.06
"""Gain that a schedule loses as its part of decode rows goes from all to none while attention reads
as much. Predicted, llama3-8b on one H200: 2.2 points from one half to one eighth."""
LOST_GAIN = 0.35
"""Gain that is lost for each unit of distance, at worst, where a plan has no curve. From 120 random
batches of llama3-8b on one H200, predicted: gains of 2 to 6 % at the point of the book."""
MAX_DISTANCE = 0.25
"""Beyond it nothing is known without a curve."""


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


def gain_over_sequential(
    bucket: Bucket, decode_fraction: float, mean_context: float
) -> float | None:
    """What its overlapped schedule gains over the sequential plan, in a batch of as many rows.

    What overlap hides is attention, and shares of the SMs suit one load of it: so the gain goes by
    the keys that attention reads, whatever decode rows and KV lengths they are of, and little by
    the mix. Where the plan has no curve, it falls with the distance.

    Args:
        bucket: of the plan.
        decode_fraction: decode rows / rows of the bucket's dense batch.
        mean_context: mean KV length of the decode rows.

    Returns:
        Sequential time / overlapped time - 1, as far as it can be relied upon; None: nobody knows.
    """
    best, sequential = bucket.best_overlapped, bucket.sequential
    own = sequential.best_known.period_us / best.best_known.period_us - 1
    curve = bucket.overlap_gain
    if curve is None:
        if not bucket.winner.schedule.is_overlapped:
            return None
        away = distance(bucket, decode_fraction, mean_context)
        return own - LOST_GAIN * away if away <= MAX_DISTANCE else None
    found, known = curve.at(decode_fraction * mean_context), curve.at(bucket.keys_per_row)
    if found is None:
        return None
    measured = own - known if known is not None else 0.0
    own_fraction = bucket.decode_tokens / bucket.dense_batch_tokens
    return found + measured - MIX_LOSS * abs(decode_fraction - own_fraction)


def margin_of(bucket: Bucket) -> float:
    """Gain from which its overlapped schedule is run; without a curve its losses are the margin."""
    if bucket.overlap_gain is None:
        return 0.0
    return PREDICTED_MARGIN if bucket.best_overlapped.measured is None else MEASURED_MARGIN


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
