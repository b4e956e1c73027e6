"""Operands that the profiler gives to kernels."""

from __future__ import annotations

import pytest
import torch

from nanoflow_tune.profiler.cases import CaseFactory
from nanoflow_tune.profiler.profile import Point
from nanoflow_tune.runtime.kernels import grouped_gemm, load, registry


def test_a_grouped_gemm_point_routes_every_token_to_that_many_experts(monkeypatch):
    seen = []
    recorder = registry.Variant(
        kind="grouped_gemm",
        name="torch",
        device_type="cpu",
        kernel=lambda *operands: seen.append(operands),
    )
    monkeypatch.setitem(registry._VARIANTS, ("grouped_gemm", "torch", "cpu"), recorder)
    point = Point(
        kind="grouped_gemm",
        variant="torch",
        shape="e8_t2_n32_k16",
        tokens=100,
        kv_len=0,
        num_sms=1,
    )
    for call in CaseFactory(torch.float32, torch.device("cpu"), 1e6).calls(point):
        call()
    x, weight, offsets, out, num_sms = seen[0]
    assert (tuple(x.shape), tuple(weight.shape)) == ((200, 16), (8, 32, 16))
    assert (tuple(out.shape), num_sms) == ((200, 32), 1)
    counts = offsets.diff(prepend=torch.zeros(1))
    assert int(offsets[-1]) == 200
    # A token goes to an expert once at most.
    assert bool((counts >= 0).all() and (counts <= 100).all())
    grouped_gemm.grouped_gemm(x, weight, offsets, out, num_sms)
    assert bool(out.isfinite().all())


def test_an_all_gather_point_has_the_columns_of_one_rank_and_the_whole_output(monkeypatch):
    seen = []
    recorder = registry.Variant(
        kind="all_gather",
        name="torch",
        device_type="cpu",
        kernel=lambda *operands: seen.append(operands),
    )
    monkeypatch.setitem(registry._VARIANTS, ("all_gather", "torch", "cpu"), recorder)
    point = Point(
        kind="all_gather", variant="symm_8", shape="d64_r4", tokens=7, kv_len=0, num_sms=8
    )
    calls = CaseFactory(torch.float32, torch.device("cpu"), 1e6).calls(point, "group")
    calls[0]()
    x, out, group, num_sms = seen[0]
    assert (tuple(x.shape), tuple(out.shape)) == ((7, 16), (7, 64))
    assert (group, num_sms) == ("group", 8)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("moe_router", "e8_t2_d16"),
        ("grouped_gemm_silu", "e8_t2_n64_k16"),
        ("grouped_gemm", "e8_t2_n16_k32"),
        ("moe_combine", "t2_d16"),
    ],
)
def test_points_of_experts_run_as_the_runtime_runs_them(kind, shape):
    load("cpu")
    point = Point(kind=kind, variant="torch", shape=shape, tokens=50, kv_len=0, num_sms=1)
    for call in CaseFactory(torch.float32, torch.device("cpu"), 1e6).calls(point):
        call()
