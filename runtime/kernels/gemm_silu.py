"""Unfused variants of `gemm_silu` and of the grouped one: any GEMM, then SiLU x up from scratch.

Two launches on one stream, as one nano-op: what a fused epilogue has to beat. Each is named like
its GEMM; a kernel that registers a `gemm_silu` variant of that name itself takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import registry

SiluMul = Callable[[Tensor, Tensor], None]
"""(up_gate_T2F, out_TF): out_TF = silu(gate) * up."""


def gemm_then_silu(gemm: registry.Gemm, silu_mul: SiluMul) -> registry.GemmSilu:
    """The `gemm_silu` kernel that launches the two one after the other."""

    def gemm_silu(
        x_TK: Tensor, weight_2FK: Tensor, scratch_T2F: Tensor, out_TF: Tensor, num_sms: int
    ) -> None:
        gemm(x_TK, weight_2FK, None, scratch_T2F, num_sms)
        silu_mul(scratch_T2F, out_TF)

    return gemm_silu


def grouped_gemm_then_silu(
    grouped_gemm: registry.GroupedGemm, silu_mul: SiluMul
) -> registry.GroupedGemmSilu:
    """The `grouped_gemm_silu` kernel that launches the two one after the other."""

    def grouped_gemm_silu(
        x_TK: Tensor,
        weight_E2FK: Tensor,
        offsets_E: Tensor,
        scratch_T2F: Tensor,
        out_TF: Tensor,
        num_sms: int,
    ) -> None:
        grouped_gemm(x_TK, weight_E2FK, offsets_E, scratch_T2F, num_sms)
        silu_mul(scratch_T2F, out_TF)

    return grouped_gemm_silu


def register_unfused(device_type: str, silu_mul: SiluMul) -> None:
    """Make each GEMM variant of a device one with SiLU too, where none of its name exists."""
    known = registry.variants("gemm_silu", device_type)
    for name in registry.variants("gemm", device_type):
        if name not in known:
            gemm = registry.kernel("gemm", name, device_type)
            registry.register("gemm_silu", name, device_type)(gemm_then_silu(gemm, silu_mul))
    known = registry.variants("grouped_gemm_silu", device_type)
    for name in registry.variants("grouped_gemm", device_type):
        if name not in known:
            grouped = registry.kernel("grouped_gemm", name, device_type)
            unfused = grouped_gemm_then_silu(grouped, silu_mul)
            registry.register("grouped_gemm_silu", name, device_type)(unfused)
