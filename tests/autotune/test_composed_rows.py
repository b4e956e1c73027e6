"""Profiles from before `gemm_silu`: sums stand in, say so, and step back for measured rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.composed_rows import with_composed_rows
from nanoflow_tune.autotune.cost_model import CostModel, mix_of_rows
from nanoflow_tune.profiler.energy import with_fitted_joules
from nanoflow_tune.profiler.profile import EnergyModel, Point, Profile
from nanoflow_tune.profiler.store import shipped_profile

from .fakes import graph_of, h200, linear_profile, row_of

GEMM = Point(
    kind="gemm", shape="n28672_k4096", variant="cublas", tokens=2048, kv_len=0, num_sms=132
)
SILU = replace(GEMM, kind="silu_mul", shape="f14336", variant="triton")
ENERGY = EnergyModel(static_w=117.0, joules_per_flop=0.85e-12, joules_per_byte=130e-12)


def profile_of(*rows) -> Profile:
    return Profile(hardware="h200", dtype="bfloat16", rows=rows, energy=ENERGY)


def composed(profile: Profile):
    return [row for row in with_composed_rows(profile).rows if row.point.kind == "gemm_silu"]


def test_the_sum_of_two_rows_is_interpolated_not_measured():
    (row,) = composed(profile_of(row_of(GEMM, 600.0), row_of(SILU, 40.0)))
    assert row.point == replace(GEMM, kind="gemm_silu")
    assert (row.median_us, row.source, row.joules_source) == (640.0, "interpolated", "missing")


def test_joules_are_summed_and_called_fitted():
    gemm = replace(row_of(GEMM, 600.0), joules=0.5, joules_source="measured")
    silu = replace(row_of(SILU, 40.0), joules=0.03, joules_source="measured")
    (row,) = composed(profile_of(gemm, silu))
    assert (row.joules, row.joules_source) == (0.53, "fitted")


def test_fitted_joules_agree_with_the_cost_model_of_the_unfused_op():
    profile = profile_of(row_of(GEMM, 600.0), row_of(SILU, 40.0))
    op, mix = graph_of("llama3-8b").op("up_gate"), mix_of_rows("gemm", 2048, 0)
    fitted = CostModel(replace(profile, rows=with_fitted_joules(profile)), h200())
    modelled = CostModel(profile, h200())
    joules = [model.estimate(op, mix, 132, "cublas").joules for model in (fitted, modelled)]
    assert joules[0] == pytest.approx(joules[1], rel=1e-9)


@pytest.mark.parametrize(
    "change", [{"tokens": 1024}, {"num_sms": 100}, {"shape": "f28672"}], ids=str
)
def test_rows_of_other_points_are_not_added(change: dict[str, object]):
    other = replace(SILU, **change)  # pyright: ignore[reportArgumentType]
    assert not composed(profile_of(row_of(GEMM, 600.0), row_of(other, 40.0)))


def test_failed_rows_are_not_added():
    failed = replace(row_of(SILU, 0.0), error="out of memory")
    assert not composed(profile_of(row_of(GEMM, 600.0), failed))


def test_measured_rows_of_a_variant_are_all_there_is_of_it():
    measured = row_of(replace(GEMM, kind="gemm_silu", tokens=512), 200.0)
    other = row_of(replace(GEMM, variant="triton_128x256"), 590.0)
    rows = composed(profile_of(row_of(GEMM, 600.0), other, row_of(SILU, 40.0), measured))
    assert [(row.point.variant, row.median_us) for row in rows] == [
        ("cublas", 200.0),
        ("triton_128x256", 630.0),
    ]


def test_a_profile_without_silu_rows_is_left_alone():
    profile = linear_profile()
    assert with_composed_rows(profile) == profile


def test_composing_twice_adds_nothing():
    profile = shipped_profile("h200")
    assert profile is not None
    once = with_composed_rows(profile)
    assert with_composed_rows(once).rows == once.rows


def test_the_shipped_profile_prices_up_gate_at_every_measured_share():
    profile = shipped_profile("h200")
    assert profile is not None
    model, beside = CostModel(profile, h200()), graph_of("llama3-8b").op("decode_attention")
    for op in (graph_of("llama2-70b", 2).op("up_gate"),):  # the other file has the fused op
        assert "cublas" in model.variants(op, 132)
        for share in (64, 100, 132):
            estimate = model.estimate(op, mix_of_rows("gemm", 2048, 0), share, "cublas")
            plain = [
                row.median_us
                for row in profile.rows
                if (row.point.kind, row.point.variant)
                in (("gemm", "cublas"), ("silu_mul", "triton"))
                and row.point.shape in (op.shape, "f14336")
                and (row.point.tokens, row.point.num_sms) == (2048, share)
            ]
            assert estimate.us == pytest.approx(sum(plain))
            assert estimate.source == "interpolated"
    up_gate = graph_of("llama3-8b").op("up_gate")
    gemm = replace(up_gate, kind="gemm")
    assert min(model.slowdown(op, 84, beside, 48) for op in (up_gate, gemm)) > 1
