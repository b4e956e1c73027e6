from __future__ import annotations

import time
from dataclasses import replace

import pytest

from nanoflow_tune.autotune.cost_model import CostModel, mix_of_rows
from nanoflow_tune.autotune.power_model import FASTEST
from nanoflow_tune.autotune.roofline import roofline_us
from nanoflow_tune.profiler.profile import Profile
from nanoflow_tune.runtime.op_shapes import op_of_shape

from .fakes import MIX, SHARES, graph_of, h200, linear_profile

GRAPH = graph_of("llama3-8b")
PROFILE = linear_profile(GRAPH)
MODEL = CostModel(PROFILE, h200())
KQV = GRAPH.op("kqv")


def rows(tokens: float):
    return mix_of_rows("gemm", tokens, 0)


def test_measured_points_are_returned_exactly_and_say_so():
    by_shape = {op.shape + op.kind: op for op in GRAPH.layer}
    checked = 0
    for row in PROFILE.rows:
        op = by_shape.get(row.point.shape + row.point.kind)
        if op is None:
            continue
        mix = mix_of_rows(row.point.kind, row.point.tokens, row.point.kv_len)
        estimate = MODEL.estimate(op, mix, row.point.num_sms, row.point.variant)
        assert (estimate.us, estimate.source) == (row.median_us, "measured")
        checked += 1
    assert checked > 300


@pytest.mark.parametrize("tokens", [300, 700, 1280, 1900])
def test_between_token_counts_time_is_linear(tokens: int):
    estimate = MODEL.estimate(KQV, rows(tokens), 100, "cublas")
    low = max(t for t in (256, 512, 1024, 1536) if t <= tokens)
    high = min(t for t in (512, 1024, 1536, 2048) if t > tokens)
    ends = [MODEL.estimate(KQV, rows(t), 100, "cublas").us for t in (low, high)]
    weight = (tokens - low) / (high - low)
    assert estimate.us == pytest.approx((1 - weight) * ends[0] + weight * ends[1])
    assert estimate.source == "interpolated"


def test_between_shares_throughput_is_linear():
    below, at, above = (MODEL.estimate(KQV, rows(1024), n, "cublas").us for n in (84, 92, 100))
    assert 1 / at == pytest.approx((1 / below + 1 / above) / 2)


def test_outside_the_profile_the_utilisation_is_kept():
    edge = MODEL.estimate(KQV, rows(2048), 132, "cublas").us
    beyond = MODEL.estimate(KQV, rows(4096), 132, "cublas")
    ideal = [roofline_us(KQV, rows(n), 132, h200(), "bfloat16") for n in (2048, 4096)]
    assert beyond.us / ideal[1] == pytest.approx(edge / ideal[0])
    assert beyond.source == "interpolated"


def test_longer_contexts_take_longer_between_and_beyond_measured_lengths():
    op = GRAPH.op("decode_attention")
    times = [
        MODEL.estimate(op, replace(MIX, decode_context_tokens=kv), 64, "triton").us
        for kv in (256, 512, 640, 768, 1200, 2048, 4096)
    ]
    assert times == sorted(times)


def test_more_sms_never_take_longer_on_the_roofline():
    roofline = CostModel(None, h200())
    for op in GRAPH.layer:
        times = [roofline.best(op, MIX, share)[1].us for share in SHARES]
        assert times == sorted(times, reverse=True)


def test_an_unknown_shape_takes_the_utilisation_of_the_nearest_one():
    other = graph_of("qwen2-72b", 2).op("down")
    estimate = MODEL.estimate(other, rows(2048), 132, "cublas")
    twin = op_of_shape("gemm", GRAPH.op("up_gate").shape, 2)
    ideal = roofline_us(other, rows(2048), 132, h200(), "bfloat16")
    assert estimate.source == "interpolated"
    assert 0.5 < ideal / estimate.us < 0.9
    assert estimate.us > MODEL.estimate(twin, rows(2048), 132, "cublas").us


def test_a_kind_without_rows_falls_back_to_the_roofline_and_says_so():
    reduce = graph_of("llama2-70b", 2).op("attn_all_reduce")
    assert MODEL.variants(reduce, 16) == ("nccl",)
    assert MODEL.estimate(reduce, MIX, 16, "nccl").source == "roofline"


