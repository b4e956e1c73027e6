"""Kernel variants. `load(device_type)` registers those of a device; nothing is imported before."""

from __future__ import annotations

import importlib

_MODULES = {
    "cpu": ("torch_ops",),
    "cuda": ("cublas", "triton_gemm", "triton_attention", "triton_rows", "collectives"),
}


def load(device_type: str) -> None:
    """Import the modules that register the variants of `cpu` or `cuda`."""
    for module in _MODULES[device_type]:
        importlib.import_module(f".{module}", __name__)
