"""Persistent wgmma GEMMs for Hopper: the grid is the SM share, the tile is fitted to it.

The kernel is `cuda/gemm.cu`, compiled for the tile that `gemm_tiles.py` chooses per call. Variants:
`sm90` and `sm90_256` have tiles of 128 and 256 rows, `_c2` pairs CTAs that share weights, `_pp`
takes tiles in turn between the two consumers, `_sk` divides the last waves along K (stream-K).
Each is a variant of `gemm` and, with SiLU x up in its epilogue, of `gemm_silu`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .cuda_module import CudaKernel, tensor_map
from .gemm_tiles import (
    BLOCK_K,
    CONSUMERS,
    STORE_COLUMNS,
    STORE_ROWS,
    Division,
    GemmTile,
    fitted_tile,
)
from .registry import register
from .workspace import per_stream

_THREADS = 128 * (1 + CONSUMERS)
_MAX_TILE = 256 * 176
_TMA_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmFamily:
    """One variant: what is fixed about its tiles; their width is fitted."""

    name: str
    rows: int
    cluster: int = 1
    is_split: bool = False
    is_pingpong: bool = False

    def tile(self, x_TK: Tensor, weight_NK: Tensor, num_sms: int, *, has_silu: bool) -> GemmTile:
        """The tile for one call."""
        return fitted_tile(
            x_TK.shape[0],
            weight_NK.shape[0],
            x_TK.shape[1],
            num_sms,
            tile_rows=self.rows,
            cluster=self.cluster,
            is_split=self.is_split,
            is_pingpong=self.is_pingpong,
            has_silu=has_silu,
        )


FAMILIES = (
    GemmFamily(name="sm90", rows=128),
    GemmFamily(name="sm90_256", rows=256),
    GemmFamily(name="sm90_c2", rows=128, cluster=2),
    GemmFamily(name="sm90_pp", rows=128, is_pingpong=True),
    GemmFamily(name="sm90_pp_c2", rows=128, cluster=2, is_pingpong=True),
    GemmFamily(name="sm90_sk", rows=128, is_split=True),
)


def wgmma_source(width: int) -> str:
    """CUDA C++ of the wgmma instruction for one width: `width` / 2 fp32 sums a thread."""
    count = width // 2
    sums = ", ".join(f"%{index}" for index in range(count))
    operands = ", ".join(f'"+f"(d[{index}])' for index in range(count))
    return f"""
    // d = a b^T (+ d unless `accumulate` is 0).
    __device__ __forceinline__ void wgmma_width(float (&d)[{count}], uint64 a, uint64 b,
                                                int accumulate) {{
      asm volatile(
          "{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0;"
          "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16 {{ {sums} }},"
          "%{count}, %{count + 1}, p, 1, 1, 0, 0; }}"
          : {operands}
          : "l"(a), "l"(b), "r"(accumulate));
    }}
    """


@functools.cache
def compiled(tile: GemmTile, *, has_silu: bool) -> CudaKernel:
    """The kernel for one tile."""
    return CudaKernel(
        "gemm.cu",
        "gemm",
        {
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "STAGES": tile.num_stages,
            "CLUSTER": tile.cluster,
            "SILU": int(has_silu),
            "STREAM_K": int(tile.is_split),
            "PINGPONG": int(tile.is_pingpong),
        },
        headers={"wgmma_width.cuh": wgmma_source(tile.columns)},
    )


@dataclass(frozen=True, slots=True)
class _Workspace:
    """Partial sums of the tiles that are split; the kernel leaves the flags at zero."""

    partials: Tensor
    flags: Tensor


def _new_workspace(num_sms: int) -> _Workspace:
    return _Workspace(
        torch.empty(num_sms * _MAX_TILE, dtype=torch.float32, device="cuda"),
        torch.zeros(CONSUMERS * num_sms, dtype=torch.int32, device="cuda"),
    )


def _check(name: str, tensor: Tensor) -> None:
    row_bytes = tensor.stride(0) * tensor.element_size()
    if tensor.dtype != torch.bfloat16 or tensor.stride(1) != 1:
        raise ValueError(f"`{name}` must be bfloat16 with contiguous rows, got {tensor.dtype}")
    if row_bytes % _TMA_BYTES or tensor.data_ptr() % _TMA_BYTES:
        raise ValueError(
            f"`{name}` must start each row at a multiple of {_TMA_BYTES} bytes for TMA, got rows "
            f"of {row_bytes} bytes: use the variant `cublas`"
        )


def launch_gemm(
    tile: GemmTile,
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    out_TN: Tensor,
    num_sms: int,
    *,
    has_silu: bool = False,
) -> None:
    """One GEMM with a given tile on the current stream.

    With `has_silu` the weight holds the up rows, then the gate rows, and `out_TN` has half as many
    columns as the weight has rows.

    Raises:
        ValueError: a tensor that TMA cannot address; names it.
    """
    rows, depth = x_TK.shape
    for name, tensor in (("x", x_TK), ("weight", weight_NK), ("out", out_TN)):
        _check(name, tensor)
    width, out_width = weight_NK.shape[0], out_TN.shape[1]
    division = Division.of(tile, rows, width, depth, num_sms)
    num_boxes = 2 if has_silu or tile.cluster > 1 else 1
    partials, flags = out_TN, out_TN  # not touched when nothing is split
    if division.split_units:
        device_sms = torch.cuda.get_device_properties(x_TK.device).multi_processor_count
        workspace = per_stream(_Workspace, device_sms, partial(_new_workspace, device_sms))
        partials, flags = workspace.partials, workspace.flags
    counts = (
        rows,
        out_width,
        division.tiles_m,
        division.tiles,
        division.steps,
        division.whole_tiles,
        division.split_units,
    )
    compiled(tile, has_silu=has_silu).launch(
        (division.clusters * tile.cluster, 1, 1),
        _THREADS,
        tile.shared_bytes,
        (
            tensor_map(x_TK, (depth, rows), (x_TK.stride(0),), (BLOCK_K, tile.rows)),
            tensor_map(
                weight_NK,
                (depth, width),
                (weight_NK.stride(0),),
                (BLOCK_K, tile.columns // num_boxes),
            ),
            tensor_map(out_TN, (out_width, rows), (out_TN.stride(0),), (STORE_COLUMNS, STORE_ROWS)),
            out_TN,
            ctypes.c_void_p() if bias_N is None else bias_N,
            partials,
            flags,
            ctypes.c_int64(out_TN.stride(0)),
            *map(ctypes.c_int32, counts),
        ),
        cluster=tile.cluster,
        overlaps_previous=True,
    )


def _gemm(family: GemmFamily) -> Callable[..., None]:
    def gemm(
        x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_TN: Tensor, num_sms: int
    ) -> None:
        if not x_TK.shape[0]:
            return
        tile = family.tile(x_TK, weight_NK, num_sms, has_silu=False)
        launch_gemm(tile, x_TK, weight_NK, bias_N, out_TN, num_sms)

    return gemm


def _gemm_silu(family: GemmFamily) -> Callable[..., None]:
    def gemm_silu(
        x_TK: Tensor, weight_2FK: Tensor, scratch_T2F: Tensor, out_TF: Tensor, num_sms: int
    ) -> None:
        del scratch_T2F  # up and gate never leave the registers
        if not x_TK.shape[0]:
            return
        tile = family.tile(x_TK, weight_2FK, num_sms, has_silu=True)
        launch_gemm(tile, x_TK, weight_2FK, None, out_TF, num_sms, has_silu=True)

    return gemm_silu


for _family in FAMILIES:
    register("gemm", _family.name, "cuda")(_gemm(_family))
    register("gemm_silu", _family.name, "cuda")(_gemm_silu(_family))
