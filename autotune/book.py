"""The plan book: a quickly searched plan for every grid point beside the workload's own bucket.

    main bucket (searched in depth) -> its own series over the batch size -> other mixes
      -> other KV lengths -> break-even of each series -> regret between the points

Each point starts from the schedules of its nearest finished neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log2

from ..profiler.progress import Advance, nothing
from ..runtime.op_graph import RowMix
from ..runtime.plan import BreakEven, Bucket, Candidate, MixKind, Plan, Schedule
from .book_grid import BookGrid, GridPoint, Traffic, bucket_rows, grid_points, key_of
from .book_store import BookStore
from .bounds import lower_bound_us, power_limit_of, what_binds
from .break_even import find_break_even
from .gain_curve import gain_curve
from .point_search import PointResult, PointSearch
from .regret import Regret, find_regret
from .resize import row_order_of, shortened

NEIGHBOURS = 2
"""Finished points whose overlapped schedules a point starts from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """The main bucket and all others, with what they say together."""

    buckets: tuple[Bucket, ...]
    """The main one first."""
    break_even: tuple[BreakEven, ...]
    """The main series first."""
    regret: Regret | None
    """None where there is nothing between the points."""
    left_out: tuple[GridPoint, ...]
    """Points whose KV cache does not fit into the memory."""


def build_book(
    plan: Plan,
    search: PointSearch,
    traffic: Traffic,
    grid: BookGrid,
    *,
    seed: int,
    store: BookStore | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
    advance: Advance = nothing,
) -> Book:
    """Search every point of the grid, and what follows from them.

    Args:
        plan: its one bucket is the workload's own, finished.
        search: graph, costs and space of the points.
        traffic: workload and memory.
        grid: what to cover.
        seed: of the batches at which the regret is looked at.
        store: keeps finished points of a run that is killed.
        on_progress: told what happens, in words.
        advance: told how many points are finished.
    """
    (main,) = plan.buckets
    points, left_out = grid_points(grid, traffic, main.dense_batch_tokens)
    finished = {key_of(bucket_rows(bucket)): bucket for bucket in store.points} if store else {}
    taken = [point for point in points if point.key in finished]
    if taken:
        on_progress(f"{len(taken)} points are taken over from an interrupted run")
    buckets = [_with_curve(main, search)]
    for point in points:
        bucket = finished.get(point.key)
        if bucket is None:
            bucket = _bucket(point, search, solved(search, point.rows, buckets))
            if store:
                store.add(bucket)
        buckets.append(bucket)
        advance(len(buckets) - 1, len(points))
    on_progress(f"{len(buckets)} grid points, {len(left_out)} more do not fit into the memory")
    plan = replace(plan, buckets=tuple(buckets))
    regret = find_regret(plan, search, traffic, grid, seed=seed)
    return Book(
        buckets=plan.buckets,
        break_even=_break_even(buckets, search, traffic),
        regret=regret,
        left_out=tuple(left_out),
    )


def solved(search: PointSearch, rows: RowMix, buckets: Sequence[Bucket]) -> PointResult:
    """A point's search, started from the nearest of these buckets."""
    tokens, decodes, _ = key_of(rows)
    alike = [b for b in buckets if (b.dense_batch_tokens, b.decode_tokens) == (tokens, decodes)]
    kept = [c.schedule for b in alike for c in (b.sequential, b.best_overlapped)]
    near = sorted(buckets, key=lambda bucket: _distance(bucket, rows))[:NEIGHBOURS]
    seeds = [bucket.best_overlapped.schedule for bucket in (*near, buckets[0])]
    return search.solve(rows, _distinct(seeds), _distinct(kept))


def make_bucket(
    rows: RowMix, search: PointSearch, result: PointResult, mix: MixKind = "steady"
) -> Bucket:
    """A bucket of a point's search, with its bounds."""
    graph, costs = search.graph, search.cost_model
    lower = lower_bound_us(graph, rows, costs.hardware, costs.dtype)
    clock_mhz = result.winner.best_known.sm_clock_mhz
    power_us = power_limit_of(graph, rows, costs, clock_mhz)
    return Bucket(
        dense_batch_tokens=round(rows.tokens),
        decode_tokens=round(rows.decode_tokens),
        decode_context_tokens=rows.decode_context_tokens,
        prefill_context_tokens=rows.prefill_context_tokens,
        row_order=row_order_of(result.winner.schedule),
        winner=_short(result.winner),
        sequential=_short(result.sequential),
        best_overlapped=_short(result.best_overlapped),
        lower_bound_us=round(lower[0], 1),
        power_limit_us=round(power_us, 1),
        bound=what_binds(lower, power_us),
        mix=mix,
    )


def _bucket(point: GridPoint, search: PointSearch, result: PointResult) -> Bucket:
    return _with_curve(make_bucket(point.rows, search, result, point.mix), search)


def _with_curve(bucket: Bucket, search: PointSearch) -> Bucket:
    return replace(bucket, overlap_gain=gain_curve(bucket, search))


def _short(candidate: Candidate) -> Candidate:
    """Without the spread, which a prediction does not have."""
    timing = replace(candidate.predicted, p10_us=0.0, p90_us=0.0)
    return replace(candidate, predicted=shortened(timing))


def _distance(bucket: Bucket, rows: RowMix) -> float:
    """How far a finished point is: octaves of size, of KV length, and the part that decodes."""
    part = rows.decode_tokens / rows.tokens - bucket.decode_tokens / bucket.dense_batch_tokens
    size = log2(rows.tokens / bucket.dense_batch_tokens)
    context = 0.0
    if rows.decode_context_tokens > 0 and bucket.decode_context_tokens > 0:
        context = log2(rows.decode_context_tokens / bucket.decode_context_tokens)
    return abs(size) + abs(context) + 2 * abs(part)


def _distinct(schedules: Sequence[Schedule]) -> list[Schedule]:
    return list(dict.fromkeys(schedules))


def _break_even(
    buckets: Sequence[Bucket], search: PointSearch, traffic: Traffic
) -> tuple[BreakEven, ...]:
    """Of each mix and KV length, in the order of the buckets."""
    series: dict[tuple[MixKind, float], list[Bucket]] = {}
    for bucket in buckets:
        series.setdefault((bucket.mix, bucket.decode_context_tokens), []).append(bucket)

    def pays(tokens: int, mix: MixKind, context: float) -> bool:
        rows = traffic.rows(tokens, traffic.decode_fraction(mix), context)
        return solved(search, rows, buckets).winner.schedule.is_overlapped

    step = search.space.token_granularity
    return tuple(
        find_break_even(
            found, step, lambda tokens, mix=mix, context=context: pays(tokens, mix, context)
        )
        for (mix, context), found in series.items()
    )
