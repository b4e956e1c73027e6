"""The grouped GEMM of the CPU, and what grouped GEMMs refuse."""

from __future__ import annotations

import pytest
import torch

from nanoflow_tune.runtime.kernels import grouped_gemm as module
from nanoflow_tune.runtime.kernels import registry


def operands(counts, width=24, depth=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    rows = sum(counts)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    weight = torch.randn(len(counts), width, depth, generator=generator).to(dtype)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    reference = torch.einsum("tk,tnk->tn", x.double(), weight.double()[owners])
    return x, weight, offsets, reference


@pytest.mark.parametrize("counts", [[3, 4, 5], [0, 7, 0, 2], [0, 0, 1], [5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_meets_the_weights_of_its_expert(counts, dtype):
    x, weight, offsets, reference = operands(counts, dtype=dtype)
    out = torch.full((x.shape[0] + 2, weight.shape[1]), float("nan"), dtype=dtype)
    registry.kernel("grouped_gemm", "torch", "cpu")(x, weight, offsets, out[1:-1], 4)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (out[1:-1].double() - reference).norm() <= tolerance * reference.norm()
    assert bool(out[0].isnan().all() and out[-1].isnan().all())


def test_a_layer_of_one_expert_is_a_gemm():
    x, weight, offsets, _ = operands([9])
    out = torch.empty(9, 24)
    module.grouped_gemm(x, weight, offsets, out, 0)
    torch.testing.assert_close(out, x @ weight[0].T)


@pytest.mark.parametrize("offsets", [[4, 3, 12], [4, 8, 13], [-1, 8, 12]], ids=str)
def test_offsets_that_fall_or_leave_the_rows_are_refused(offsets):
    x, weight, _, _ = operands([3, 4, 5])
    with pytest.raises(ValueError, match="cumulative sum of each expert's rows"):
        module.grouped_gemm(x, weight, torch.tensor(offsets), torch.empty(12, 24), 0)


def test_rows_that_tma_cannot_address_are_refused():
    x, weight, _, _ = operands([3, 4], depth=20, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"multiple of 16 bytes.*\(20, 1\)"):
        module.check_alignment(x)
    with pytest.raises(ValueError, match="contiguous rows"):
        module.check_alignment(weight.transpose(1, 2))


def test_shape_and_costs_of_a_grouped_gemm_follow_the_routed_rows():
    from nanoflow_tune.runtime.op_graph import RowMix
    from nanoflow_tune.runtime.op_shapes import op_of_shape

    op = op_of_shape("grouped_gemm", "e8_t2_n28672_k4096", 2)
    mix = RowMix(
        decode_tokens=512, prefill_tokens=512, decode_context_tokens=0, prefill_context_tokens=0
    )
    assert op.flops(mix) == 2 * 28672 * 4096 * 2 * 1024
    assert op.memory_bytes(mix) == 2 * (8 * 28672 * 4096 + 2 * (28672 + 4096) * 1024)
