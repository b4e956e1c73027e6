"""Shape keys give back the costs of the ops they are keys of."""

from __future__ import annotations

import pytest

from nanoflow_tune.runtime.op_graph import OpGraph, RowMix
from nanoflow_tune.runtime.op_shapes import RESOURCE_OF_KIND, moved_bytes, op_of_shape
from nanoflow_tune.search_spaces.loader import load_model

MIX = RowMix(
    decode_tokens=96, prefill_tokens=32, decode_context_tokens=700, prefill_context_tokens=90
)
GRAPHS = [
    OpGraph.build(load_model("llama3-8b")),
    OpGraph.build(load_model("llama2-70b"), 2),
    OpGraph.build(load_model("mixtral-8x7b")),
    OpGraph.build(load_model("mixtral-8x7b"), 2),
]


@pytest.mark.parametrize(
    "graph", GRAPHS, ids=["llama3-8b", "llama2-70b-tp2", "mixtral-8x7b", "mixtral-8x7b-tp2"]
)
def test_the_op_of_a_shape_costs_what_the_op_costs(graph):
    for op in (*graph.prologue, *graph.layer, *graph.epilogue):
        twin = op_of_shape(op.kind, op.shape, op.dtype_bytes)
        assert op.resource == twin.resource == RESOURCE_OF_KIND[op.kind]
        for cost in ("flops", "memory_bytes", "link_bytes"):
            assert getattr(twin, cost)(MIX) == getattr(op, cost)(MIX), (op.name, cost)


def test_up_gate_of_llama3_8b_by_hand():
    op = GRAPHS[0].op("up_gate")
    assert (op.kind, op.shape) == ("gemm_silu", "n28672_k4096")
    assert op.flops(MIX) == 2 * 128 * 28672 * 4096
    assert op.memory_bytes(MIX) == 2 * (28672 * 4096 + 128 * (4096 + 14336))
    # Unfused: the GEMM writes 28672 elements a row, SiLU reads them.
    assert moved_bytes(op, MIX, "cublas") == op.memory_bytes(MIX) + 2 * 128 * 2 * 28672
    assert moved_bytes(op, MIX, "sm90_256") == op.memory_bytes(MIX)


def test_an_unfused_up_gate_moves_what_its_gemm_and_silu_move():
    op = GRAPHS[1].op("up_gate")
    gemm = op_of_shape("gemm", op.shape, 2).memory_bytes(MIX)
    silu = 2 * 128 * (28672 + 14336)  # up and gate in, their product out
    assert moved_bytes(op, MIX, "triton_128x256") == gemm + silu


def test_other_ops_move_the_same_bytes_by_every_variant():
    for op in (*GRAPHS[1].layer, *GRAPHS[3].layer):
        if op.kind not in ("gemm_silu", "grouped_gemm_silu"):
            assert moved_bytes(op, MIX, "triton") == op.memory_bytes(MIX)


def test_an_all_gather_sends_half_of_an_all_reduce_and_adds_nothing():
    gather = op_of_shape("all_gather", "d8192_r4", 2)
    reduce = op_of_shape("all_reduce", "d8192_r4", 2)
    assert gather.link_bytes(MIX) == reduce.link_bytes(MIX) / 2
    # This rank's 2048 columns go to three peers.
    assert gather.link_bytes(MIX) == 3 * 2048 * 2 * 128
    assert gather.memory_bytes(MIX) == 2 * 128 * (2048 + 8192)
    assert (gather.flops(MIX), gather.resource) == (0.0, "network")
    assert reduce.flops(MIX) > 0


def test_experts_by_hand():
    graph = GRAPHS[3]
    names = graph.op_names[graph.op_names.index("ffn_norm") :]
    assert names == ("ffn_norm", "router", "up_gate", "down", "combine", "ffn_all_reduce")
    router, up_gate, down, combine = (graph.op(name) for name in names[1:5])
    rows, hidden, ffn = 128, 4096, 14336 // 2
    # Two experts of eight a row; all weights are read once.
    assert (up_gate.kind, up_gate.shape) == ("grouped_gemm_silu", "e8_t2_n14336_k4096")
    assert up_gate.flops(MIX) == 2 * rows * 2 * (2 * ffn) * hidden
    assert up_gate.memory_bytes(MIX) == 2 * (8 * 2 * ffn * hidden + 2 * rows * (hidden + ffn))
    assert (down.kind, down.shape) == ("grouped_gemm", "e8_t2_n4096_k7168")
    assert down.flops(MIX) == 2 * rows * 2 * hidden * ffn
    assert (router.kind, router.shape) == ("moe_router", "e8_t2_d4096")
    assert router.flops(MIX) == 2 * rows * 8 * hidden
    assert router.memory_bytes(MIX) == 2 * (8 * hidden + rows * 3 * hidden)
    assert (combine.kind, combine.shape) == ("moe_combine", "t2_d4096")
    assert combine.memory_bytes(MIX) == 2 * rows * 3 * hidden
    scratch = 2 * 2 * (2 * rows) * (2 * ffn)
    for variant in ("torch_grouped", "triton_grouped_128x128"):
        assert moved_bytes(up_gate, MIX, variant) == up_gate.memory_bytes(MIX) + scratch
    assert moved_bytes(up_gate, MIX, "sm90_256") == up_gate.memory_bytes(MIX)


def test_flops_of_a_mixtral_iteration_are_those_of_the_parameters_that_a_token_meets():
    graph = GRAPHS[2]
    mix = RowMix(
        decode_tokens=128, prefill_tokens=0, decode_context_tokens=0, prefill_context_tokens=0
    )
    flops = graph.num_layers * sum(op.flops(mix) for op in graph.layer)
    flops += sum(op.flops(mix) for op in graph.epilogue)
    model = graph.model
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    table = model.vocab_size * model.hidden_size  # looked up, not multiplied by
    assert flops == 2 * 128 * (model.num_active_parameters - norms - table)
