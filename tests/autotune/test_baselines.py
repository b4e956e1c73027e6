from __future__ import annotations

import pytest

from nanoflow_tune.autotune.baselines import (
    PingPongChoice,
    equal_split,
    nano_only,
    ping_pong,
    sequential,
)
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.patterns import macro_ops
from nanoflow_tune.autotune.simulator import predict, simulate
from nanoflow_tune.runtime.legality import check

from .fakes import MIX, graph_of, h200, linear_profile, quick_space

GRAPHS = {1: graph_of("llama3-8b"), 2: graph_of("llama2-70b", 2)}
COSTS = CostModel(linear_profile(*GRAPHS.values()), h200())


def test_macro_ops_are_chains_with_at_most_one_gemm():
    names = {tp: [macro.name for macro in macro_ops(graph)] for tp, graph in GRAPHS.items()}
    attention, ffn = ["kqv", "decode_attention", "prefill_attention"], ["up_gate", "down"]
    assert names[1] == [*attention, "o_proj", *ffn]
    output = ["attn_all_gather", "o_proj", "attn_all_reduce"]
    assert names[2] == [*attention, *output, *ffn, "ffn_all_reduce"]


@pytest.mark.parametrize("tp_degree", [1, 2])
def test_sequential_is_one_lane_on_the_whole_gpu_with_the_fastest_kernels(tp_degree: int):
    graph = GRAPHS[tp_degree]
    schedule = sequential(graph, COSTS, MIX)
    check(schedule, graph, 132, 8)
    assert schedule.lanes == ("compute",)
    assert [nano_op.op for nano_op in schedule.nano_ops] == list(graph.op_names)
    for nano_op in schedule.nano_ops:
        assert nano_op.num_sms == 132
        assert nano_op.variant == COSTS.best(graph.op(nano_op.op), MIX, 132)[0]


@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("row_order", ["decodes_first", "interleaved"])
def test_nano_only_splits_but_does_not_overlap(tp_degree: int, row_order: str):
    graph = GRAPHS[tp_degree]
    schedule = nano_only(graph, COSTS, MIX, row_order)  # pyright: ignore[reportArgumentType]
    check(schedule, graph, 132, 8)
    assert len(schedule.nano_batches) == 2
    assert not schedule.is_overlapped
    base = predict(sequential(graph, COSTS, MIX), graph, COSTS, MIX)
    assert predict(schedule, graph, COSTS, MIX).period_us >= base.period_us


@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("row_order", ["decodes_first", "interleaved"])
@pytest.mark.parametrize("order", ["blocks", "interleaved"])
@pytest.mark.parametrize("shares", [(100, 32, 16), (116, 16, 16), (84, 48, 32), (132, 132, 132)])
def test_every_ping_pong_schedule_is_legal(
    tp_degree: int, row_order: str, order: str, shares: tuple[int, int, int]
):
    graph = GRAPHS[tp_degree]
    choice = PingPongChoice(
        first_tokens=768,
        row_order=row_order,  # pyright: ignore[reportArgumentType]
        order=order,  # pyright: ignore[reportArgumentType]
        compute_sms=shares[0],
        memory_sms=shares[1],
        network_sms=shares[2],
    )
    schedule = ping_pong(graph, COSTS, MIX, choice)
    check(schedule, graph, 132, 8)
    has_lane_beside = tp_degree == 2 or shares[1] < 132  # attention on all SMs is in compute's
    assert schedule.is_overlapped == has_lane_beside
    assert [batch.tokens for batch in schedule.nano_batches] == [(0, 768), (768, 2048)]
    expected = [768, 256] if row_order == "decodes_first" else [384, 640]
    assert [batch.decode_tokens for batch in schedule.nano_batches] == expected


def test_equal_split_overlaps_attention_with_compute_on_half_of_the_sms_each():
    graph, space = GRAPHS[1], quick_space()
    schedule = equal_split(graph, COSTS, MIX, space)
    shares = {nano_op.lane: nano_op.num_sms for nano_op in schedule.nano_ops}
    assert shares == {"compute": 68, "memory": 64}
    assert [batch.num_tokens for batch in schedule.nano_batches] == [1024, 1024]
    timeline = simulate(schedule, graph, COSTS, MIX, num_layers=4)
    events = [e for e in timeline.events if e.end_us > e.start_us]
    memory = [e for e in events if e.lane == "memory" and e.layer == 2]
    assert all(
        any(e.lane == "compute" and e.start_us < m.end_us and e.end_us > m.start_us for e in events)
        for m in memory
    )
