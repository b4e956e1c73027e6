"""The profile grid: what is measured, in which order, and what is left after a kill."""

from __future__ import annotations

from nanoflow_tune.profiler.grid import make_grid
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.search_spaces.loader import load_model

VARIANTS = {
    "gemm": ("cublas", "triton_128x256"),
    "gemm_silu": ("cublas", "triton_128x256"),
    "norm": ("triton",),
    "rope_append": ("triton",),
    "decode_attention": ("triton",),
    "prefill_attention": ("triton",),
    "all_reduce": ("nccl", "nccl_8"),
    "embedding": ("torch",),
    "sampling": ("torch",),
}


def grid(model="llama2-70b", tp_degree=2, **changes):
    graph = OpGraph.build(load_model(model), tp_degree)
    return make_grid(graph, 132, VARIANTS, with_collectives=tp_degree > 1, **changes)


def test_every_op_of_the_layer_is_measured_at_a_share_and_its_complement():
    made = grid()
    kinds = {point.kind for point in made.solo}
    assert kinds == set(VARIANTS)
    shares = {point.num_sms for point in made.solo if point.kind == "gemm"}
    assert {132 - share for share in shares if share < 132} == shares - {132}
    assert len(set(made.solo)) == len(made.solo)


def test_about_a_tenth_of_the_points_have_their_energy_measured():
    made = grid()
    solo = [point for point in made.solo if point.kind != "all_reduce"]
    assert made.joule_points <= set(solo)
    assert 0.09 < len(made.joule_points) / len(solo) < 0.11


def test_the_order_is_random_but_the_same_for_a_seed():
    assert grid() == grid()
    assert grid().solo != grid(seed=1).solo
    assert set(grid().solo) == set(grid(seed=1).solo)


def test_what_was_measured_is_not_measured_again():
    made = grid()
    half = set(made.solo[: len(made.solo) // 2])
    left = made.without(half, set(made.pairs[:3]))
    assert not half & set(left.solo)
    assert set(left.solo) | half == set(made.solo)
    assert left.joule_points <= set(left.solo)
    assert left.pairs == made.pairs[3:]
    assert left.minutes < made.minutes
    assert not made.without(set(made.solo), set(made.pairs)).solo


def test_pairs_fill_the_gpu():
    assert all(a.num_sms + b.num_sms == 132 for a, b in grid().pairs)


def test_one_gpu_has_no_collectives():
    assert not [p for p in grid("llama3-8b", 1).solo if p.kind == "all_reduce"]
