from __future__ import annotations

from dataclasses import replace

import pytest
from builders import tiny_model
from engine_builders import MODEL, book_of, bucket

from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import GainCurve
from nanoflow_tune.runtime.plan_choice import PlanBook
from nanoflow_tune.runtime.schedule import IllegalScheduleError

GRAPH = OpGraph.build(MODEL)


def test_a_full_step_like_the_bucket_runs_the_winner():
    chosen = book_of().choose(32, 32, 24.0)
    assert chosen.choice.schedule.name == "overlapped"
    assert chosen.label == "overlapped (11 % faster at 12 keys a row)"


def test_small_steps_run_the_smallest_sequential_schedule_that_holds_them():
    book = book_of()
    assert book.sizes == (16, 32, 64)
    chosen = book.choose(20, 0, 24.0)
    assert (chosen.choice.rows, chosen.choice.schedule.name) == (32, "sequential")
    assert chosen.reason == "no overlapped schedule is known to gain at 15 keys a row"


def test_a_step_far_from_every_bucket_runs_sequentially():
    far_mix = book_of().choose(64, 0, 24.0)
    assert far_mix.choice.schedule.name == "sequential"
    assert "gain at 24 keys a row" in far_mix.reason
    far_kv = book_of().choose(32, 32, 24.0 * 8)
    assert far_kv.choice.schedule.name == "sequential"


def test_the_nearest_of_several_buckets_is_chosen():
    buckets = (bucket(GRAPH, 64, 32), bucket(GRAPH, 64, 64), bucket(GRAPH, 64, 32, context=96.0))
    book = book_of(buckets=buckets)
    assert book.choose(64, 0, 24.0).choice.key == "bucket 1"
    assert book.choose(30, 34, 80.0).choice.key == "bucket 2"


def _with_curve(bucket, gains):
    keys = tuple(part * bucket.keys_per_row for part in (0.5, 1.0, 2.0))
    return replace(bucket, overlap_gain=GainCurve(keys_per_row=keys, gains=gains))


def test_the_schedule_that_gains_most_at_the_load_runs_whoever_won_at_its_point():
    own = bucket(GRAPH, 64, 32)
    loses = bucket(GRAPH, 64, 32, context=48.0)
    loses = replace(loses, winner=loses.sequential)
    gain = loses.sequential.predicted.period_us / loses.best_overlapped.predicted.period_us - 1
    buckets = _with_curve(own, (0.03, gain, 0.0)), _with_curve(loses, (0.0, gain, 0.2))
    book = book_of(buckets=buckets)
    assert book.choose(32, 32, 24.0).choice.key == "bucket 0"
    assert book.choose(32, 32, 90.0).choice.key == "bucket 1"
    assert book.choose(64, 0, 44.0).choice.key == "bucket 1"  # as many keys, other rows
    assert book.choose(32, 32, 97.0).choice.schedule.name == "sequential"  # beyond the curve


def test_padding_counts_against_a_larger_overlapped_schedule():
    large = bucket(GRAPH, 640, 320, cut=512)  # the second nano-batch is too small to lose rows
    buckets = (_with_curve(large, (0.1, 1 / 0.9 - 1, 0.1)), bucket(GRAPH, 16, 8))
    book = book_of(buckets=buckets)
    chosen = book.choose(300, 240, 24.0)
    assert (chosen.choice.key, chosen.choice.rows) == ("bucket 0", 640)
    assert chosen.gain == pytest.approx(1 / 0.9 - 1, abs=0.01)  # of as many rows
    assert book.choose(290, 222, 24.0).choice.schedule.name == "sequential"  # of 512 rows


def test_between_the_plans_sizes_shorter_overlapped_schedules_run():
    large = bucket(GRAPH, 1024, 512, cut=512)
    buckets = (_with_curve(large, (0.1, 1 / 0.9 - 1, 0.1)), bucket(GRAPH, 512, 256))
    book = book_of(buckets=buckets)
    chosen = book.choose(380, 380, 24.0)
    assert (chosen.choice.key, chosen.choice.rows) == ("bucket 0, 768 rows", 768)
    assert [batch.tokens for batch in chosen.choice.schedule.nano_batches] == [(0, 384), (384, 768)]
    assert chosen.choice.period_us == pytest.approx(900.0 * 0.75)
    assert chosen.gain == pytest.approx(1 / 0.9 - 1, abs=0.01)
    uneven = book.choose(440, 440, 24.0)  # 512 + 384 rows
    assert uneven.choice.rows == 896
    assert uneven.gain == pytest.approx(1 / 0.9 * 896 / 1024 / ((1 + 896 / 1024) / 2) - 1, abs=0.01)
    rows = {choice.rows for key, choice in book.choices.items() if key.startswith("bucket 0")}
    assert rows == {1024, 896, 768}


def test_a_schedule_that_gains_nowhere_is_no_choice():
    book = book_of(buckets=(_with_curve(bucket(GRAPH, 64, 32), (0.0, 0.01, -0.1)),))
    assert all(choice.schedule.name == "sequential" for choice in book.choices.values())


def test_a_remark_leaves_sequential_schedules_alone():
    book = book_of(remark="made for another clock")
    chosen = book.choose(32, 32, 24.0)
    assert chosen.label == "sequential (made for another clock)"
    assert all(choice.schedule.name == "sequential" for choice in book.choices.values())


def test_more_rows_than_any_dense_batch_are_refused():
    with pytest.raises(ValueError, match="larger than any dense batch"):
        book_of().choose(65, 0, 1.0)


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(IllegalScheduleError):
        book_of(
            tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2),
            buckets=(bucket(GRAPH, 64, 32),),
        )


def test_without_a_plan_there_are_sequential_schedules_of_all_sizes():
    kinds = {GRAPH.op(op).kind: "torch" for op in GRAPH.op_names}
    book = PlanBook.without_plan(GRAPH, 200, kinds)
    assert book.sizes == (16, 32, 64, 96, 128, 192, 200)
    assert book.choose(100, 0, 5.0).choice.rows == 128


def test_measured_times_scale_the_predicted_ones():
    book = book_of()
    assert book.step_s(64, {}) == pytest.approx(1e-3)
    assert book.step_s(32, {}) == pytest.approx(0.5e-3)
    assert book.step_s(32, {64: 4e-3}) == pytest.approx(2e-3)
    assert book.rows_within(2.5e-3, {64: 4e-3}) == 32
    assert book.rows_within(1e-9, {}) == 16


def test_the_dense_batch_aims_at_the_plans_own_bucket_whatever_larger_ones_there_are():
    buckets = (bucket(GRAPH, 32, 16), bucket(GRAPH, 64, 32))
    for remark in ("", "close"):
        book = book_of(buckets=buckets, remark=remark)
        assert (book.target_rows, book.max_rows) == (32, 64)


def test_the_dense_batch_may_aim_at_another_size():
    book = book_of(buckets=(bucket(GRAPH, 32, 16), bucket(GRAPH, 64, 32)))
    book.aim_at(33)
    assert book.target_rows == 64
    for rows in (0, 65):
        with pytest.raises(ValueError, match="must have 1 to 64 rows"):
            book.aim_at(rows)
