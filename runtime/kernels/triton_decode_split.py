"""Paged decode attention split along the keys: long and mixed KV lengths fill the share evenly.

A request's keys are cut into splits of `split_keys`; (split, KV head) are the work items, walked
with a stride of the number of programs. Requests of one split are written at once, the others as
(peak, total, accumulator) in fp32, which a second kernel merges in the order of the splits. Where
the cuts fall depends on the request's length alone, so a row's sums are taken in the same order on
any share, beside any other rows and in any run: the same bits.

KV lengths are on the device, so a one-program kernel lists the splits that exist there, full ones
first and the short last ones after them, so that the tail is made of small items. Nothing waits
for the host. When `rows.max_kv_len` fits one split, neither list nor merge is launched. A captured
graph keeps the number of splits of its capture: `max_kv_len` must bound what it is replayed with.

The workspace is allocated per call. The allocator hands a block out again only to its own stream
(in a capture: from the graph's own pool, to the captured stream), so kernels of two lanes never
share one, the next layer on the lane reuses it in stream order, and no cache has to know shapes or
lanes. Its size is rows x splits of `max_kv_len` x KV heads; only splits that exist are touched.

Shape legend as in `registry.py`; further W workspace slots, one a (row, split, KV head), and M
query heads of one KV head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import DecodeRows, HeadShape, register

_LOG2_E = math.log2(math.e)
_MERGED_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class SplitTile:
    """Keys per split and per step, pipeline depth, warps and resident programs per SM."""

    split_keys: int
    keys: int
    num_stages: int
    num_warps: int
    programs_per_sm: int


SPLIT_TILE = SplitTile(split_keys=1024, keys=32, num_stages=3, num_warps=1, programs_per_sm=8)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _list_splits(  # noqa: ANN202
    kv_lens_ptr,  # noqa: ANN001
    list_ptr,  # noqa: ANN001
    num_rows,  # noqa: ANN001
    num_splits,  # noqa: ANN001
    SPLIT_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """list[0] = number of splits; then row x num_splits + split of each, full ones first."""
    rows = tl.arange(0, ROWS)
    kv_lens = tl.load(kv_lens_ptr + rows, mask=rows < num_rows, other=0)
    num_full = kv_lens // SPLIT_KEYS
    has_rest = (kv_lens % SPLIT_KEYS > 0).to(tl.int32)
    first = 1 + tl.cumsum(num_full, axis=0) - num_full
    for split in range(num_splits):
        tl.store(list_ptr + first + split, rows * num_splits + split, mask=split < num_full)
    all_full = tl.sum(num_full, axis=0)
    rest = 1 + all_full + tl.cumsum(has_rest, axis=0) - has_rest
    tl.store(list_ptr + rest, rows * num_splits + num_full, mask=has_rest > 0)
    tl.store(list_ptr, all_full + tl.sum(has_rest, axis=0))


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _split_attention(  # noqa: ANN202
    qkv_ptr,  # noqa: ANN001
    k_pages_ptr,  # noqa: ANN001
    v_pages_ptr,  # noqa: ANN001
    row_ids_ptr,  # noqa: ANN001
    kv_lens_ptr,  # noqa: ANN001
    page_table_ptr,  # noqa: ANN001
    list_ptr,  # noqa: ANN001
    partials_ptr,  # noqa: ANN001
    stats_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride_qkv,  # noqa: ANN001
    stride_page,  # noqa: ANN001
    stride_head,  # noqa: ANN001
    stride_table,  # noqa: ANN001
    stride_out,  # noqa: ANN001
    num_rows,  # noqa: ANN001
    num_splits,  # noqa: ANN001
    scale,  # noqa: ANN001
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Item = (split of a row, KV head); online softmax in base 2."""
    head_dim = tl.arange(0, H)
    group = tl.arange(0, GROUP_BLOCK)
    is_head = group[:, None] < GROUP
    num_items = num_rows * KV_HEADS
    if IS_SPLIT:
        num_items = tl.load(list_ptr) * KV_HEADS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        kv_head = item % KV_HEADS
        request = item // KV_HEADS
        listed = request
        first_key = 0
        if IS_SPLIT:
            listed = tl.load(list_ptr + 1 + request)
            request = listed // num_splits
            first_key = (listed % num_splits) * SPLIT_KEYS
        row = tl.load(row_ids_ptr + request).to(tl.int64)
        kv_len = tl.load(kv_lens_ptr + request)
        end_key = kv_len
        if IS_SPLIT:
            end_key = min(kv_len, first_key + SPLIT_KEYS)
        table = page_table_ptr + request.to(tl.int64) * stride_table
        heads = kv_head * GROUP + group
        q = tl.load(
            qkv_ptr + row * stride_qkv + heads[:, None] * H + head_dim[None, :],
            mask=is_head,
            other=0.0,
        )
        peak = tl.full((GROUP_BLOCK,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((GROUP_BLOCK,), dtype=tl.float32)
        accumulator = tl.zeros((GROUP_BLOCK, H), dtype=tl.float32)
        for first in tl.range(first_key, end_key, KEYS, num_stages=STAGES):
            keys = first + tl.arange(0, KEYS)
            valid = keys < end_key
            pages = tl.load(table + keys // PAGE, mask=valid, other=0).to(tl.int64)
            cells = pages * stride_page + kv_head * stride_head + (keys % PAGE) * H
            addresses = cells[:, None] + head_dim[None, :]
            k = tl.load(k_pages_ptr + addresses, mask=valid[:, None], other=0.0)
            scores = tl.where(valid[None, :], tl.dot(q, k.T) * scale, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_peak[:, None])
            rescale = tl.exp2(peak - new_peak)
            total = total * rescale + tl.sum(weights, axis=1)
            v = tl.load(v_pages_ptr + addresses, mask=valid[:, None], other=0.0)
            accumulator = accumulator * rescale[:, None]
            accumulator = tl.dot(weights.to(v.dtype), v, accumulator)
            peak = new_peak
        is_whole = kv_len <= SPLIT_KEYS
        out = accumulator / total[:, None]
        tl.store(
            out_ptr + row * stride_out + heads[:, None] * H + head_dim[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=is_head & is_whole,
        )
        if IS_SPLIT:
            slot = listed.to(tl.int64) * KV_HEADS + kv_head
            is_partial = is_head & (kv_len > SPLIT_KEYS)
            cells = (slot * GROUP + group)[:, None] * H + head_dim[None, :]
            tl.store(partials_ptr + cells, accumulator, mask=is_partial)
            is_partial = (group < GROUP) & (kv_len > SPLIT_KEYS)
            tl.store(stats_ptr + slot * 2 * GROUP + group, peak, mask=is_partial)
            tl.store(stats_ptr + slot * 2 * GROUP + GROUP + group, total, mask=is_partial)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits(  # noqa: ANN202
    row_ids_ptr,  # noqa: ANN001
    kv_lens_ptr,  # noqa: ANN001
    partials_ptr,  # noqa: ANN001
    stats_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride_out,  # noqa: ANN001
    num_splits,  # noqa: ANN001
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    H: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One program a (row, KV head); splits in their order, a few at once."""
    request = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    kv_len = tl.load(kv_lens_ptr + request)
    if kv_len > SPLIT_KEYS:
        head_dim = tl.arange(0, H)
        group = tl.arange(0, GROUP_BLOCK)
        is_head = group < GROUP
        peak = tl.full((GROUP_BLOCK,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((GROUP_BLOCK,), dtype=tl.float32)
        accumulator = tl.zeros((GROUP_BLOCK, H), dtype=tl.float32)
        splits_here = tl.cdiv(kv_len, SPLIT_KEYS)
        for first in range(0, splits_here, AT_ONCE):
            split = first + tl.arange(0, AT_ONCE)
            mask = (split < splits_here)[:, None] & is_head[None, :]
            slots = (request * num_splits + split).to(tl.int64) * KV_HEADS + kv_head
            stats = stats_ptr + slots[:, None] * (2 * GROUP) + group[None, :]
            peaks = tl.load(stats, mask=mask, other=-float("inf"))
            totals = tl.load(stats + GROUP, mask=mask, other=0.0)
            # A finite floor keeps the heads that only pad the block free of inf - inf.
            new_peak = tl.maximum(tl.maximum(peak, tl.max(peaks, axis=0)), -1e30)
            weights = tl.exp2(peaks - new_peak[None, :])
            rescale = tl.exp2(peak - new_peak)
            rows = slots[:, None] * GROUP + group[None, :]
            parts = tl.load(
                partials_ptr + rows[:, :, None] * H + head_dim[None, None, :],
                mask=mask[:, :, None],
                other=0.0,
            )
            total = total * rescale + tl.sum(weights * totals, axis=0)
            accumulator = accumulator * rescale[:, None]
            accumulator += tl.sum(weights[:, :, None] * parts, axis=0)
            peak = new_peak
        row = tl.load(row_ids_ptr + request).to(tl.int64)
        out = accumulator / total[:, None]
        heads = kv_head * GROUP + group
        tl.store(
            out_ptr + row * stride_out + heads[:, None] * H + head_dim[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=is_head[:, None],
        )


def launch_split_decode(
    tile: SplitTile,
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: DecodeRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Split decode attention with a given tile; the registered variant uses `SPLIT_TILE`."""
    if rows.num_rows == 0:
        return
    assert k_pages_PGBH.stride() == v_pages_PGBH.stride()
    kv_heads = heads.num_kv_heads
    group = heads.num_qo_heads // kv_heads
    num_splits = triton.cdiv(rows.max_kv_len, tile.split_keys)
    is_split = num_splits > 1
    num_slots = rows.num_rows * num_splits * kv_heads
    partials_WMH = stats_W2M = out_TQ
    listed = rows.kv_lens_R
    if is_split:
        partials_WMH = out_TQ.new_empty(num_slots, group, heads.head_dim, dtype=torch.float32)
        stats_W2M = out_TQ.new_empty(num_slots, 2, group, dtype=torch.float32)
        listed = listed.new_empty(1 + rows.num_rows * num_splits)
        _list_splits[(1,)](
            rows.kv_lens_R,
            listed,
            rows.num_rows,
            num_splits,
            SPLIT_KEYS=tile.split_keys,
            ROWS=triton.next_power_of_2(rows.num_rows),
            num_warps=8,
        )
    _split_attention[(min(num_slots, num_sms * tile.programs_per_sm),)](
        qkv_TC,
        k_pages_PGBH,
        v_pages_PGBH,
        rows.row_ids_R,
        rows.kv_lens_R,
        rows.page_table_RP,
        listed,
        partials_WMH,
        stats_W2M,
        out_TQ,
        qkv_TC.stride(0),
        k_pages_PGBH.stride(0),
        k_pages_PGBH.stride(1),
        rows.page_table_RP.stride(0),
        out_TQ.stride(0),
        rows.num_rows,
        num_splits,
        _LOG2_E / math.sqrt(heads.head_dim),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        H=heads.head_dim,
        PAGE=k_pages_PGBH.shape[2],
        SPLIT_KEYS=tile.split_keys,
        KEYS=tile.keys,
        STAGES=tile.num_stages,
        IS_SPLIT=is_split,
        num_warps=tile.num_warps,
    )
    if is_split:
        _merge_splits[(rows.num_rows * kv_heads,)](
            rows.row_ids_R,
            rows.kv_lens_R,
            partials_WMH,
            stats_W2M,
            out_TQ,
            out_TQ.stride(0),
            num_splits,
            KV_HEADS=kv_heads,
            GROUP=group,
            GROUP_BLOCK=triton.next_power_of_2(group),
            H=heads.head_dim,
            SPLIT_KEYS=tile.split_keys,
            AT_ONCE=_MERGED_AT_ONCE,
            num_warps=4,
        )


@register("decode_attention", "triton_split", "cuda")
def split_decode_attention(
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: DecodeRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Each decode row attends to its own request's keys."""
    launch_split_decode(
        SPLIT_TILE, qkv_TC, k_pages_PGBH, v_pages_PGBH, rows, out_TQ, heads, num_sms
    )
