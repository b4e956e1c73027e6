"""Experts by PyTorch: router, grouped up/gate and down, combine, against one row at a time."""

from __future__ import annotations

import pytest
import torch

from nanoflow_tune.runtime.kernels import gemm_silu, load, registry

SHAPES = [(1, 8, 2), (9, 4, 1), (64, 8, 2), (30, 5, 5)]
"""Rows, experts, experts of a row."""


def one_after_another(x_TD, router_ED, up_gate_E2FD, down_EDF, per_token):
    """In float64, row by row."""
    out_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for row, x_D in enumerate(x_TD.double()):
        best = (router_ED.double() @ x_D).topk(per_token)
        for weight, expert in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
            up_F, gate_F = (up_gate_E2FD[expert].double() @ x_D).chunk(2)
            act_F = torch.nn.functional.silu(gate_F) * up_F
            out_TD[row] += weight * (down_EDF[expert].double() @ act_F)
    return out_TD


@pytest.mark.parametrize(("rows", "experts", "per_token"), SHAPES)
def test_a_layer_of_the_four_ops_is_a_mixture_of_experts(rows, experts, per_token):
    load("cpu")
    hidden, ffn = 12, 20
    generator = torch.Generator().manual_seed(rows)
    x, router = (torch.randn(n, hidden, generator=generator) for n in (rows, experts))
    up_gate = torch.randn(experts, 2 * ffn, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(experts, hidden, ffn, generator=generator) * ffn**-0.5
    routed_rows = rows * per_token
    routed, scratch, act, results, out = (
        torch.full((n, width), float("nan"))
        for n, width in (
            (routed_rows, hidden),
            (routed_rows, 2 * ffn),
            (routed_rows, ffn),
            (routed_rows, hidden),
            (rows, hidden),
        )
    )
    offsets = torch.full((experts,), -1, dtype=torch.int32)
    places = torch.full((rows, per_token), -1, dtype=torch.int32)
    weights = torch.full((rows, per_token), float("nan"))
    kinds = ("moe_router", "grouped_gemm_silu", "grouped_gemm", "moe_combine")
    route, grouped_silu, grouped, combine = (registry.kernel(k, "torch", "cpu") for k in kinds)
    route(x, router, routed, offsets, places, weights, 1)
    grouped_silu(routed, up_gate, offsets, scratch, act, 1)
    grouped(act, down, offsets, results, 1)
    combine(results, places, weights, out, 1)
    expected = one_after_another(x, router, up_gate, down, per_token)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_every_grouped_gemm_of_a_device_gets_a_silu(monkeypatch):
    calls = []
    for name in ("tile_a", "tile_b"):
        made = registry.Variant(
            kind="grouped_gemm",
            name=name,
            device_type="cuda",
            kernel=lambda *operands, name=name: calls.append((name, *operands)),
        )
        monkeypatch.setitem(registry._VARIANTS, ("grouped_gemm", name, "cuda"), made)
    known = dict(registry._VARIANTS)
    monkeypatch.setattr(registry, "_VARIANTS", known)
    gemm_silu.register_unfused("cuda", lambda scratch, out: calls.append(("silu", scratch, out)))
    registry.kernel("grouped_gemm_silu", "tile_b", "cuda")("x", "w", "ends", "scratch", "out", 16)
    assert calls == [
        ("tile_b", "x", "w", "ends", "scratch", 16),
        ("silu", "scratch", "out"),
    ]
