"""GEMM variants against float64, poisoned outputs; equal bits in CUDA graphs.

Needs a GPU; with TRITON_INTERPRET=1 the Triton ones also run on a CPU with Triton installed.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.kernels.registry import HeadShape  # noqa: E402

from .kernel_reference import (  # noqa: E402
    DEVICE,
    DTYPE,
    INTERPRETED,
    MARKS,
    decode_operands,
    randn,
    relative_error,
    tolerance,
)

pytestmark = MARKS


def gemm_variants():
    from nanoflow_tune.runtime.kernels.triton_gemm import TILES
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import VARIANTS

    names = [*(tile.name for tile in TILES), *VARIANTS]
    return names if INTERPRETED else ["cublas", *names]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_sms", [16, 100, 132])
def test_gemm_variants_match_float64(num_sms, has_bias):
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.kernels import registry

    if not INTERPRETED:
        kernels.load("cuda")
        kernels.load("experimental")
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


# (rows, width, depth): one tile; fewer tiles than SMs; more, with and without a rest; a depth that
# is no multiple of a tile's; a rest of one tile; a single k-step.
SPLITK_SHAPES = [
    (1, 8, 64),
    (70, 136, 1096),
    (300, 712, 640),
    (260, 1024, 200),
    (640, 256, 512),
    (130, 264, 40),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("num_sms", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("shape", SPLITK_SHAPES, ids=str)
def test_splitk_gemm_matches_float64_and_repeats_its_bits(shape, num_sms):
    from nanoflow_tune.runtime.kernels import registry
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import VARIANTS

    rows, width, depth = shape
    x, weight = randn(rows, depth, seed=7), randn(width, depth, seed=8)
    bias = randn(width, seed=9) if num_sms % 2 else None
    reference = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for name in VARIANTS:
        outs = []
        for _ in range(2):
            out = torch.full((rows + 2, width), float("nan"), device=DEVICE, dtype=DTYPE)
            registry._VARIANTS["gemm", name, "cuda"].kernel(x, weight, bias, out[1:-1], num_sms)
            assert bool(out[0].isnan().all() and out[-1].isnan().all()), name
            outs.append(out[1:-1])
        assert relative_error(outs[0], reference) < tolerance(), name
        assert torch.equal(outs[0], outs[1]), name


def test_every_k_step_belongs_to_one_program_and_shares_are_equal():
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import Division

    for tiles, steps, num_sms in [
        (256, 64, 124),
        (256, 224, 132),
        (7, 3, 132),
        (64, 64, 132),
        (132, 64, 132),
        (1, 1, 132),
        (131, 64, 132),
        (5, 448, 16),
    ]:
        division = Division.of(tiles, steps, num_sms)
        assert division.whole_tiles + division.split_tiles == tiles
        assert division.whole_tiles % num_sms == 0
        assert division.programs <= num_sms
        if not division.split_tiles:
            continue
        units, programs = division.split_tiles * steps, division.split_programs
        ends = [p * units // programs for p in range(programs + 1)]
        lengths = [b - a for a, b in pairwise(ends)]
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 1
        assert max(lengths) <= steps
        for a, b in pairwise(ends):
            assert (b - 1) // steps - a // steps <= 1


def test_splitk_gemm_refuses_rows_that_tma_cannot_address():
    from nanoflow_tune.runtime.kernels import registry
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import VARIANTS

    depth = 65 if INTERPRETED else 68
    x, weight, out = randn(8, depth), randn(16, depth), randn(8, 16)
    with pytest.raises(ValueError, match=f"row stride of {depth} elements"):
        registry._VARIANTS["gemm", next(iter(VARIANTS)), "cuda"].kernel(x, weight, None, out, 4)


@pytest.mark.skipif(INTERPRETED, reason="graphs need a GPU")
def test_new_kernels_give_the_same_bits_in_a_cuda_graph():
    from nanoflow_tune.runtime.kernels import registry
    from nanoflow_tune.runtime.kernels.triton_decode_split import split_decode_attention
    from nanoflow_tune.runtime.kernels.triton_gemm_splitk import VARIANTS

    heads = HeadShape(num_qo_heads=8, num_kv_heads=2, head_dim=128)
    operands, rows, _ = decode_operands([1, 1024, 5000, 8192], heads)
    x, weight = randn(330, 1000, seed=7), randn(1160, 1000, seed=8)
    out = torch.empty(330, 1160, device=DEVICE, dtype=DTYPE)
    calls = [
        (lambda: split_decode_attention(*operands, 24), operands[4]),
        *(
            (
                lambda name=name: registry._VARIANTS["gemm", name, "cuda"].kernel(
                    x, weight, None, out, 20
                ),
                out,
            )
            for name in VARIANTS
        ),
    ]
    for call, written in calls:
        call()
        eager = written.clone()
        written.zero_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
            call()
        graph.replay()
        torch.cuda.synchronize()
        chosen = rows if written is operands[4] else slice(None)
        assert torch.equal(written[chosen], eager[chosen])
