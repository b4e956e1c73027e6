from __future__ import annotations

from dataclasses import replace

import pytest
from builders import NUM_SMS, ping_pong, sequential, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Bucket, Candidate, GainCurve, Plan, Timing
from nanoflow_tune.runtime.plan_lookup import (
    bucket_for,
    bucket_sizes,
    gain_over_sequential,
    nearest,
    with_decodes,
)

GRAPH = OpGraph.build(tiny_model())
SIZES = (128, 256, 512, 1024)


def _bucket(tokens: int, decodes: int, context: float) -> Bucket:
    half = tokens // 2
    overlapped = ping_pong(GRAPH, half, tokens, (decodes - decodes // 2, decodes // 2))
    timing = Timing(period_us=1.0, source="predicted")
    candidate = Candidate(schedule=overlapped, predicted=timing)
    base = Candidate(schedule=sequential(GRAPH, tokens, decodes), predicted=timing)
    return Bucket(
        dense_batch_tokens=tokens,
        decode_tokens=decodes,
        decode_context_tokens=context,
        prefill_context_tokens=10.5,
        row_order="interleaved",
        winner=candidate,
        sequential=base,
        best_overlapped=candidate,
        lower_bound_us=1.0,
        power_limit_us=1.0,
        bound="compute",
    )


def _plan(buckets):
    return Plan(
        model="m",
        hardware="h",
        workload="w",
        num_gpus=1,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        page_size=16,
        buckets=tuple(buckets),
    )


BOOK = _plan(
    _bucket(tokens, round(part * tokens), context)
    for tokens in (1024, 128, 512, 256)
    for part in (0.5, 1.0, 0.125)
    for context in (512.0, 4096.0)
)


@given(
    tokens=st.integers(1, 1024),
    part=st.floats(0, 1),
    context=st.one_of(st.floats(1, 1e5), st.just(0)),
)
def test_any_step_gets_the_smallest_size_that_holds_it_and_a_schedule_that_may_run(
    tokens, part, context
):
    decodes = round(part * tokens)
    bucket = bucket_for(BOOK, decodes, tokens - decodes, context)
    assert bucket.dense_batch_tokens == min(size for size in SIZES if size >= tokens)
    for candidate in (bucket.winner, bucket.sequential, bucket.best_overlapped):
        schedule = with_decodes(candidate.schedule, decodes)
        check(schedule, GRAPH, NUM_SMS, 4)
        assert schedule.dense_batch_tokens >= tokens
        assert sum(batch.decode_tokens for batch in schedule.nano_batches) == decodes


@given(index=st.integers(0, len(BOOK.buckets) - 1))
def test_a_grid_point_is_found_at_its_own_place(index):
    bucket = BOOK.buckets[index]
    context = bucket.decode_context_tokens
    assert bucket_for(BOOK, bucket.decode_tokens, bucket.prefill_tokens, context) is bucket


def test_mix_and_kv_length_choose_among_points_of_one_size():
    assert bucket_sizes(BOOK) == SIZES

    def chosen(decodes, prefills, context):
        bucket = bucket_for(BOOK, decodes, prefills, context)
        return bucket.dense_batch_tokens, bucket.decode_tokens, bucket.decode_context_tokens

    assert chosen(190, 10, 700) == (256, 256, 512.0)
    assert chosen(20, 180, 700) == (256, 32, 512.0)
    assert chosen(100, 100, 3000) == (256, 128, 4096.0)
    assert chosen(0, 200, 0) == (256, 32, 512.0)
    assert chosen(110, 90, 0)[1] == 128


def test_of_equally_near_points_the_plans_first_is_taken():
    first, second = _bucket(128, 64, 512.0), replace(_bucket(128, 64, 512.0), bound="power")
    assert nearest((first, second), 0.5, 512.0) is first


@pytest.mark.parametrize(
    ("decodes", "prefills", "message"),
    [(0, 0, "at least one row"), (-1, 4, "negative"), (1000, 25, "1024 rows, but has 1025")],
)
def test_a_step_that_no_bucket_holds_is_refused(decodes, prefills, message):
    with pytest.raises(ValueError, match=message):
        bucket_for(BOOK, decodes, prefills, 512.0)


def _faster(bucket, part):
    """The bucket with an overlapped schedule that takes this part of the sequential time."""
    timing = Timing(period_us=part, source="predicted")
    candidate = replace(bucket.best_overlapped, predicted=timing)
    return replace(bucket, winner=candidate, best_overlapped=candidate)


def test_without_a_curve_the_gain_falls_with_the_distance():
    bucket = _faster(_bucket(128, 64, 512.0), 1 / 1.07)
    assert gain_over_sequential(bucket, 0.5, 512.0) == pytest.approx(0.07)
    assert gain_over_sequential(bucket, 0.7, 512.0) == pytest.approx(0.07 - 0.35 * 0.2)
    assert gain_over_sequential(bucket, 0.8, 512.0) is None
    sequential_wins = replace(bucket, winner=bucket.sequential)
    assert gain_over_sequential(sequential_wins, 0.5, 512.0) is None


CURVE = GainCurve(keys_per_row=(128.0, 256.0, 512.0), gains=(0.02, 0.10, -0.04))


def test_a_curve_is_read_at_the_keys_for_each_row_whatever_rows_they_are_of():
    bucket = replace(_faster(_bucket(128, 64, 512.0), 1 / 1.10), overlap_gain=CURVE)
    assert bucket.keys_per_row == 256.0
    assert gain_over_sequential(bucket, 0.5, 512.0) == pytest.approx(0.10)
    assert gain_over_sequential(bucket, 0.25, 1024.0) == pytest.approx(0.10 - 0.06 * 0.25)
    assert gain_over_sequential(bucket, 0.5, 2**0.5 * 256) == pytest.approx(0.06)
    assert gain_over_sequential(bucket, 0.5, 1024.0) == pytest.approx(-0.04)
    assert gain_over_sequential(bucket, 0.5, 1025.0) is None
    assert gain_over_sequential(bucket, 0.0, 0.0) is None


def test_a_measured_gain_lifts_the_whole_curve():
    bucket = _faster(_bucket(128, 64, 512.0), 1 / 1.10)
    measured = Timing(period_us=1 / 1.14, source="measured")
    best = replace(bucket.best_overlapped, measured=measured)
    bucket = replace(bucket, best_overlapped=best, overlap_gain=CURVE)
    assert gain_over_sequential(bucket, 0.5, 512.0) == pytest.approx(0.14)
    assert gain_over_sequential(bucket, 0.5, 1024.0) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("keys", "gains", "message"),
    [
        ((1.0,), (0.1,), "two or more entries"),
        ((1.0, 2.0), (0.1,), "equally many"),
        ((2.0, 2.0), (0.1, 0.1), "ascending"),
        ((0.0, 2.0), (0.1, 0.1), "positive"),
        ((1.0, 2.0), (0.1, -1.0), "greater than -1"),
    ],
)
def test_a_curve_that_means_nothing_is_refused(keys, gains, message):
    with pytest.raises(ValueError, match=message):
        GainCurve(keys_per_row=keys, gains=gains)


def test_decode_rows_keep_the_row_order_of_the_schedule():
    in_turn = ping_pong(GRAPH, 128, 256, (80, 20))
    first = ping_pong(GRAPH, 128, 256, (128, 20))
    assert [b.decode_tokens for b in with_decodes(in_turn, 60).nano_batches] == [30, 30]
    assert [b.decode_tokens for b in with_decodes(first, 60).nano_batches] == [60, 0]
    assert [b.decode_tokens for b in with_decodes(first, 200).nano_batches] == [128, 72]
    assert with_decodes(in_turn, 60).nano_ops == in_turn.nano_ops
    with pytest.raises(ValueError, match="between 0 and the 256 rows"):
        with_decodes(in_turn, 257)
