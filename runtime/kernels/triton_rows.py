"""Row-wise kernels: residual add + RMSNorm, rotary + KV append, SiLU x up.

All are bound by memory; each row is read once and written once, and the grid is as long as the
rows, since the partition they are launched in confines them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .registry import HeadShape, Received, register


@triton.jit
def _add_rms_norm(  # noqa: ANN202
    residual_ptr,  # noqa: ANN001
    delta_ptr,  # noqa: ANN001
    received_ptr,  # noqa: ANN001
    weight_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride_residual,  # noqa: ANN001
    stride_delta,  # noqa: ANN001
    stride_rank,  # noqa: ANN001
    stride_received,  # noqa: ANN001
    stride_out,  # noqa: ANN001
    D,  # noqa: ANN001
    eps,  # noqa: ANN001
    HAS_DELTA: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row per program; with RANKS > 1, delta is summed with what the other ranks sent."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    x = tl.load(residual_ptr + row * stride_residual + columns, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * stride_delta + columns, mask=mask, other=0.0)
        delta = delta.to(tl.float32)
        if RANKS > 1:
            total = tl.zeros([BLOCK_D], dtype=tl.float32)
            for peer in tl.static_range(RANKS):
                if peer == RANK:
                    part = delta
                else:
                    place = received_ptr + peer * stride_rank + row * stride_received + columns
                    part = tl.load(place, mask=mask, other=0.0).to(tl.float32)
                if peer == 0:
                    total = part
                else:
                    total += part
            delta = total.to(delta_ptr.dtype.element_ty).to(tl.float32)  # as an all-reduce rounds
        summed = (x + delta).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * stride_residual + columns, summed, mask=mask)
        x = summed.to(tl.float32)
    variance = tl.sum(x * x, axis=0) / D
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(variance + eps) * weight
    tl.store(out_ptr + row * stride_out + columns, normed.to(out_ptr.dtype.element_ty), mask=mask)


@register("norm", "triton", "cuda")
def add_rms_norm(
    residual_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor,
    out_TD: Tensor,
    eps: float,
    num_sms: int,
    received: Received | None = None,
) -> None:
    """residual_TD += delta_TD, summed over the ranks; out_TD = RMSNorm(residual_TD) * weight_D."""
    rows, width = residual_TD.shape
    if not rows:
        return
    delta = residual_TD if delta_TD is None else delta_TD
    ranks, rank, parts, stride_rank, stride_received = 1, 0, delta, 0, 0
    if delta_TD is not None and received is not None:
        parts, rank = received.parts_WTD, received.rank
        ranks, stride_rank, stride_received = parts.shape[0], parts.stride(0), parts.stride(1)
    _add_rms_norm[(rows,)](
        residual_TD,
        delta,
        parts,
        weight_D,
        out_TD,
        residual_TD.stride(0),
        delta.stride(0),
        stride_rank,
        stride_received,
        out_TD.stride(0),
        width,
        eps,
        HAS_DELTA=delta_TD is not None,
        RANK=rank,
        RANKS=ranks,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=8,
    )


@triton.jit
def _rope_append(  # noqa: ANN202
    qkv_ptr,  # noqa: ANN001
    positions_ptr,  # noqa: ANN001
    slots_ptr,  # noqa: ANN001
    cos_sin_ptr,  # noqa: ANN001
    k_pages_ptr,  # noqa: ANN001
    v_pages_ptr,  # noqa: ANN001
    stride_qkv,  # noqa: ANN001
    stride_page,  # noqa: ANN001
    stride_head,  # noqa: ANN001
    stride_slot,  # noqa: ANN001
    QO: tl.constexpr,
    KV: tl.constexpr,
    QO_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One row per program: all its heads at once."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    half = tl.arange(0, HALF)
    cos = tl.load(cos_sin_ptr + position * (2 * HALF) + half)[None, :]
    sin = tl.load(cos_sin_ptr + position * (2 * HALF) + HALF + half)[None, :]
    base = qkv_ptr + row * stride_qkv
    element = qkv_ptr.dtype.element_ty

    q_heads = tl.arange(0, QO_BLOCK)[:, None]
    q_mask = q_heads < QO
    q_first = base + q_heads * (2 * HALF) + half[None, :]
    a = tl.load(q_first, mask=q_mask, other=0.0).to(tl.float32)
    b = tl.load(q_first + HALF, mask=q_mask, other=0.0).to(tl.float32)
    tl.store(q_first, (a * cos - b * sin).to(element), mask=q_mask)
    tl.store(q_first + HALF, (b * cos + a * sin).to(element), mask=q_mask)

    kv_heads = tl.arange(0, KV_BLOCK)[:, None]
    kv_mask = kv_heads < KV
    k_first = base + (QO + kv_heads) * (2 * HALF) + half[None, :]
    a = tl.load(k_first, mask=kv_mask, other=0.0).to(tl.float32)
    b = tl.load(k_first + HALF, mask=kv_mask, other=0.0).to(tl.float32)
    first = (a * cos - b * sin).to(element)
    second = (b * cos + a * sin).to(element)
    tl.store(k_first, first, mask=kv_mask)
    tl.store(k_first + HALF, second, mask=kv_mask)
    cell = (slot // PAGE) * stride_page + kv_heads * stride_head + (slot % PAGE) * stride_slot
    tl.store(k_pages_ptr + cell + half[None, :], first, mask=kv_mask)
    tl.store(k_pages_ptr + cell + HALF + half[None, :], second, mask=kv_mask)

    v_first = base + (QO + KV + kv_heads) * (2 * HALF) + half[None, :]
    first = tl.load(v_first, mask=kv_mask, other=0.0)
    second = tl.load(v_first + HALF, mask=kv_mask, other=0.0)
    tl.store(v_pages_ptr + cell + half[None, :], first, mask=kv_mask)
    tl.store(v_pages_ptr + cell + HALF + half[None, :], second, mask=kv_mask)


@register("rope_append", "triton", "cuda")
def rope_append(
    qkv_TC: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    cos_sin_LH: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Rotate q and k in place, append k and v to the pages."""
    if not qkv_TC.shape[0]:
        return
    assert k_pages_PGBH.stride() == v_pages_PGBH.stride()
    _rope_append[(qkv_TC.shape[0],)](
        qkv_TC,
        positions_T,
        slots_T,
        cos_sin_LH,
        k_pages_PGBH,
        v_pages_PGBH,
        qkv_TC.stride(0),
        k_pages_PGBH.stride(0),
        k_pages_PGBH.stride(1),
        k_pages_PGBH.stride(2),
        QO=heads.num_qo_heads,
        KV=heads.num_kv_heads,
        QO_BLOCK=triton.next_power_of_2(heads.num_qo_heads),
        KV_BLOCK=triton.next_power_of_2(heads.num_kv_heads),
        HALF=heads.head_dim // 2,
        PAGE=k_pages_PGBH.shape[2],
        num_warps=4,
    )


@triton.jit
def _silu_mul(  # noqa: ANN202
    up_gate_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride_in,  # noqa: ANN001
    stride_out,  # noqa: ANN001
    F,  # noqa: ANN001
    BLOCK_F: tl.constexpr,
):
    """One block of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < F
    up = tl.load(up_gate_ptr + row * stride_in + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(up_gate_ptr + row * stride_in + F + columns, mask=mask, other=0.0)
    gate = gate.to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * stride_out + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(up_gate_T2F: Tensor, out_TF: Tensor) -> None:
    """out_TF = silu(gate) * up; up_gate_T2F holds up in its first F columns, gate after.

    Not an op of its own: `gemm_silu.py` launches it behind a GEMM.
    """
    rows, width = out_TF.shape
    if not rows:
        return
    block = 2048
    _silu_mul[(rows, triton.cdiv(width, block))](
        up_gate_T2F,
        out_TF,
        up_gate_T2F.stride(0),
        out_TF.stride(0),
        width,
        BLOCK_F=block,
        num_warps=8,
    )
