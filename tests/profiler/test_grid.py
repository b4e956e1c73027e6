"""The lattice of points: families of a graph, legal shares, collectives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.profiler.grid import (
    collective_points,
    families,
    is_collective,
    legal_shares,
    sustained_points,
)
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.search_spaces.loader import load_model

VARIANTS = {
    "gemm": ("cublas", "triton_128x256"),
    "gemm_silu": ("cublas", "triton_128x256"),
    "grouped_gemm": ("triton_grouped_128x128",),
    "grouped_gemm_silu": ("triton_grouped_128x128",),
    "moe_router": ("triton",),
    "moe_combine": ("triton",),
    "norm": ("triton",),
    "rope_append": ("triton",),
    "decode_attention": ("triton",),
    "prefill_attention": ("triton",),
    "all_reduce": ("nccl", "nccl_8"),
    "all_gather": ("nccl", "symm_8"),
    "embedding": ("torch",),
    "sampling": ("torch",),
}


def graph(model="llama2-70b", tp_degree=2):
    return OpGraph.build(load_model(model), tp_degree)


def test_legal_shares_are_eights_their_complements_and_the_whole_gpu():
    shares = legal_shares(132, 8)
    assert shares[0] == 8
    assert shares[-1] == 132
    below = set(shares) - {132}
    assert {132 - share for share in below} == below
    assert all(share % 8 == 0 or (132 - share) % 8 == 0 for share in shares)


@pytest.mark.parametrize("model", ["llama2-70b", "llama3-8b", "mixtral-8x7b"])
def test_every_op_of_an_iteration_has_a_family_and_every_coarse_share_is_legal(model):
    made = families(graph(model, 1), 132, 8, VARIANTS)
    ops = (*graph(model, 1).prologue, *graph(model, 1).layer, *graph(model, 1).epilogue)
    assert {(f.kind, f.shape) for f in made} == {(op.kind, op.shape) for op in ops}
    assert all(set(f.shares) <= set(f.lattice) for f in made)
    assert all(f.num_sms == 132 == max(f.lattice) for f in made)
    assert len({(f.kind, f.shape, f.kv_len) for f in made}) == len(made)


def test_attention_has_a_family_for_each_kv_length_and_the_head_only_the_whole_gpu():
    made = families(graph(), 132, 8, VARIANTS)
    assert {f.kv_len for f in made if f.kind == "decode_attention"} == {512, 1024, 2048}
    head = next(f for f in made if f.kind == "gemm" and f.shape == "n16000_k8192")
    assert head.shares == head.lattice == (132,)
    assert max(f.tokens[0] for f in made) == 2048


def test_collectives_are_points_of_all_ranks_and_not_families():
    assert is_collective("all_reduce")
    assert is_collective("all_gather")
    assert not any(is_collective(f.kind) for f in families(graph(), 132, 8, VARIANTS))
    points = collective_points(graph(), 132, VARIANTS)
    assert {point.shape for point in points} == {"d8192_r2"}
    assert {(p.kind, p.variant) for p in points} == {
        *(("all_reduce", name) for name in ("nccl", "nccl_8")),
        *(("all_gather", name) for name in ("nccl", "symm_8")),
    }
    assert len(set(points)) == len(points)
    assert collective_points(graph("llama3-8b", 1), 132, VARIANTS) == []


def test_gathers_are_as_wide_as_the_attention_output_and_as_the_hidden_state():
    wide = replace(load_model("llama3-8b"), head_dim=64)  # 32 heads: 2048 of 4096
    points = collective_points(OpGraph.build(wide, 4), 132, VARIANTS)
    gathers = {point.shape for point in points if point.kind == "all_gather"}
    assert gathers == {"d2048_r4", "d4096_r4"}


def test_each_collective_is_measured_on_the_shares_that_it_differs_on():
    names = ("nccl", "symm_one_shot_8", "symm_two_shot_32", "copy_engine", "copy_engine_add")
    points = collective_points(graph(), 132, {**VARIANTS, "all_reduce": names})
    shares = {name: {p.num_sms for p in points if p.variant == name} for name in names}
    assert shares["nccl"] == shares["copy_engine_add"] == {8, 16, 32, 132}
    assert shares["symm_one_shot_8"] == {8, 16, 32, 132}
    assert shares["symm_two_shot_32"] == {32, 132}
    assert shares["copy_engine"] == {0}


def test_the_sustained_rate_is_that_of_the_largest_gemm_of_all_models():
    graphs = [graph("llama3-8b", 1), graph("mixtral-8x7b", 1), graph()]
    points = sustained_points(graphs, 132, VARIANTS)
    assert {point.shape for point in points} == {"n28672_k8192"}
    assert {point.kind for point in points} == {"gemm"}
