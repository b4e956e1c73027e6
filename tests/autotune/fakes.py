"""Small stand-ins for what a machine would give: a made-up profile of an H200-like card."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from nanoflow_tune.autotune.cost_model import mix_of_rows
from nanoflow_tune.autotune.roofline import roofline_us
from nanoflow_tune.profiler.profile import EnergyModel, PairRow, Point, Profile, Row
from nanoflow_tune.runtime.op_graph import GEMM_KINDS, OpGraph, RowMix
from nanoflow_tune.runtime.op_shapes import op_of_shape, shape_numbers
from nanoflow_tune.search_spaces.loader import load_hardware, load_model
from nanoflow_tune.search_spaces.schema import HardwareSpec, SearchSpace

TOKENS = (256, 512, 1024, 1536, 2048)
SHARES = (16, 32, 48, 64, 68, 84, 100, 116, 132)
KV_LENS = {"decode_attention": (512, 768, 2048), "prefill_attention": (512, 1024, 2048)}
GEMMS = {"cublas": (128, 256, 0.70), "triton_128x128": (128, 128, 0.64)}
VARIANTS = {
    "gemm": GEMMS,
    "gemm_silu": GEMMS,
    "all_reduce": {"nccl": (1, 1, 0.5)},
}
MIX = RowMix(
    decode_tokens=1024,
    prefill_tokens=1024,
    decode_context_tokens=768,
    prefill_context_tokens=256.5,
)


def h200() -> HardwareSpec:
    return load_hardware("h200")


def graph_of(model: str, tp_degree: int = 1) -> OpGraph:
    return OpGraph.build(load_model(model), tp_degree)


def quick_space(**changes: object) -> SearchSpace:
    fields: dict[str, object] = {
        "name": "test",
        "dense_batch_tokens": (2048,),
        "token_granularity": 256,
        "max_nano_batches": 2,
        "row_orders": ("decodes_first", "interleaved"),
        "sm_shares": (16, 32, 48, 64, 68, 84, 100, 116),
        "network_sm_shares": (16,),
        "milp_time_limit_s": 6.0,
        "milp_relative_gap": 0.01,
        "simulator_trials": 20,
        "hardware_trials": 4,
    }
    return SearchSpace(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def fake_us(point: Point, hardware: HardwareSpec) -> float:
    """Roofline over an efficiency; GEMMs in whole waves of tiles."""
    op = op_of_shape(point.kind, point.shape, 2)  # pyright: ignore[reportArgumentType]
    mix = mix_of_rows(point.kind, point.tokens, point.kv_len)
    ideal_us = roofline_us(op, mix, point.num_sms, hardware, "bfloat16")
    default = (1, 1, 0.85)
    rows, columns, efficiency = VARIANTS.get(point.kind, {}).get(point.variant, default)
    if point.kind not in GEMM_KINDS:
        return 2.0 + ideal_us / efficiency
    n, _ = shape_numbers(op.shape)
    tiles = ceil(point.tokens / rows) * ceil(n / columns)
    wave_loss = ceil(tiles / point.num_sms) * point.num_sms / tiles
    return 2.0 + ideal_us * (0.5 + 0.5 * wave_loss) / efficiency


def linear_profile(*graphs: OpGraph, has_pairs: bool = True) -> Profile:
    """A plausible profile of these graphs' shapes on every share."""
    hardware = h200()
    ops = {
        (op.kind, op.shape)
        for graph in graphs or (graph_of("llama3-8b"),)
        for op in (*graph.prologue, *graph.layer, *graph.epilogue)
    }
    rows: list[Row] = []
    for kind, shape in sorted(ops):
        for variant in VARIANTS.get(kind, {"triton": None}):
            for kv_len in KV_LENS.get(kind, (0,)):
                for tokens in TOKENS:
                    for num_sms in SHARES:
                        point = Point(
                            kind=kind,
                            shape=shape,
                            variant=variant,
                            tokens=tokens,
                            kv_len=kv_len,
                            num_sms=num_sms,
                        )
                        rows.append(row_of(point, fake_us(point, hardware)))
    return Profile(
        hardware="h200",
        dtype="bfloat16",
        rows=tuple(rows),
        pairs=_pairs() if has_pairs else (),
        energy=EnergyModel(static_w=117.0, joules_per_flop=0.85e-12, joules_per_byte=130e-12),
    )


def row_of(point: Point, us: float) -> Row:
    return Row(
        point=point,
        median_us=us,
        p10_us=0.98 * us,
        p90_us=1.02 * us,
        n=30,
        joules=0.0,
        joules_source="missing",
        sm_clock_mhz=1600.0,
        watts=690.0,
    )


def reduce_profile(
    graph: OpGraph,
    *,
    nccl_us_per_row: float,
    copy_us_per_row: float,
    slowdown_beside_copies: float | None = None,
) -> Profile:
    """`linear_profile` with all-reduces of these times: NCCL on SMs, copy engines on none."""
    profile = linear_profile(graph)
    shape = graph.op("attn_all_reduce").shape
    fixed = {"kind": "all_reduce", "shape": shape, "kv_len": 0}
    rows = [row for row in profile.rows if row.point.kind != "all_reduce"]
    for tokens in TOKENS:
        for num_sms in (8, 16, 32, 132):
            nccl = Point(**fixed, variant="nccl", tokens=tokens, num_sms=num_sms)  # pyright: ignore
            rows.append(row_of(nccl, 5 + nccl_us_per_row * tokens))
        free = Point(**fixed, variant="copy_engine", tokens=tokens, num_sms=0)  # pyright: ignore
        rows.append(row_of(free, 5 + copy_us_per_row * tokens))
    pairs = profile.pairs
    if slowdown_beside_copies is not None:
        op = graph.op("up_gate")
        gemm = Point(
            kind=op.kind, shape=op.shape, variant="cublas", tokens=1024, kv_len=0, num_sms=132
        )
        free = Point(**fixed, variant="copy_engine", tokens=1024, num_sms=0)  # pyright: ignore
        pairs = (*pairs, _pair(gemm, free, slowdown_beside_copies, slowdown_beside_copies))
    return replace(profile, rows=tuple(rows), pairs=pairs)


def _pairs() -> tuple[PairRow, ...]:
    gemm = {"kind": "gemm", "shape": "n28672_k4096", "variant": "cublas", "tokens": 2048}
    decode = {"kind": "decode_attention", "shape": "q32_kv8_d128", "variant": "triton"}
    reduce = {"kind": "all_reduce", "shape": "d8192_r2", "variant": "nccl", "tokens": 1024}
    measured = [(100, 32, 1.08, 1.10), (84, 48, 1.10, 1.12), (116, 16, 1.05, 1.08)]
    rows = [
        _pair(
            Point(**gemm, kv_len=0, num_sms=a),
            Point(**decode, tokens=512, kv_len=768, num_sms=b),
            slow_a,
            slow_b,
        )
        for a, b, slow_a, slow_b in measured
    ]
    beside = Point(**gemm, kv_len=0, num_sms=116), Point(**reduce, kv_len=0, num_sms=16)
    return (*rows, _pair(*beside, 1.03, 1.15))


def _pair(a: Point, b: Point, slowdown_a: float, slowdown_b: float) -> PairRow:
    return PairRow(
        a=a,
        b=b,
        slowdown_a=slowdown_a,
        slowdown_b=slowdown_b,
        watts=500.0,  # below the cap, so that the clocks stay
        sm_clock_mhz=1500.0,
        n=20,
    )
