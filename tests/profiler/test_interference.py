"""What is measured side by side: shares fill the GPU, fastest variants, nothing twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.profiler.grid import legal_shares
from nanoflow_tune.profiler.interference import (
    Fastest,
    in_turn,
    left,
    network_pairs,
    network_triples,
    pairs,
    triples,
)
from nanoflow_tune.profiler.profile import PairRow, Point
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.search_spaces.loader import load_model

from .curves import row_of
from .test_grid import VARIANTS

GRAPH = OpGraph.build(load_model("llama2-70b"), 2)
NOTHING = Fastest((), VARIANTS)


@pytest.mark.parametrize(
    "made",
    [
        pairs(GRAPH, NOTHING, 132, 8),
        network_pairs(GRAPH, NOTHING, 132, VARIANTS),
        triples(GRAPH, NOTHING, 132, 8),
        network_triples(GRAPH, NOTHING, 132, 8, VARIANTS),
    ],
    ids=["pairs", "network pairs", "triples", "network triples"],
)
def test_co_runs_fill_the_gpu_with_legal_shares_and_the_largest_comes_first(made):
    assert made
    for together in made:
        shares = [point.num_sms for point in together]
        assert sum(shares) == 132
        assert set(shares) <= set(legal_shares(132, 8))
        assert max(shares) == shares[0]
        assert all(share % 8 == 0 for share in shares[1:])


def test_pairs_cover_gemms_and_prefill_beside_decode_attention_at_many_shares():
    made = pairs(GRAPH, NOTHING, 132, 8)
    beside = {(a.kind, a.shape, a.num_sms) for a, b in made if b.kind == "decode_attention"}
    assert len({share for *_, share in beside}) >= 5
    assert {kind for kind, *_ in beside} == {"gemm", "gemm_silu", "prefill_attention"}
    assert any(b.kind == "norm" for _, b in made)


def test_every_transport_runs_beside_a_gemm():
    made = network_pairs(GRAPH, NOTHING, 132, VARIANTS)
    beside = {(b.kind, b.variant) for _, b in made}
    reduces, gathers = (VARIANTS[kind] for kind in ("all_reduce", "all_gather"))
    expected = {("all_reduce", name) for name in reduces}
    assert beside == expected | {("all_gather", name) for name in gathers}
    assert {a.kind for a, _ in made} == {"gemm", "gemm_silu"}


def test_a_transport_without_sms_leaves_all_of_them_to_what_it_runs_beside():
    variants = {**VARIANTS, "all_reduce": ("nccl", "copy_engine")}
    made = network_pairs(GRAPH, NOTHING, 132, variants)
    free = [(a, b) for a, b in made if b.variant == "copy_engine"]
    assert all((a.num_sms, b.num_sms) == (132, 0) for a, b in free)
    assert [a.kind for a, _ in free] == ["gemm_silu", "gemm", "decode_attention"]
    (three,) = (t for t in network_triples(GRAPH, NOTHING, 132, 8, variants) if t[2].num_sms == 0)
    assert [point.num_sms for point in three] == [116, 16, 0]


def test_the_variant_is_the_fastest_at_the_nearest_measured_share():
    op = GRAPH.op("o_proj")

    def row(variant, share, us):
        point = Point(
            kind="gemm", shape=op.shape, variant=variant, tokens=1024, kv_len=0, num_sms=share
        )
        return row_of(point, us)

    rows = [
        row("cublas", 132, 100),
        row("triton_128x256", 132, 110),
        row("cublas", 64, 300),
        row("triton_128x256", 64, 200),
        replace(row("broken", 64, 1), error="failed"),
    ]
    fastest = Fastest(rows, VARIANTS)
    assert fastest.point(op, 1024, 0, 124).variant == "cublas"
    assert fastest.point(op, 1024, 0, 68).variant == "triton_128x256"
    assert fastest.point(GRAPH.op("kqv"), 1024, 0, 68).variant == "cublas"


def test_what_was_measured_in_other_variants_is_not_measured_again_but_each_transport_is():
    wanted = [*pairs(GRAPH, NOTHING, 132, 8), *network_pairs(GRAPH, NOTHING, 132, VARIANTS)]
    a, b = wanted[0]
    common = {"slowdown_a": 1.0, "slowdown_b": 1.0, "watts": 1.0, "sm_clock_mhz": 1.0, "n": 1}
    known = [PairRow(a=replace(a, variant="other"), b=b, **common)]
    assert len(left(wanted, known)) == len(left(wanted, [])) - 1
    a, b = wanted[-1]
    known = [PairRow(a=a, b=replace(b, variant="other"), **common)]
    assert len(left(wanted, known)) == len(left(wanted, []))


def test_jobs_take_turns():
    assert in_turn([[1, 2, 3], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]
