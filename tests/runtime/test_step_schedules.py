from __future__ import annotations

import pytest
from builders import NUM_SMS, ping_pong, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.step_schedules import (
    pace,
    sizes_below,
    step_sizes,
    with_fewer_rows,
)

GRAPH = OpGraph.build(tiny_model())


def test_sizes_are_powers_of_two_and_halfway_between():
    assert step_sizes(512, {320}) == (16, 32, 64, 96, 128, 192, 256, 320, 384, 512)
    assert step_sizes(1000, {1000})[-5:] == (512, 640, 768, 896, 1000)
    assert step_sizes(40, {24}) == (16, 24, 32, 40)


@given(tiles=st.integers(4, 16), part=st.floats(0.3, 0.7), data=st.data())
def test_with_fewer_rows_a_schedule_may_run_and_keeps_its_structure(tiles, part, data):
    rows, cut = 128 * tiles, 128 * min(tiles - 1, max(1, round(part * tiles)))
    decodes = data.draw(st.integers(0, cut)), data.draw(st.integers(0, rows - cut))
    whole = ping_pong(GRAPH, cut, rows, decodes)
    for size in sizes_below(whole, 0):
        schedule = with_fewer_rows(whole, size)
        check(schedule, GRAPH, NUM_SMS, 4)
        assert schedule.dense_batch_tokens == size
        for batch in schedule.nano_batches:
            assert batch.num_tokens >= 128
            assert batch.num_tokens % 128 == 0
        assert [(n.op, n.lane, n.num_sms) for n in schedule.nano_ops] == [
            (n.op, n.lane, n.num_sms) for n in whole.nano_ops
        ]
        assert size / rows - 1e-9 <= pace(whole, schedule) <= 1


def test_the_nano_batch_that_lost_least_and_all_rows_set_the_pace():
    whole = ping_pong(GRAPH, 1024, 2048, (100, 100))
    assert pace(whole, whole) == 1
    assert pace(whole, with_fewer_rows(whole, 1920)) == (1 + 1920 / 2048) / 2  # 1024 + 896
    even = with_fewer_rows(whole, 1536)
    assert [batch.tokens for batch in even.nano_batches] == [(0, 768), (768, 1536)]
    assert [batch.decode_tokens for batch in even.nano_batches] == [75, 75]
    assert pace(whole, even) == 0.75


def test_sizes_below_end_where_nano_ops_get_small():
    whole = ping_pong(GRAPH, 512, 1024, (100, 100))
    assert list(sizes_below(whole, 0)) == [896, 768]
    assert list(sizes_below(whole, 768)) == [896]
    assert list(sizes_below(ping_pong(GRAPH, 256, 512, (1, 1)), 0)) == []
    assert next(sizes_below(ping_pong(GRAPH, 500, 1000, (100, 100)), 0)) == 896


@pytest.mark.parametrize("rows", [0, 100, 1025])
def test_rows_that_nano_ops_cannot_share_are_refused(rows):
    with pytest.raises(ValueError, match="each must keep a tile of 128"):
        with_fewer_rows(ping_pong(GRAPH, 512, 1024, (100, 100)), rows)
