"""Compiling ahead: the tiles found are those that the executor's launches will ask for."""

from __future__ import annotations

from nanoflow_tune.profiler.compile_ahead import fitted_tiles, point_tiles
from nanoflow_tune.profiler.profile import Point
from nanoflow_tune.runtime.kernels.gemm_tiles import fitted_tile
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule
from nanoflow_tune.search_spaces.loader import load_model


def test_each_share_rows_and_epilogue_has_its_tile_and_other_variants_none():
    graph = OpGraph.build(load_model("llama3-8b"), 1)
    batches = tuple(
        NanoBatch(tokens=tokens, decode_tokens=0) for tokens in ((0, 1536), (1536, 2048))
    )

    def nano_op(op, tokens, num_sms, variant):
        return NanoOp(op=op, tokens=tokens, lane="compute", num_sms=num_sms, variant=variant)

    schedule = Schedule(
        name="x",
        nano_batches=batches,
        nano_ops=(
            nano_op("attn_norm", (0, 2048), 132, "triton"),
            nano_op("kqv", (0, 1536), 108, "sm90"),
            nano_op("kqv", (1536, 2048), 132, "cublas"),
            nano_op("up_gate", (0, 1536), 116, "sm90_c2"),
            nano_op("down", (0, 1536), 108, "sm90_256"),
        ),
    )
    assert fitted_tiles([schedule, schedule], graph) == {
        (fitted_tile(1536, 6144, 4096, 108), False),
        (fitted_tile(1536, 28672, 4096, 116, cluster=2, has_silu=True), True),
        (fitted_tile(1536, 4096, 14336, 108, tile_rows=256), False),
    }


def test_points_have_the_same_tiles_and_attention_none():
    gemm = Point(
        kind="gemm_silu", shape="n28672_k4096", variant="sm90", tokens=512, kv_len=0, num_sms=100
    )
    attention = Point(
        kind="decode_attention",
        shape="q32_kv8_d128",
        variant="sm90",
        tokens=512,
        kv_len=1024,
        num_sms=16,
    )
    assert point_tiles([gemm, attention, gemm]) == {
        (fitted_tile(512, 28672, 4096, 100, has_silu=True), True)
    }
