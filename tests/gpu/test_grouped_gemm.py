"""Grouped GEMM variants against float64, poisoned outputs; equal bits in CUDA graphs.

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


def variants():
    from nanoflow_tune.runtime.kernels.triton_grouped_gemm import TILES, variant_name

    names = [variant_name(tile) for tile in TILES]
    return names if INTERPRETED else ["torch_grouped", *names]


def kernel(name):
    from nanoflow_tune.runtime.kernels import registry

    return registry.kernel("grouped_gemm", name, "cuda")


def operands(counts, width, depth):
    x = randn(sum(counts), depth, seed=7)
    weight = randn(len(counts), width, depth, seed=8)
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    parts = x.double().split(counts)
    reference = [part @ one.T for part, one in zip(parts, weight.double(), strict=True)]
    return x, weight, offsets, torch.cat(reference)


# Rows of each expert: none at the start, in the middle, at the end; one; whole tiles; one more.
COUNTS = [
    [0, 5, 0, 0, 64, 65, 1, 0],
    [128, 128],
    [300],
    [0, 0, 0, 7],
    [129, 1, 0, 127, 256, 3, 2, 1],
]


@pytest.mark.parametrize("num_sms", [1, 16, 132])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_row_meets_the_weights_of_its_expert(counts, num_sms):
    # Neither width nor depth is a multiple of a tile's.
    width, depth = (328, 72) if INTERPRETED else (1160, 1000)
    x, weight, offsets, reference = operands(counts, width, depth)
    for name in variants():
        out = torch.full((x.shape[0] + 2, width), float("nan"), device=DEVICE, dtype=DTYPE)
        kernel(name)(x, weight, offsets, out[1:-1], num_sms)
        assert relative_error(out[1:-1], reference) < tolerance(), name
        assert bool(out[0].isnan().all() and out[-1].isnan().all()), name


@pytest.mark.parametrize("num_sms", [16, 132])
def test_a_silu_behind_it_gives_up_times_silu_of_gate(num_sms):
    from nanoflow_tune.runtime.kernels import gemm_silu, registry
    from nanoflow_tune.runtime.kernels.triton_rows import silu_mul

    variants()  # registers them
    gemm_silu.register_unfused("cuda", silu_mul)
    x, weight, offsets, products = operands([0, 5, 60, 1], 2 * 88, 72)
    products = products.to(DTYPE).double()  # as the scratch buffer holds them
    expected = products[:, 88:] * products[:, 88:].sigmoid() * products[:, :88]
    for name in variants():
        scratch, out = (
            torch.full((x.shape[0], n), float("nan"), device=DEVICE, dtype=DTYPE)
            for n in (2 * 88, 88)
        )
        run = registry.kernel("grouped_gemm_silu", name, "cuda")
        run(x, weight, offsets, scratch, out, num_sms)
        assert relative_error(out, expected) < tolerance(), name


def test_no_rows_launch_nothing():
    x, weight, offsets, _ = operands([0, 0], 64, 64)
    out = torch.empty(0, 64, device=DEVICE, dtype=DTYPE)
    for name in variants():
        if name != "torch_grouped":
            kernel(name)(x, weight, offsets, out, 8)


def test_weights_with_gaps_between_experts_are_refused():
    x, _, offsets, _ = operands([4, 4], 64, 64)
    weight = randn(2, 128, 64)[:, :64]
    out = torch.empty(8, 64, device=DEVICE, dtype=DTYPE)
    name = variants()[-1]
    with pytest.raises(ValueError, match="without gaps"):
        kernel(name)(x, weight, offsets, out, 8)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_replay_follows_the_routing_of_its_time_and_every_share_gives_the_same_bits():
    width, depth = 1024, 512
    x, weight, offsets, reference = operands([100, 0, 300, 112], width, depth)
    other = torch.tensor([0, 256, 256, 512], dtype=torch.int32, device=DEVICE)
    parts = x.double().split([0, 256, 0, 256])
    other_reference = torch.cat([a @ b.T for a, b in zip(parts, weight.double(), strict=True)])
    for name in variants():
        out = torch.empty(512, width, device=DEVICE, dtype=DTYPE)
        kernel(name)(x, weight, offsets, out, 132)
        eager = out.clone()
        routed = offsets.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel(name)(x, weight, routed, out, 20)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager), name
        assert relative_error(out, reference) < tolerance(), name
        routed.copy_(other)
        graph.replay()
        assert relative_error(out, other_reference) < tolerance(), name
