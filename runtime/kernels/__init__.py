"""Kernel variants. `load(group)` registers those of a group; nothing is imported before."""

from __future__ import annotations

import importlib

_MODULES = {
    "cpu": ("torch_ops", "grouped_gemm", "experts"),
    "cuda": (
        "cublas",
        "sm90_gemm",
        "sm90_attention",
        "triton_gemm",
        "triton_attention",
        "triton_rows",
        "flashinfer_attention",
        "grouped_gemm",
        "triton_grouped_gemm",
        "experts",
        "triton_experts",
        "collectives",
        "all_gather",
    ),
}


def load(group: str) -> None:
    """Import the modules that register the variants of `cpu` or `cuda`."""
    for module in _MODULES[group]:
        importlib.import_module(f".{module}", __name__)
    if group == "cuda":
        from .gemm_silu import register_unfused
        from .triton_rows import silu_mul

        register_unfused("cuda", silu_mul)  # last: it composes the GEMMs that are there
