"""Every `gemm_silu` variant against float64: odd sizes, poisoned outputs, rows of its own only.

Needs a GPU; with TRITON_INTERPRET=1 the Triton SiLU also runs on a CPU with Triton installed.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.op_shapes import UNFUSED_PREFIXES  # noqa: E402

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


def kernels_by_name():
    """All registered variants; under the interpreter torch's GEMM and the Triton SiLU."""
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.kernels import gemm_silu, registry

    if INTERPRETED:
        from nanoflow_tune.runtime.kernels import torch_ops, triton_rows

        return {"torch": gemm_silu.gemm_then_silu(torch_ops.gemm, triton_rows.silu_mul)}
    kernels.load("cuda")
    names = registry.variants("gemm_silu", "cuda")
    return {name: registry.kernel("gemm_silu", name, "cuda") for name in names}


def guarded(num_rows, width):
    return torch.full((num_rows + 2, width), float("nan"), device=DEVICE, dtype=DTYPE)


@pytest.mark.parametrize("num_sms", [16, 100, 132])
@pytest.mark.parametrize("num_rows", [1, 70] if INTERPRETED else [1, 130, 333])
def test_gemm_silu_variants_match_float64(num_rows, num_sms):
    ffn, depth = (72, 96) if INTERPRETED else (576, 1024)
    x, weight = randn(num_rows, depth, seed=1), randn(2 * ffn, depth, seed=2) * depth**-0.5
    up, gate = (x.double() @ weight.double().T).chunk(2, dim=-1)
    reference = torch.nn.functional.silu(gate) * up
    for name, kernel in kernels_by_name().items():
        scratch, out = guarded(num_rows, 2 * ffn), guarded(num_rows, ffn)
        kernel(x, weight, scratch[1:-1], out[1:-1], num_sms)
        assert relative_error(out[1:-1], reference) < tolerance(), name
        for buffer in (scratch, out):
            assert bool(buffer[0].isnan().all() and buffer[-1].isnan().all()), name
        if not name.startswith(UNFUSED_PREFIXES):
            assert bool(scratch.isnan().all()), name
        again = guarded(num_rows, ffn)
        kernel(x, weight, scratch[1:-1], again[1:-1], num_sms)
        assert torch.equal(again[1:-1], out[1:-1]), name
