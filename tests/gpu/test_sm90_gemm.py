"""Hopper's own GEMMs against float64: odd sizes, every share, poisoned outputs, equal bits."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

# (rows, columns, depth): one row, no multiple of a tile in any dimension, one k-step, fewer tiles
# than SMs, several waves, a width that is a whole number of every tile.
SHAPES = [
    (1, 256, 64),
    (200, 784, 328),
    (129, 1008, 40),
    (512, 4096, 4096),
    (640, 1280, 512),
    (1000, 6144, 1024),
    (2048, 5120, 512),
]
SHARES = [8, 20, 100, 124, 132]


@pytest.fixture(params=["sm90", "sm90_256", "sm90_c2", "sm90_pp", "sm90_pp_c2", "sm90_sk"])
def variant(request):
    from nanoflow_tune.runtime import kernels

    kernels.load("cuda")
    return request.param


def operands(shape):
    rows, columns, depth = shape
    generator = torch.Generator(device="cuda").manual_seed(sum(shape))

    def normal(*size, scale=1.0):
        x = torch.empty(*size, dtype=torch.bfloat16, device="cuda")
        return x.normal_(0, scale, generator=generator)

    return normal(rows, depth), normal(columns, depth, scale=depth**-0.5), normal(columns)


def guarded(rows, columns):
    """NaN everywhere, with 16 rows before and after what a kernel may write."""
    buffer = torch.full((rows + 32, columns), float("nan"), dtype=torch.bfloat16, device="cuda")
    return buffer, buffer[16 : 16 + rows]


def relative_error(out, reference):
    return float((out.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("num_sms", SHARES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemm_matches_float64_and_writes_nothing_else(variant, shape, num_sms):
    from nanoflow_tune.runtime.kernels.registry import kernel

    x, weight, bias = operands(shape)
    reference = x.double() @ weight.double().T
    for added in (None, bias):
        outs = []
        for _ in range(2):
            buffer, out = guarded(shape[0], shape[1])
            kernel("gemm", variant, "cuda")(x, weight, added, out, num_sms)
            expected = reference if added is None else reference + added.double()
            assert relative_error(out, expected) < 4e-3
            assert bool(buffer[:16].isnan().all() and buffer[16 + shape[0] :].isnan().all())
            outs.append(out)
        assert torch.equal(*outs), "a repeat must give equal bits"


@pytest.mark.parametrize("num_sms", SHARES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_epilogue_matches_float64(variant, shape, num_sms):
    from nanoflow_tune.runtime.kernels.registry import kernel

    x, weight, _ = operands(shape)
    up, gate = (x.double() @ weight.double().T).chunk(2, dim=-1)
    buffer, out = guarded(shape[0], shape[1] // 2)
    kernel("gemm_silu", variant, "cuda")(x, weight, None, out, num_sms)
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < 6e-3
    assert bool(buffer[:16].isnan().all() and buffer[16 + shape[0] :].isnan().all())


def test_no_rows_is_no_launch(variant):
    from nanoflow_tune.runtime.kernels.registry import kernel

    x, weight, _ = operands((1, 256, 64))
    kernel("gemm", variant, "cuda")(x[:0], weight, None, x.new_empty(0, 256), 132)
    torch.cuda.synchronize()


def test_a_graph_on_a_partition_repeats_the_eager_bits(variant):
    from nanoflow_tune.runtime.kernels.registry import kernel
    from nanoflow_tune.runtime.partition_layout import GroupRange
    from nanoflow_tune.runtime.sm_partition import SmPartitions

    x, weight, _ = operands((640, 4096, 2048))
    stream = SmPartitions(132, 8).stream_of(GroupRange(start=0, end=8))
    eager = torch.full((640, 4096), float("nan"), dtype=torch.bfloat16, device="cuda")
    out = torch.full_like(eager, float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        kernel("gemm", variant, "cuda")(x, weight, None, eager, 64)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kernel("gemm", variant, "cuda")(x, weight, None, out, 64)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, eager)


def test_rows_that_tma_cannot_address_are_refused(variant):
    from nanoflow_tune.runtime.kernels.registry import kernel

    x, weight, _ = operands((16, 256, 64))
    with pytest.raises(ValueError, match=r"`out` must start each row at a multiple of 16 bytes"):
        kernel("gemm", variant, "cuda")(x, weight[:252], None, x.new_empty(16, 252), 132)
