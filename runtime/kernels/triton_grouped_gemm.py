"""Persistent grouped GEMM for Hopper whose grid is the SM share: TMA loads, fp32 accumulators.

Tiles are counted over all experts on the device, from the offsets: no host work depends on the
routing, and an expert may have no rows. Program p of P computes tiles p, p + P, ... Tiles of an
expert go by rows first: those that share weights run next to each other and read them from HBM
once. A tile may load rows of the next expert (or weights, where the width is no multiple of the
tile's); what it computes from them is not stored.

Shape legend: `grouped_gemm`.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .grouped_gemm import check_alignment
from .registry import register
from .triton_gemm import Tile

TILES = (
    Tile(128, 128, 64, 4, 4),
    Tile(128, 256, 64, 3, 8),
    Tile(64, 256, 64, 4, 8),
)


def variant_name(tile: Tile) -> str:
    """Name of the variant with this tile."""
    return f"triton_grouped_{tile.m}x{tile.n}"


@triton.jit
def _grouped_gemm(  # noqa: ANN202 - Triton kernel
    x_desc,  # noqa: ANN001
    weight_desc,  # noqa: ANN001
    ends_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride_out,  # noqa: ANN001
    N,  # noqa: ANN001
    K,  # noqa: ANN001
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights are one matrix of E x N rows."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps_k = tl.cdiv(K, BLOCK_K)
    tiles = 0
    previous = 0
    for expert in tl.static_range(EXPERTS):
        last = tl.load(ends_ptr + expert)
        tiles += tl.cdiv(last - previous, BLOCK_M) * tiles_n
        previous = last
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        # Count the experts whose tiles all lie before this one; the caches hold the offsets.
        of_expert = 0
        before = 0
        counted = 0
        start = 0
        for expert in tl.static_range(EXPERTS):
            end = tl.load(ends_ptr + expert)
            counted += tl.cdiv(end - start, BLOCK_M) * tiles_n
            is_past = tile >= counted
            of_expert += is_past.to(tl.int32)
            before = tl.where(is_past, counted, before)
            start = end
        first_of_expert = tl.load(ends_ptr + of_expert - 1, mask=of_expert > 0, other=0)
        tiles_m = tl.cdiv(tl.load(ends_ptr + of_expert) - first_of_expert, BLOCK_M)
        first_row = first_of_expert + (tile - before) % tiles_m * BLOCK_M
        first_column = (tile - before) // tiles_m * BLOCK_N
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps_k):
            x = x_desc.load([first_row, step * BLOCK_K])
            weight = weight_desc.load([of_expert * N + first_column, step * BLOCK_K])
            accumulator = tl.dot(x, weight.T, accumulator)
        end_row = tl.load(ends_ptr + of_expert)
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        tl.store(
            out_ptr + rows[:, None].to(tl.int64) * stride_out + columns[None, :],
            accumulator.to(out_ptr.dtype.element_ty),
            mask=(rows[:, None] < end_row) & (columns[None, :] < N),
        )


def launch_grouped_gemm(
    tile: Tile,
    x_TK: Tensor,
    weight_ENK: Tensor,
    offsets_E: Tensor,
    out_TN: Tensor,
    num_sms: int,
) -> None:
    """Launch with any tile.

    Raises:
        ValueError: rows that TMA cannot address, or weights of experts with gaps between them.
    """
    rows, depth = x_TK.shape
    experts, width, _ = weight_ENK.shape
    check_alignment(x_TK, weight_ENK)
    if weight_ENK.stride(0) != width * weight_ENK.stride(1):
        raise ValueError(
            "the experts' weights must lie behind each other without gaps, but got strides "
            f"{weight_ENK.stride()} for shape {tuple(weight_ENK.shape)}: make them contiguous"
        )
    if out_TN.stride(1) != 1:
        raise ValueError(f"rows of out_TN must be contiguous, but got strides {out_TN.stride()}")
    if rows == 0:
        return
    # Every expert may end with a tile that is not full.
    most_tiles = (rows // tile.m + experts) * triton.cdiv(width, tile.n)
    _grouped_gemm[(min(num_sms, most_tiles),)](
        TensorDescriptor.from_tensor(x_TK, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight_ENK.flatten(0, 1), [tile.n, tile.k]),
        offsets_E,
        out_TN,
        out_TN.stride(0),
        width,
        depth,
        EXPERTS=experts,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_stages=tile.num_stages,
        num_warps=tile.num_warps,
    )


def _variant(tile: Tile) -> Callable[..., None]:
    def grouped_gemm(
        x_TK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, out_TN: Tensor, num_sms: int
    ) -> None:
        launch_grouped_gemm(tile, x_TK, weight_ENK, offsets_E, out_TN, num_sms)

    return grouped_gemm


for _tile in TILES:
    register("grouped_gemm", variant_name(_tile), "cuda")(_variant(_tile))
