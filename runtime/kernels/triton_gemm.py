"""Persistent bf16 GEMM for Hopper whose grid is the SM share: TMA loads, fp32 accumulators.

Each program walks over output tiles with a stride of `num_sms`, so a partition of any size runs
whole waves of its own size. The tile shape decides how well the tile count divides by the share;
each shape is a variant, and the search takes the fastest per (shape, rows, share).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .registry import register


@dataclass(frozen=True, slots=True)
class Tile:
    """Output tile and pipeline depth of one variant."""

    m: int
    n: int
    k: int
    num_stages: int
    num_warps: int

    @property
    def name(self) -> str:
        """Variant name."""
        return f"triton_{self.m}x{self.n}"


TILES = (
    Tile(128, 256, 64, 3, 8),
    Tile(128, 128, 64, 4, 4),
    Tile(64, 256, 64, 4, 8),
)
# Tiles of one group share their weights in L2 while the group's rows go by.
_GROUP_M = 8


@triton.jit
def _persistent_gemm(  # noqa: ANN202 - Triton kernel
    x_desc,  # noqa: ANN001
    weight_desc,  # noqa: ANN001
    out_desc,  # noqa: ANN001
    bias_ptr,  # noqa: ANN001
    M,  # noqa: ANN001
    N,  # noqa: ANN001
    K,  # noqa: ANN001
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Program p of P computes tiles p, p + P, ..., rows of a group first."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps_k = tl.cdiv(K, BLOCK_K)
    group_size = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        first_m = (tile // group_size) * GROUP_M
        rows = min(tiles_m - first_m, GROUP_M)
        tile_m = first_m + (tile % group_size) % rows
        tile_n = (tile % group_size) // rows
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps_k):
            x = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])
            weight = weight_desc.load([tile_n * BLOCK_N, step * BLOCK_K])
            accumulator = tl.dot(x, weight.T, accumulator)
        if HAS_BIAS:
            columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
            accumulator += bias[None, :].to(tl.float32)
        out_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], accumulator.to(out_desc.dtype))


def _descriptor(tensor: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [block_rows, block_columns])


def _variant(tile: Tile) -> Callable[..., None]:
    def gemm(
        x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_TN: Tensor, num_sms: int
    ) -> None:
        rows, depth = x_TK.shape
        if not rows:
            return
        width = weight_NK.shape[0]
        tiles = triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.n)
        _persistent_gemm[(min(num_sms, tiles),)](
            _descriptor(x_TK, tile.m, tile.k),
            _descriptor(weight_NK, tile.n, tile.k),
            _descriptor(out_TN, tile.m, tile.n),
            x_TK if bias_N is None else bias_N,
            rows,
            width,
            depth,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            GROUP_M=_GROUP_M,
            HAS_BIAS=bias_N is not None,
            num_stages=tile.num_stages,
            num_warps=tile.num_warps,
        )

    return gemm


for _tile in TILES:
    register("gemm", _tile.name, "cuda")(_variant(_tile))
