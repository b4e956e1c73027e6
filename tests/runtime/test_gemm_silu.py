"""Unfused `gemm_silu` variants: composed of what is registered, and only where none is."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nanoflow_tune.runtime.kernels import load, registry, torch_ops
from nanoflow_tune.runtime.kernels.gemm_silu import gemm_then_silu, register_unfused
from nanoflow_tune.runtime.op_shapes import UNFUSED_PREFIXES


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    load("cpu")
    if importlib.util.find_spec("triton"):
        load("cuda")  # now: modules register once, and what a test changes is taken back
    monkeypatch.setattr(registry, "_VARIANTS", dict(registry._VARIANTS))


def silu_mul(up_gate_T2F, out_TF):
    up_TF, gate_TF = up_gate_T2F.chunk(2, dim=-1)
    out_TF.copy_(torch.nn.functional.silu(gate_TF) * up_TF)


@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_a_composed_variant_computes_what_the_torch_variant_does(num_rows):
    x, weight = torch.randn(num_rows, 8), torch.randn(12, 8)
    outs = []
    for kernel in (gemm_then_silu(torch_ops.gemm, silu_mul), torch_ops.gemm_silu):
        scratch, out = torch.full((num_rows, 12), torch.nan), torch.full((num_rows, 6), torch.nan)
        kernel(x, weight, scratch, out, 16)
        outs.append(out)
    torch.testing.assert_close(*outs)


def test_the_gemm_is_told_the_share_and_no_bias():
    calls = []

    def gemm(x_TK, weight_NK, bias_N, out_TN, num_sms):
        calls.append((bias_N, num_sms))
        torch_ops.gemm(x_TK, weight_NK, bias_N, out_TN, num_sms)

    operands = torch.randn(3, 8), torch.randn(12, 8), torch.empty(3, 12), torch.empty(3, 6)
    gemm_then_silu(gemm, silu_mul)(*operands, 100)
    assert calls == [(None, 100)]


def test_every_gemm_gets_a_variant_and_none_is_replaced():
    def fused(x_TK, weight_2FK, scratch_T2F, out_TF, num_sms):
        """Takes the name of a GEMM."""

    for name in ("tile_a", "tile_b"):
        registry.register("gemm", name, "cuda")(torch_ops.gemm)
    registry.register("gemm_silu", "tile_b", "cuda")(fused)
    torch_variant = registry.kernel("gemm_silu", "torch", "cuda")
    for _ in range(2):  # a later group of kernels composes again
        register_unfused("cuda", silu_mul)
    names = registry.variants("gemm_silu", "cuda")
    assert {"tile_a", "tile_b", "torch"} <= set(names)
    assert len(set(names)) == len(names)
    assert registry.kernel("gemm_silu", "tile_b", "cuda") is fused
    assert registry.kernel("gemm_silu", "torch", "cuda") is torch_variant
    assert registry.variants("gemm_silu", "cpu") == ("torch",)


def test_names_tell_fused_from_unfused_variants():
    pytest.importorskip("triton")
    load("cuda")
    for name in registry.variants("gemm_silu", "cuda"):
        kernel = registry.kernel("gemm_silu", name, "cuda")
        is_unfused = kernel is torch_ops.gemm_silu or "gemm_then_silu" in kernel.__qualname__
        assert name.startswith(UNFUSED_PREFIXES) == is_unfused, name
    assert set(registry.variants("gemm", "cuda")) <= set(registry.variants("gemm_silu", "cuda"))
