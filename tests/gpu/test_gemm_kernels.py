"""GEMM variants against float64, poisoned outputs.

Needs a GPU; with TRITON_INTERPRET=1 the Triton ones also run on a CPU with Triton installed.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from .kernel_reference import (  # noqa: E402
    DEVICE,
    DTYPE,
    INTERPRETED,
    MARKS,
    randn,
    relative_error,
    tolerance,
)

pytestmark = MARKS


def gemm_variants():
    from nanoflow_tune.runtime.kernels.triton_gemm import TILES

    names = [tile.name for tile in TILES]
    return names if INTERPRETED else ["cublas", *names]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_sms", [16, 100, 132])
def test_gemm_variants_match_float64(num_sms, has_bias):
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.kernels import registry

    if not INTERPRETED:
        kernels.load("cuda")
    rows, width, depth = (70, 130, 96) if INTERPRETED else (330, 1160, 1024)
    x, weight = randn(rows, depth, seed=7), randn(width, depth, seed=8)
    if INTERPRETED:
        width = 132
        weight = randn(width, depth, seed=8)
    bias = randn(width, seed=9) if has_bias else None
    reference = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for name in gemm_variants():
        buffer = torch.full((rows + 2, width), float("nan"), device=DEVICE, dtype=DTYPE)
        registry._VARIANTS["gemm", name, "cuda"].kernel(x, weight, bias, buffer[1:-1], num_sms)
        assert relative_error(buffer[1:-1], reference) < tolerance(), name
        assert bool(buffer[0].isnan().all() and buffer[-1].isnan().all()), name
