from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.runtime.legality import check, serialize_conflicts
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule
from nanoflow_tune.runtime.schedule import (
    IllegalScheduleError,
    concurrent_pairs,
    data_edges,
    random_legal_order,
    row_mix,
    unroll,
)
from nanoflow_tune.search_spaces.schema import ModelSpec

NUM_SMS, GRANULARITY = 132, 8
MODEL = ModelSpec(
    name="tiny",
    architecture="llama",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
GRAPH, GRAPH_TP2 = OpGraph.build(MODEL), OpGraph.build(MODEL, 2)
LANES = {"decode_attention": "memory", "all_reduce": "network"}


def split_schedule(graph: OpGraph, boundary: int, shares: dict[str, int]) -> Schedule:
    """Two nano-batches, op by op, each kind on its lane."""
    batches = (
        NanoBatch(tokens=(0, boundary), decode_tokens=boundary // 2),
        NanoBatch(tokens=(boundary, 64), decode_tokens=0),
    )
    nano_ops = [
        NanoOp(
            op=op.name,
            tokens=batch.tokens,
            lane=LANES.get(op.kind, "compute"),
            num_sms=shares[LANES.get(op.kind, "compute")],
            variant="any",
        )
        for op in graph.layer
        for batch in batches
    ]
    return Schedule(name="overlapped", nano_batches=batches, nano_ops=tuple(nano_ops))


FITTING = {"compute": 100, "memory": 16, "network": 16}


def delay_tails(schedule: Schedule) -> Schedule:
    """Let everything behind the attention run one period later, ahead of the rest."""
    late = {"o_proj", "attn_all_reduce", "ffn_norm", "up_gate", "down"}
    late.add("ffn_all_reduce")
    tail = [replace(n, stage=1) for n in schedule.nano_ops if n.op in late]
    head = [n for n in schedule.nano_ops if n.op not in late]
    head.sort(key=lambda nano_op: nano_op.tokens)
    return replace(schedule, nano_ops=(*tail, *head))


@given(
    boundary=st.integers(1, 63),
    num_layers=st.integers(1, 6),
    is_parallel=st.booleans(),
    is_staged=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_random_legal_orders_of_the_unrolled_list_respect_every_data_edge(
    boundary: int, num_layers: int, is_parallel: bool, is_staged: bool, seed: int
):
    graph = GRAPH_TP2 if is_parallel else GRAPH
    schedule = split_schedule(graph, boundary, FITTING)
    if is_staged:
        schedule = delay_tails(schedule)
    check(schedule, graph, NUM_SMS, GRANULARITY)
    instances = unroll(schedule, graph, num_layers)
    assert len(instances) == num_layers * len(schedule.nano_ops)
    order = random_legal_order(instances, seed)
    assert sorted(order) == list(range(len(instances)))
    place = {(instances[i].index, instances[i].layer): rank for rank, i in enumerate(order)}
    for producer, consumer, distance in data_edges(schedule, graph):
        for layer in range(distance, num_layers):
            assert place[producer, layer - distance] < place[consumer, layer]


@given(num_layers=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_lane_runs_in_issue_order_also_where_the_pattern_fills_and_drains(
    num_layers: int, seed: int
):
    schedule = delay_tails(split_schedule(GRAPH_TP2, 32, FITTING))
    instances = unroll(schedule, GRAPH_TP2, num_layers)
    order = random_legal_order(instances, seed)
    for lane in schedule.lanes:
        mine = [i for i in order if schedule.nano_ops[instances[i].index].lane == lane]
        assert mine == sorted(mine)


@given(compute=st.sampled_from([68, 84, 100, 132]), memory=st.sampled_from([16, 32, 64, 132]))
@settings(max_examples=16, deadline=None)
def test_serialized_schedules_never_use_more_sms_than_there_are(compute: int, memory: int):
    shares = {"compute": compute, "memory": memory, "network": 16}
    schedule = delay_tails(split_schedule(GRAPH_TP2, 24, shares))
    schedule = serialize_conflicts(schedule, GRAPH_TP2, NUM_SMS, GRANULARITY)
    check(schedule, GRAPH_TP2, NUM_SMS, GRANULARITY)
    for a, b in concurrent_pairs(schedule, GRAPH_TP2):
        assert schedule.nano_ops[a].num_sms + schedule.nano_ops[b].num_sms <= NUM_SMS


def test_prefill_attention_waits_for_the_keys_of_earlier_nano_batches_only():
    schedule = split_schedule(GRAPH, 32, FITTING)
    ids = schedule.ids
    edges = {(ids[a], ids[b]) for a, b, _ in data_edges(schedule, GRAPH)}
    assert ("rope_append.0", "prefill_attention.1") in edges
    assert ("rope_append.1", "prefill_attention.0") not in edges


def test_row_mix_counts_decodes_of_parts_of_nano_batches():
    schedule = split_schedule(GRAPH, 32, FITTING)
    mix = row_mix(schedule, (8, 40), 100.0, 50.0)
    assert (mix.decode_tokens, mix.prefill_tokens) == (8, 24)


def changed(index: int, **changes: object) -> Schedule:
    schedule = split_schedule(GRAPH, 32, FITTING)
    nano_ops = list(schedule.nano_ops)
    nano_ops[index] = replace(nano_ops[index], **changes)
    return replace(schedule, nano_ops=tuple(nano_ops))


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (changed(0, op="conv"), ["unknown op 'conv'", "attn_norm"]),
        (changed(2, tokens=(0, 40)), ["kqv", "overlap", "[32, 64)"]),
        (changed(3, tokens=(40, 64)), ["kqv", "miss rows", "row 32"]),
        (changed(3, tokens=(32, 72)), ["kqv", "end outside", "72", "64 rows"]),
        (changed(3, tokens=(32, 60)), ["kqv", "miss the end of", "60"]),
        (changed(2, num_sms=140), ["kqv.0", "140", "132"]),
        (changed(2, num_sms=50), ["kqv.0", "50", "multiple of 8"]),
        (changed(6, num_sms=132), ["decode_attention.0", "same time", "`after`"]),
        (changed(2, after=("kqv.7",)), ["kqv.0", "kqv.7", "known"]),
        (changed(12, stage=1), ["illegal order", "stage 1", "issued later"]),
    ],
)
def test_check_refuses_what_must_not_run_and_names_it(schedule: Schedule, words: list[str]):
    with pytest.raises(IllegalScheduleError) as caught:
        check(schedule, GRAPH, NUM_SMS, GRANULARITY)
    for word in words:
        assert word in str(caught.value)


def test_check_refuses_an_order_that_reads_what_is_not_written_yet():
    schedule = split_schedule(GRAPH, 32, FITTING)
    with pytest.raises(IllegalScheduleError, match=r"illegal order: kqv\.0 .* needs attn_norm\.0"):
        check(
            replace(schedule, nano_ops=(*schedule.nano_ops[2:], *schedule.nano_ops[:2])),
            GRAPH,
            NUM_SMS,
            GRANULARITY,
        )


def test_check_refuses_nano_batches_that_leave_a_hole():
    schedule = split_schedule(GRAPH, 32, FITTING)
    hole = (schedule.nano_batches[0], NanoBatch(tokens=(40, 64), decode_tokens=0))
    with pytest.raises(IllegalScheduleError, match="starts at row 40 where 32 was expected"):
        check(replace(schedule, nano_batches=hole), GRAPH, NUM_SMS, GRANULARITY)


def test_check_refuses_three_lanes_that_only_fit_in_pairs():
    schedule = delay_tails(
        split_schedule(GRAPH_TP2, 32, {"compute": 68, "memory": 64, "network": 64})
    )
    with pytest.raises(IllegalScheduleError, match=r"64 SMs and .* 64 SMs and .* 68 SMs"):
        check(schedule, GRAPH_TP2, NUM_SMS, GRANULARITY)
    check(
        serialize_conflicts(schedule, GRAPH_TP2, NUM_SMS, GRANULARITY),
        GRAPH_TP2,
        NUM_SMS,
        GRANULARITY,
    )
