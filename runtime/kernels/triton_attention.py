"""Paged attention for decode and for chunked prefill, GQA, with grids sized to the SM share.

Work items are walked with a stride of the number of programs, so both kernels fill a partition of
any size without a second wave. Decode packs the query heads that share a KV head into one tile, so
that every key and value is read once. One program reads one request's keys from start to end
(no split along the keys): batches of fewer requests than programs leave SMs idle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .registry import DecodeRows, HeadShape, PrefillRows, register

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Keys per step, pipeline depth, warps and resident programs per SM."""

    keys: int
    num_stages: int
    num_warps: int
    programs_per_sm: int


DECODE_TILE = DecodeTile(keys=32, num_stages=3, num_warps=1, programs_per_sm=8)


@triton.jit
def _decode_attention(  # noqa: ANN202
    qkv_ptr,  # noqa: ANN001
    k_pages_ptr,  # noqa: ANN001
    v_pages_ptr,  # noqa: ANN001
    row_ids_ptr,  # noqa: ANN001
    kv_lens_ptr,  # noqa: ANN001
    page_table_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride_qkv,  # noqa: ANN001
    stride_page,  # noqa: ANN001
    stride_head,  # noqa: ANN001
    stride_table,  # noqa: ANN001
    stride_out,  # noqa: ANN001
    num_items,  # noqa: ANN001
    scale,  # noqa: ANN001
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Item = (decode row, KV head); online softmax in base 2."""
    head_dim = tl.arange(0, H)
    group = tl.arange(0, GROUP_BLOCK)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        request = item // KV_HEADS
        kv_head = item % KV_HEADS
        row = tl.load(row_ids_ptr + request).to(tl.int64)
        kv_len = tl.load(kv_lens_ptr + request)
        table = page_table_ptr + request.to(tl.int64) * stride_table
        heads = kv_head * GROUP + group
        q = tl.load(
            qkv_ptr + row * stride_qkv + heads[:, None] * H + head_dim[None, :],
            mask=group[:, None] < GROUP,
            other=0.0,
        )
        peak = tl.full((GROUP_BLOCK,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((GROUP_BLOCK,), dtype=tl.float32)
        accumulator = tl.zeros((GROUP_BLOCK, H), dtype=tl.float32)
        for first in tl.range(0, kv_len, KEYS, num_stages=STAGES):
            keys = first + tl.arange(0, KEYS)
            valid = keys < kv_len
            pages = tl.load(table + keys // PAGE, mask=valid, other=0).to(tl.int64)
            cells = pages * stride_page + kv_head * stride_head + (keys % PAGE) * H
            k = tl.load(
                k_pages_ptr + cells[:, None] + head_dim[None, :], mask=valid[:, None], other=0.0
            )
            scores = tl.where(valid[None, :], tl.dot(q, k.T) * scale, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_peak[:, None])
            rescale = tl.exp2(peak - new_peak)
            total = total * rescale + tl.sum(weights, axis=1)
            v = tl.load(
                v_pages_ptr + cells[:, None] + head_dim[None, :], mask=valid[:, None], other=0.0
            )
            accumulator = accumulator * rescale[:, None]
            accumulator = tl.dot(weights.to(v.dtype), v, accumulator)
            peak = new_peak
        out = accumulator / total[:, None]
        tl.store(
            out_ptr + row * stride_out + heads[:, None] * H + head_dim[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=(group[:, None] < GROUP) & (kv_len > 0),
        )


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
    """Decode attention with a given tile; the registered variant uses `DECODE_TILE`."""
    group = heads.num_qo_heads // heads.num_kv_heads
    num_items = rows.num_rows * heads.num_kv_heads
    if not num_items:
        return
    programs = min(num_items, num_sms * tile.programs_per_sm)
    assert k_pages_PGBH.stride() == v_pages_PGBH.stride()
    _decode_attention[(programs,)](
        qkv_TC,
        k_pages_PGBH,
        v_pages_PGBH,
        rows.row_ids_R,
        rows.kv_lens_R,
        rows.page_table_RP,
        out_TQ,
        qkv_TC.stride(0),
        k_pages_PGBH.stride(0),
        k_pages_PGBH.stride(1),
        rows.page_table_RP.stride(0),
        out_TQ.stride(0),
        num_items,
        _LOG2_E / math.sqrt(heads.head_dim),
        KV_HEADS=heads.num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        H=heads.head_dim,
        PAGE=k_pages_PGBH.shape[2],
        KEYS=tile.keys,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@register("decode_attention", "triton", "cuda")
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


@triton.jit
def _attend(  # noqa: ANN202
    accumulator,  # noqa: ANN001
    peak,  # noqa: ANN001
    total,  # noqa: ANN001
    q,  # noqa: ANN001
    positions,  # noqa: ANN001
    table,  # noqa: ANN001
    k_pages_ptr,  # noqa: ANN001
    v_pages_ptr,  # noqa: ANN001
    head_offset,  # noqa: ANN001
    stride_page,  # noqa: ANN001
    first_key,  # noqa: ANN001
    end_key,  # noqa: ANN001
    scale,  # noqa: ANN001
    H: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Fold the keys [first_key, end_key) into the running softmax."""
    head_dim = tl.arange(0, H)
    for first in tl.range(first_key, end_key, KEYS):
        keys = first + tl.arange(0, KEYS)
        valid = keys < end_key
        pages = tl.load(table + keys // PAGE, mask=valid, other=0).to(tl.int64)
        cells = pages * stride_page + head_offset + (keys % PAGE) * H
        addresses = cells[:, None] + head_dim[None, :]
        k = tl.load(k_pages_ptr + addresses, mask=valid[:, None], other=0.0)
        scores = tl.dot(q, k.T) * scale
        if IS_MASKED:
            scores = tl.where(keys[None, :] <= positions[:, None], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(weights, axis=1)
        v = tl.load(v_pages_ptr + addresses, mask=valid[:, None], other=0.0)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator)
        peak = new_peak
    return accumulator, peak, total


@triton.jit
def _prefill_attention(  # noqa: ANN202
    qkv_ptr,  # noqa: ANN001
    k_pages_ptr,  # noqa: ANN001
    v_pages_ptr,  # noqa: ANN001
    row_starts_ptr,  # noqa: ANN001
    num_rows_ptr,  # noqa: ANN001
    position_starts_ptr,  # noqa: ANN001
    page_table_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride_qkv,  # noqa: ANN001
    stride_page,  # noqa: ANN001
    stride_head,  # noqa: ANN001
    stride_table,  # noqa: ANN001
    stride_out,  # noqa: ANN001
    num_segments,  # noqa: ANN001
    scale,  # noqa: ANN001
    SEGMENTS: tl.constexpr,
    QO_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Item = (block of a segment's rows, query head); the device counts the blocks.

    So a captured graph may be replayed with other segments; those without rows have no blocks.
    """
    head_dim = tl.arange(0, H)
    segments = tl.arange(0, SEGMENTS)
    counts = tl.load(num_rows_ptr + segments, mask=segments < num_segments, other=0)
    blocks = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(blocks, axis=0)
    num_items = tl.sum(blocks, axis=0) * QO_HEADS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        block = item // QO_HEADS
        head = item % QO_HEADS
        is_before = ends <= block
        segment = tl.sum(is_before.to(tl.int32), axis=0)
        segment_block = block - tl.sum(tl.where(is_before, blocks, 0), axis=0)
        num_rows = tl.load(num_rows_ptr + segment)
        position_start = tl.load(position_starts_ptr + segment)
        in_segment = segment_block * ROWS + tl.arange(0, ROWS)
        is_row = in_segment < num_rows
        rows = (tl.load(row_starts_ptr + segment) + in_segment).to(tl.int64)
        positions = position_start + in_segment
        q = tl.load(
            qkv_ptr + rows[:, None] * stride_qkv + head * H + head_dim[None, :],
            mask=is_row[:, None],
            other=0.0,
        )
        table = page_table_ptr + segment * stride_table
        head_offset = (head // GROUP) * stride_head
        peak = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        accumulator = tl.zeros((ROWS, H), dtype=tl.float32)
        first_position = position_start + segment_block * ROWS
        end_position = min(position_start + num_rows, first_position + ROWS)
        full_keys = ((first_position + 1) // KEYS) * KEYS
        accumulator, peak, total = _attend(
            accumulator,
            peak,
            total,
            q,
            positions,
            table,
            k_pages_ptr,
            v_pages_ptr,
            head_offset,
            stride_page,
            0,
            full_keys,
            scale,
            H,
            PAGE,
            KEYS,
            False,
        )
        accumulator, peak, total = _attend(
            accumulator,
            peak,
            total,
            q,
            positions,
            table,
            k_pages_ptr,
            v_pages_ptr,
            head_offset,
            stride_page,
            full_keys,
            end_position,
            scale,
            H,
            PAGE,
            KEYS,
            True,
        )
        out = accumulator / total[:, None]
        tl.store(
            out_ptr + rows[:, None] * stride_out + head * H + head_dim[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=is_row[:, None],
        )


@register("prefill_attention", "triton", "cuda")
def prefill_attention(
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: PrefillRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Causal attention of each segment over its request's cached keys, its own included.

    `rows.segment_rows` only bounds the grid: it may promise more rows than `num_rows_S` has.
    """
    block_rows = 128
    blocks = sum(triton.cdiv(count, block_rows) for count in rows.segment_rows)
    num_items = blocks * heads.num_qo_heads
    if not num_items:
        return
    programs = min(num_items, num_sms)
    assert k_pages_PGBH.stride() == v_pages_PGBH.stride()
    _prefill_attention[(programs,)](
        qkv_TC,
        k_pages_PGBH,
        v_pages_PGBH,
        rows.row_starts_S,
        rows.num_rows_S,
        rows.position_starts_S,
        rows.page_table_SP,
        out_TQ,
        qkv_TC.stride(0),
        k_pages_PGBH.stride(0),
        k_pages_PGBH.stride(1),
        rows.page_table_SP.stride(0),
        out_TQ.stride(0),
        rows.num_segments,
        _LOG2_E / math.sqrt(heads.head_dim),
        SEGMENTS=max(32, triton.next_power_of_2(rows.num_segments)),
        QO_HEADS=heads.num_qo_heads,
        GROUP=heads.num_qo_heads // heads.num_kv_heads,
        H=heads.head_dim,
        PAGE=k_pages_PGBH.shape[2],
        ROWS=block_rows,
        KEYS=64,
        num_warps=8,
        num_stages=2,
    )
