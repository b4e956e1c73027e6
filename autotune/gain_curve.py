"""How far a point's overlapped schedule reaches: its gain at other loads of attention.

    bucket -> the same rows and mix at KV lengths around its own -> sequential / overlapped - 1

Shares of the SMs suit one ratio of attention to GEMMs. A schedule that gains there gains less where
attention reads more keys or fewer, and loses beyond; the engine looks the load of a step up in this
curve (`runtime/plan_lookup.py`). Everything is predicted by the simulator.
"""

from __future__ import annotations

from dataclasses import replace

from ..runtime.plan import Bucket, GainCurve
from .book_grid import bucket_rows
from .point_search import PointSearch

OCTAVES = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""KV lengths that are looked at, over the bucket's own: a grid point is hardly further away."""


def gain_curve(bucket: Bucket, search: PointSearch) -> GainCurve | None:
    """The gain of a bucket's best overlapped schedule around its own load.

    Args:
        bucket: of a plan book.
        search: whose costs the book is priced with.

    Returns:
        None without decode rows, which is without a load.
    """
    if not bucket.decode_tokens or bucket.decode_context_tokens <= 0:
        return None
    loads = tuple(2.0**octave for octave in OCTAVES)
    return GainCurve(
        keys_per_row=tuple(round(load * bucket.keys_per_row, 1) for load in loads),
        gains=tuple(round(_gain(bucket, search, load), 4) for load in loads),
    )


def _gain(bucket: Bucket, search: PointSearch, load: float) -> float:
    rows = bucket_rows(bucket)
    rows = replace(
        rows,
        decode_context_tokens=max(1.0, load * rows.decode_context_tokens),
        prefill_context_tokens=max(1.0, load * rows.prefill_context_tokens),
    )
    one, other = bucket.sequential.schedule, bucket.best_overlapped.schedule
    times = [search.predicted(schedule, rows).predicted.period_us for schedule in (one, other)]
    return times[0] / times[1] - 1
