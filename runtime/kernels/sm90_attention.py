"""Paged GQA decode attention for Hopper: `cuda/decode_attention.cu` and its launch.

Every warp copies pages by TMA into a ring of its own and computes on them. The pages of all rows
are cut into equal ranges with a warp for each kv head, so that the heads of a page, neighbours in
memory, are read at about the same time; items (row, kv head) that a cut divides are merged in a
fixed order by the warp that ends last. The division is made on the device from `kv_lens_R`, so that
a captured graph may be replayed with other lengths. Equal shares give equal bits; another share
cuts elsewhere, so it rounds otherwise.

Rows without keys are not written.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .cuda_module import CudaKernel, TensorMap, tensor_map
from .registry import DecodeRows, HeadShape, register
from .workspace import per_stream

PAGE_SIZE = 16
HEAD_DIMS = (64, 128)
MAX_GROUP = 16
_LOG2_E = math.log2(math.e)
_SWIZZLED_COLUMNS = 64
_MAX_SHARED_BYTES = 227 << 10
_ALIGNMENT_BYTES = 1024
_STAGE_RECORD_BYTES = 16 + 8
_WARP_RECORD_BYTES = 2 * 32 * 4 + 2 * 2 * 4 + 4
_HEADS_PER_TILE = 8
_MAX_WARPS_OF_TWO_TILES = 8
_L2_PROMOTION_BYTES = 128
"""A page is a row of lines: fetching two at once cost 4 % of the bandwidth (results/LOG.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTile:
    """Launch parameters of the kernel."""

    num_warps: int
    """Per SM; each works on pages of its own."""
    ring_bytes: int
    """Shared memory of a warp for keys and values on their way; at least two pages of each."""
    min_pages: int
    """A range has at least this many pages of a kv head, so that few pages use fewer warps."""
    min_fragment_pages: int
    """A cut this near to an end of an item moves there; at most `min_pages`."""
    is_evict_first: bool
    """Keys and values leave the L2 cache before other data."""

    def fitted(self, head_dim: int, group: int) -> DecodeTile:
        """The tile for a head dimension and a number of query heads per kv head.

        More than 8 query heads of dimension 128 take twice the registers for queries and outputs,
        which more than 8 warps would spill: 8 warps divide the same shared memory.
        """
        most = _MAX_WARPS_OF_TWO_TILES
        if head_dim <= 64 or group <= _HEADS_PER_TILE or self.num_warps <= most:
            return self
        return replace(self, num_warps=most, ring_bytes=self.ring_bytes * self.num_warps // most)

    def num_stages(self, head_dim: int) -> int:
        """Pages in a warp's ring."""
        return self.ring_bytes // (2 * PAGE_SIZE * head_dim * 2)

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a block."""
        stages = self.num_warps * self.num_stages(head_dim)
        page_bytes = 2 * PAGE_SIZE * head_dim * 2
        records = stages * _STAGE_RECORD_BYTES + self.num_warps * _WARP_RECORD_BYTES
        return _ALIGNMENT_BYTES + stages * page_bytes + records


DECODE_TILE = DecodeTile(
    num_warps=12,
    ring_bytes=16 << 10,
    min_pages=8,
    min_fragment_pages=4,
    is_evict_first=True,
)


@functools.cache
def decode_kernel(tile: DecodeTile, head_dim: int, group: int) -> CudaKernel:
    """The kernel of a tile that is fitted to a head dimension and group of query heads.

    Raises:
        ValueError: the tile does not fit an SM.
    """
    shared_bytes, stages = tile.shared_bytes(head_dim), tile.num_stages(head_dim)
    if stages < 2 or shared_bytes > _MAX_SHARED_BYTES:
        raise ValueError(
            f"{tile} has {stages} stages a warp and {shared_bytes} bytes of shared memory at head "
            f"dimension {head_dim}: at least 2 stages and at most {_MAX_SHARED_BYTES} bytes fit"
        )
    return CudaKernel(
        "decode_attention.cu",
        "decode_attention",
        {
            "HEAD_DIM": head_dim,
            "GROUP": group,
            "WARPS": tile.num_warps,
            "STAGES": stages,
            "MIN_PAGES": tile.min_pages,
            "MIN_FRAGMENT": tile.min_fragment_pages,
            "EVICT_FIRST": int(tile.is_evict_first),
        },
    )


@dataclass(frozen=True, slots=True)
class _Workspace:
    """Room for two partial items a worker, and a counter of arrivals, zero between launches."""

    partials: Tensor
    arrivals: Tensor


def partial_floats(head_dim: int, group: int) -> int:
    """fp32 values of one partial item: outputs and statistics of whole tiles of 8 query heads."""
    tiles = -(-group // _HEADS_PER_TILE)
    return tiles * (head_dim * _HEADS_PER_TILE + 16)


def _new_workspace(num_workers: int, floats: int) -> _Workspace:
    return _Workspace(
        torch.empty(2 * num_workers * floats, dtype=torch.float32, device="cuda"),
        torch.zeros(num_workers, dtype=torch.int32, device="cuda"),
    )


def _pool_map(pages_PGBH: Tensor) -> TensorMap:
    """Boxes of one page and kv head: halves of 64 columns, 16 rows of 128 bytes each."""
    num_pages, num_kv_heads, page_size, head_dim = pages_PGBH.shape
    halves = head_dim // _SWIZZLED_COLUMNS
    return tensor_map(
        pages_PGBH,
        sizes=(_SWIZZLED_COLUMNS, page_size, halves, num_pages * num_kv_heads),
        strides=(head_dim, _SWIZZLED_COLUMNS, page_size * head_dim),
        box=(_SWIZZLED_COLUMNS, page_size, halves, 1),
        l2_promotion_bytes=_L2_PROMOTION_BYTES,
    )


def takes(heads: HeadShape, dtype: torch.dtype, page_size: int) -> bool:
    """Whether the kernel computes attention of such heads over such pages."""
    return _takes_heads(heads) and dtype == torch.bfloat16 and page_size == PAGE_SIZE


def _takes_heads(heads: HeadShape) -> bool:
    group, rest = divmod(heads.num_qo_heads, heads.num_kv_heads)
    return heads.head_dim in HEAD_DIMS and not rest and 1 <= group <= MAX_GROUP


def _check(
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: DecodeRows,
    out_TQ: Tensor,
    heads: HeadShape,
) -> None:
    if not _takes_heads(heads):
        raise ValueError(
            f"sm90 decode attention takes head dimensions {HEAD_DIMS} and 1 to {MAX_GROUP} query "
            f"heads a kv head, got {heads}: use the variant `triton`"
        )
    if k_pages_PGBH.shape[2] != PAGE_SIZE:
        raise ValueError(
            f"sm90 decode attention takes pages of {PAGE_SIZE} tokens, got "
            f"{k_pages_PGBH.shape[2]}: make the cache with page_size={PAGE_SIZE} or use the "
            "variant `triton`"
        )
    for name, pool in (("k_pages", k_pages_PGBH), ("v_pages", v_pages_PGBH)):
        shape = (heads.num_kv_heads, PAGE_SIZE, heads.head_dim)
        if pool.shape[1:] != shape or not pool.is_contiguous():
            raise ValueError(
                f"`{name}` must be contiguous [pages, kv heads, {PAGE_SIZE}, head dim], here of "
                f"{shape} a page, got {tuple(pool.shape)} with strides {pool.stride()}"
            )
    for name, tensor in (
        ("qkv", qkv_TC),
        ("k_pages", k_pages_PGBH),
        ("v_pages", v_pages_PGBH),
        ("out", out_TQ),
    ):
        if tensor.dtype != torch.bfloat16 or tensor.stride(-1) != 1 or tensor.stride(0) % 2:
            raise ValueError(
                f"`{name}` must be bfloat16 in contiguous rows that start at multiples of 4 bytes, "
                f"got {tensor.dtype} with strides {tensor.stride()}"
            )
    for name, tensor in (
        ("row_ids", rows.row_ids_R),
        ("kv_lens", rows.kv_lens_R),
        ("page_table", rows.page_table_RP),
    ):
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"`{name}` must be int32 and contiguous, got {tensor.dtype}")


def launch_decode(
    tile: DecodeTile,
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: DecodeRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Decode attention with a given tile; the registered variant uses `DECODE_TILE`.

    Raises:
        ValueError: a shape, type or layout that the kernel does not take, or a tile that does not
            fit an SM.
    """
    if rows.num_rows == 0:
        return
    _check(qkv_TC, k_pages_PGBH, v_pages_PGBH, rows, out_TQ, heads)
    head_dim, group = heads.head_dim, heads.num_qo_heads // heads.num_kv_heads
    tile = tile.fitted(head_dim, group)
    kernel = decode_kernel(tile, head_dim, group)
    max_rows = tile.num_warps * tile.ring_bytes // 4 - 1
    if rows.num_rows > max_rows:
        raise ValueError(
            f"{rows.num_rows} decode rows: their prefix sum must fit the ring, so at most "
            f"{max_rows} rows a call"
        )
    size = num_sms * tile.num_warps, partial_floats(head_dim, group)
    workspace = per_stream(_Workspace, size, partial(_new_workspace, *size))
    kernel.launch(
        (num_sms, 1, 1),
        32 * tile.num_warps,
        tile.shared_bytes(head_dim),
        [
            _pool_map(k_pages_PGBH),
            _pool_map(v_pages_PGBH),
            qkv_TC,
            out_TQ,
            rows.row_ids_R,
            rows.kv_lens_R,
            rows.page_table_RP,
            workspace.partials,
            workspace.arrivals,
            ctypes.c_int(rows.num_rows),
            ctypes.c_int(heads.num_kv_heads),
            ctypes.c_int(rows.page_table_RP.stride(0)),
            ctypes.c_int(qkv_TC.stride(0)),
            ctypes.c_int(out_TQ.stride(0)),
            ctypes.c_float(_LOG2_E / math.sqrt(head_dim)),
        ],
        overlaps_previous=True,
    )


@register("decode_attention", "sm90", "cuda")
def decode_attention(
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: DecodeRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Each decode row attends to its own request's keys."""
    launch_decode(DECODE_TILE, qkv_TC, k_pages_PGBH, v_pages_PGBH, rows, out_TQ, heads, num_sms)