def test_no_rows_cost_nothing():
    empty = replace(MIX, decode_tokens=0.0)
    estimate = MODEL.estimate(GRAPH.op("decode_attention"), empty, 132, "triton")
    assert (estimate.us, estimate.joules) == (0.0, 0.0)


def test_measured_joules_are_used_and_others_come_from_the_energy_model():
    row = replace(PROFILE.rows[0], joules=1.5, joules_source="measured")
    model = CostModel(replace(PROFILE, rows=(row, *PROFILE.rows[1:])), h200())
    op = op_of_shape(row.point.kind, row.point.shape, 2)  # pyright: ignore[reportArgumentType]
    mix = mix_of_rows(row.point.kind, row.point.tokens, row.point.kv_len)
    assert model.estimate(op, mix, row.point.num_sms, row.point.variant).joules == 1.5
    estimate = MODEL.estimate(KQV, rows(2048), 132, "cublas")
    dynamic = 0.85e-12 * KQV.flops(rows(2048)) + 130e-12 * KQV.memory_bytes(rows(2048))
    assert estimate.joules == pytest.approx(dynamic + 117e-6 * estimate.us)


def test_slowdown_is_that_of_the_nearest_measured_shares_then_of_the_resource():
    decode, prefill = GRAPH.op("decode_attention"), GRAPH.op("prefill_attention")
    assert MODEL.slowdown(KQV, 100, decode, 32) == 1.08
    assert MODEL.slowdown(decode, 32, KQV, 100) == 1.10
    assert MODEL.slowdown(KQV, 112, decode, 16) == 1.05
    assert MODEL.slowdown(prefill, 100, decode, 32) == 1.08


def test_without_pairs_two_memory_bound_ops_share_the_bandwidth():
    model = CostModel(None, h200())
    decode, norm = GRAPH.op("decode_attention"), GRAPH.op("attn_norm")
    assert model.slowdown(decode, 66, norm, 66) == 2.0
    assert model.slowdown(decode, 16, norm, 16) == 1.0
    assert model.slowdown(KQV, 66, decode, 66) == 1.0


def test_failing_rows_are_ignored():
    bad = tuple(replace(row, error="out of memory", median_us=0.0) for row in PROFILE.rows)
    model = CostModel(Profile(hardware="h200", dtype="bfloat16", rows=bad), h200())
    assert model.estimate(KQV, rows(1024), 132, "cublas").source == "roofline"


def test_the_lm_head_sees_decode_rows_and_one_row_per_prompt():
    half = replace(MIX, decode_tokens=0.0)
    assert MODEL.iteration_overhead_us(GRAPH, half) < MODEL.iteration_overhead_us(GRAPH, MIX)


def test_thousands_of_estimates_take_less_than_a_second():
    model, began = CostModel(PROFILE, h200()), time.perf_counter()
    for tokens in range(1, 3001):
        model.estimate(KQV, rows(tokens), 100, "cublas")
    assert time.perf_counter() - began < 1


def test_variants_that_the_machine_lacks_are_not_chosen_but_estimated():
    op = GRAPH.op("decode_attention")
    rows = [
        replace(row, point=replace(row.point, variant="guest"), median_us=0.5 * row.median_us)
        for row in PROFILE.rows
        if row.point.kind == op.kind
    ]
    profile = replace(PROFILE, rows=(*PROFILE.rows, *rows))
    assert CostModel(profile, h200()).best(op, MIX, 132)[0] == "guest"
    costs = CostModel(profile, h200(), lacking=("guest",))
    assert costs.variants(op, 132) == ("triton",)
    assert costs.best(op, MIX, 132)[0] == "triton"
    assert costs.cheapest(op, MIX, (48, 132), costs.price(GRAPH, MIX))[0] == "triton"
    at_guest, at_home = (costs.estimate(op, MIX, 132, name).us for name in ("guest", "triton"))
    assert at_guest == pytest.approx(at_home / 2)


def test_the_cheapest_at_no_price_is_the_fastest():
    for op in GRAPH.layer:
        variant, estimate = MODEL.best(op, MIX, 100)
        assert MODEL.cheapest(op, MIX, (100,), FASTEST) == (variant, 100, estimate.us)
