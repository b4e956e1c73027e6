"""Placing shares on SM groups: disjoint where they can run at once, refused where they do not."""

from __future__ import annotations

import pytest

from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.partition_layout import GroupRange, SmSplit, layout
from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule
from nanoflow_tune.runtime.schedule import IllegalScheduleError, concurrent_pairs
from nanoflow_tune.search_spaces.loader import load_model

H200 = SmSplit.expected(132, 8)
PREFILL_LANE = {"decode_attention": "memory", "attn_all_reduce": "network"}


def schedule(graph, compute, memory, network=8):
    shares = {"compute": compute, "memory": memory, "network": network}
    batches = ((0, 128), (128, 256))
    nano_ops = []
    for op in graph.layer:
        lane = PREFILL_LANE.get(op.name, "network" if op.kind == "all_reduce" else "compute")
        nano_ops += [
            NanoOp(op=op.name, tokens=t, lane=lane, num_sms=shares[lane], variant="x")
            for t in batches
        ]
    return Schedule(
        name="overlapped",
        nano_batches=tuple(NanoBatch(tokens=t, decode_tokens=64) for t in batches),
        nano_ops=tuple(nano_ops),
    )


def place(plan, graph):
    return layout(plan, concurrent_pairs(plan, graph), 132, H200)


def sms(groups, split=H200):
    start, end = groups.start * split.granularity, groups.end * split.granularity
    rest = range(split.num_groups * split.granularity, 132) if groups.has_remainder else ()
    return set(range(start, end)) | set(rest)


def test_an_h200_splits_into_15_groups_and_12_left_over():
    assert SmSplit(granularity=8, num_groups=15, remainder=12) == H200
    assert SmSplit.expected(108, 4) == SmSplit(granularity=4, num_groups=27, remainder=0)


@pytest.mark.parametrize("memory", range(8, 121, 8))
def test_every_share_and_its_complement_fit_side_by_side(memory):
    graph = OpGraph.build(load_model("llama3-8b"), 1)
    plan = schedule(graph, 132 - memory, memory)
    placed = place(plan, graph)
    for slot, groups in placed.items():
        assert len(sms(groups)) == slot[1]
    for a, b in concurrent_pairs(plan, graph):
        first, second = plan.nano_ops[a], plan.nano_ops[b]
        if first.lane != second.lane:
            assert not sms(placed[first.lane, first.num_sms]) & sms(
                placed[second.lane, second.num_sms]
            )


def test_three_lanes_that_fit_pairwise_but_not_together_are_refused():
    graph = OpGraph.build(load_model("llama2-70b"), 2)
    with pytest.raises(IllegalScheduleError, match=r"lane network on 16 SMs does not fit.*lower"):
        place(schedule(graph, 100, 32, 16), graph)
    placed = place(schedule(graph, 84, 32, 16), graph)
    assert len(set.union(*(sms(groups) for groups in placed.values()))) == 132


def test_a_share_that_no_run_of_groups_makes_is_refused():
    with pytest.raises(IllegalScheduleError, match="no partition of 13 SMs"):
        H200.place(13)
    assert H200.place(100) == (11, True)
    assert H200.place(96) == (12, False)


def test_ranges_meet_when_they_share_a_group_or_the_remainder():
    a = GroupRange(start=0, end=4)
    assert a.meets(GroupRange(start=3, end=5))
    assert not a.meets(GroupRange(start=4, end=6, has_remainder=True))
    assert GroupRange(start=9, end=9, has_remainder=True).meets(
        GroupRange(start=4, end=6, has_remainder=True)
    )
