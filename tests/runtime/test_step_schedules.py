from __future__ import annotations

import pytest
from builders import NUM_SMS, ping_pong, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.step_schedules import sizes_below, step_sizes, with_fewer_rows

GRAPH = OpGraph.build(tiny_model())


def test_sizes_are_powers_of_two_and_halfway_between():
    assert step_sizes(512, {320}) == (16, 32, 64, 96, 128, 192, 256, 320, 384, 512)
    assert step_sizes(1000, {1000})[-5:] == (512, 640, 768, 896, 1000)
    assert step_sizes(40, {24}) == (16, 24, 32, 40)


@given(
    cut=st.integers(1, 15), tiles=st.integers(2, 16), decodes=st.integers(0, 256), data=st.data()
)
def test_without_its_last_rows_a_schedule_may_run_and_keeps_its_order(cut, tiles, decodes, data):
    rows = 128 * tiles
    cut = 128 * min(cut, tiles - 1)
    second = data.draw(st.integers(0, rows - cut))
    whole = ping_pong(GRAPH, cut, rows, (min(decodes, cut), second))
    kept = data.draw(st.integers(cut + 1, rows))
    schedule = with_fewer_rows(whole, kept)
    check(schedule, GRAPH, NUM_SMS, 4)
    assert schedule.dense_batch_tokens == kept
    assert schedule.nano_batches[0] == whole.nano_batches[0]
    assert 0 <= schedule.nano_batches[1].decode_tokens <= second
    assert [(n.op, n.lane, n.num_sms) for n in schedule.nano_ops] == [
        (n.op, n.lane, n.num_sms) for n in whole.nano_ops
    ]
    assert all(size > cut for size in sizes_below(whole, 0))


def test_sizes_below_end_where_the_last_nano_ops_get_small():
    whole = ping_pong(GRAPH, 512, 1024, (100, 100))
    assert list(sizes_below(whole, 0)) == [896, 768]
    assert list(sizes_below(whole, 768)) == [896]
    assert list(sizes_below(ping_pong(GRAPH, 512, 1000, (100, 100)), 0)) == [896, 768]


@pytest.mark.parametrize("rows", [0, 512, 1025])
def test_rows_that_leave_a_nano_op_empty_are_refused(rows):
    with pytest.raises(ValueError, match="more than 512 and at most 1024"):
        with_fewer_rows(ping_pong(GRAPH, 512, 1024, (100, 100)), rows)
