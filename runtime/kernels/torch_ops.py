"""Variant `torch` of every op kind: the CPU path, and a readable reference on any device.

Accumulates in fp32, writes only the rows it was given, and never waits for the device, so that the
same kernels can be captured in a CUDA graph. `num_sms` is ignored.

Shape legend as in `registry.py`; further N keys gathered, M query heads of one kv head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gather_buffer import check_shapes
from .registry import DecodeRows, HeadShape, PrefillRows, Received, register

_GATHER_ELEMENTS = 1 << 26
"""Decode rows are worked on in chunks that gather at most this many key elements."""


@register("embedding", "torch", "cpu")
@register("embedding", "torch", "cuda")
def embedding(token_ids_T: Tensor, weight_VD: Tensor, out_TD: Tensor, num_sms: int) -> None:
    """out_TD = weight_VD[token_ids_T]."""
    torch.index_select(weight_VD, 0, token_ids_T, out=out_TD)


@register("gemm", "torch", "cpu")
@register("gemm", "torch", "cuda")
def gemm(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_TN: Tensor, num_sms: int
) -> None:
    """out_TN = x_TK @ weight_NK^T (+ bias_N)."""
    if bias_N is None:
        torch.mm(x_TK, weight_NK.t(), out=out_TN)
    else:
        torch.addmm(bias_N, x_TK, weight_NK.t(), out=out_TN)


def _sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Sum in fp32, first part first, rounded to the parts' dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@register("norm", "torch", "cpu")
@register("norm", "torch", "cuda")
def norm(
    residual_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor,
    out_TD: Tensor,
    eps: float,
    num_sms: int,
    received: Received | None = None,
) -> None:
    """residual_TD += delta_TD (when given); out_TD = RMSNorm(residual_TD) * weight_D."""
    if delta_TD is not None and received is not None:
        parts = list(received.parts_WTD.unbind(0))
        parts[received.rank] = delta_TD
        delta_TD = _sum_in_order(parts)
    if delta_TD is not None:
        residual_TD.add_(delta_TD)
    x_TD = residual_TD.float()
    scale_T1 = torch.rsqrt(x_TD.square().mean(dim=-1, keepdim=True) + eps)
    out_TD.copy_(x_TD * scale_T1 * weight_D.float())


@register("rope_append", "torch", "cpu")
@register("rope_append", "torch", "cuda")
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
    """Rotate q and k in place; append k and v to the paged cache."""
    num_rows, page_size = qkv_TC.shape[0], k_pages_PGBH.shape[2]
    rotated = heads.num_qo_heads + heads.num_kv_heads
    qkv_TXH = qkv_TC.view(num_rows, rotated + heads.num_kv_heads, heads.head_dim)
    cos_T1h, sin_T1h = cos_sin_LH[positions_T].unsqueeze(1).chunk(2, dim=-1)
    first_TXh, second_TXh = qkv_TXH[:, :rotated].float().chunk(2, dim=-1)
    qkv_TXH[:, :rotated] = torch.cat(
        (
            first_TXh * cos_T1h - second_TXh * sin_T1h,
            second_TXh * cos_T1h + first_TXh * sin_T1h,
        ),
        dim=-1,
    ).to(qkv_TC.dtype)
    pages_T = torch.div(slots_T, page_size, rounding_mode="floor").long()
    offsets_T = torch.remainder(slots_T, page_size).long()
    k_pages_PGBH[pages_T, :, offsets_T] = qkv_TXH[:, heads.num_qo_heads : rotated]
    v_pages_PGBH[pages_T, :, offsets_T] = qkv_TXH[:, rotated:]


def _attend(
    q_RGMH: Tensor, k_RNGH: Tensor, v_RNGH: Tensor, is_visible_RN: Tensor, head_dim: int
) -> Tensor:
    """Softmax attention in fp32; keys outside the mask do not reach the result, NaN or not."""
    hidden_RN11 = ~is_visible_RN[:, :, None, None]
    k_RNGH = k_RNGH.float().masked_fill(hidden_RN11, 0.0)
    v_RNGH = v_RNGH.float().masked_fill(hidden_RN11, 0.0)
    scores_RGMN = torch.einsum("rgmh,rngh->rgmn", q_RGMH.float(), k_RNGH) * head_dim**-0.5
    scores_RGMN = scores_RGMN.masked_fill(~is_visible_RN[:, None, None, :], float("-inf"))
    return torch.einsum("rgmn,rngh->rgmh", torch.softmax(scores_RGMN, dim=-1), v_RNGH)


def _gather(pages_PGBH: Tensor, page_table_RP: Tensor) -> Tensor:
    """Keys or values of some requests, [R, P x B, G, H]."""
    gathered_RPGBH = pages_PGBH[page_table_RP.long()]
    return gathered_RPGBH.transpose(2, 3).flatten(1, 2)


@register("decode_attention", "torch", "cpu")
@register("decode_attention", "torch", "cuda")
def decode_attention(
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: DecodeRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Each row attends to the keys of its own request."""
    page_size = k_pages_PGBH.shape[2]
    num_pages = -(-rows.max_kv_len // page_size)
    chunk = max(1, _GATHER_ELEMENTS // (num_pages * page_size * heads.kv_size))
    positions_N = torch.arange(num_pages * page_size, device=qkv_TC.device)
    for start in range(0, rows.num_rows, chunk):
        row_ids_R = rows.row_ids_R[start : start + chunk].long()
        page_table_RP = rows.page_table_RP[start : start + chunk, :num_pages]
        q_RQ = qkv_TC.index_select(0, row_ids_R)[:, : heads.qo_size]
        out_RGMH = _attend(
            q_RQ.unflatten(1, (heads.num_kv_heads, -1, heads.head_dim)),
            _gather(k_pages_PGBH, page_table_RP),
            _gather(v_pages_PGBH, page_table_RP),
            positions_N < rows.kv_lens_R[start : start + chunk, None],
            heads.head_dim,
        )
        out_TQ.index_copy_(0, row_ids_R, out_RGMH.flatten(1).to(out_TQ.dtype))


@register("prefill_attention", "torch", "cpu")
@register("prefill_attention", "torch", "cuda")
def prefill_attention(
    qkv_TC: Tensor,
    k_pages_PGBH: Tensor,
    v_pages_PGBH: Tensor,
    rows: PrefillRows,
    out_TQ: Tensor,
    heads: HeadShape,
    num_sms: int,
) -> None:
    """Rows of a segment attend causally to all cached keys of their request."""
    num_pages = -(-rows.max_kv_len // k_pages_PGBH.shape[2])
    positions_N = torch.arange(num_pages * k_pages_PGBH.shape[2], device=qkv_TC.device)
    for segment, num_rows in enumerate(rows.segment_rows):
        offsets_T = torch.arange(num_rows, device=qkv_TC.device)
        row_ids_T = rows.row_starts_S[segment] + offsets_T
        position_T1 = (rows.position_starts_S[segment] + offsets_T)[:, None]
        page_table_P = rows.page_table_SP[segment, :num_pages]
        q_TGMH = (
            qkv_TC.index_select(0, row_ids_T)[:, : heads.qo_size]
            .unflatten(1, (heads.num_kv_heads, -1, heads.head_dim))
            .float()
        )
        out_TGMH = _attend_causal(
            q_TGMH,
            _gather(k_pages_PGBH, page_table_P[None])[0].float(),
            _gather(v_pages_PGBH, page_table_P[None])[0].float(),
            positions_N <= position_T1,
            heads.head_dim,
        )
        out_TQ.index_copy_(0, row_ids_T, out_TGMH.flatten(1).to(out_TQ.dtype))


def _attend_causal(
    q_TGMH: Tensor, k_NGH: Tensor, v_NGH: Tensor, is_visible_TN: Tensor, head_dim: int
) -> Tensor:
    hidden_N11 = ~is_visible_TN[-1, :, None, None]  # no row of the segment sees these keys
    k_NGH, v_NGH = k_NGH.masked_fill(hidden_N11, 0.0), v_NGH.masked_fill(hidden_N11, 0.0)
    scores_GTMN = torch.einsum("tgmh,ngh->gtmn", q_TGMH, k_NGH) * head_dim**-0.5
    scores_GTMN = scores_GTMN.masked_fill(~is_visible_TN[:, None, :], float("-inf"))
    return torch.einsum("gtmn,ngh->tgmh", torch.softmax(scores_GTMN, dim=-1), v_NGH)


@register("gemm_silu", "torch", "cpu")
@register("gemm_silu", "torch", "cuda")
def gemm_silu(
    x_TK: Tensor, weight_2FK: Tensor, scratch_T2F: Tensor, out_TF: Tensor, num_sms: int
) -> None:
    """out_TF = silu(x_TK @ gate^T) * (x_TK @ up^T), both products rounded to the dtype."""
    torch.mm(x_TK, weight_2FK.t(), out=scratch_T2F)
    up_TF, gate_TF = scratch_T2F.chunk(2, dim=-1)
    out_TF.copy_(torch.nn.functional.silu(gate_TF.float()) * up_TF.float())


@register("all_reduce", "torch", "cuda")
def all_reduce(
    x_TD: Tensor,
    group: Any,  # noqa: ANN401 - process group
    num_sms: int,
    first_row: int = 0,
) -> None:
    """Sum over the ranks in place; no group means one rank.

    A mapping of groups (one for each NCCL variant) stands for the default group here.
    """
    if group is not None:
        dist.all_reduce(x_TD, group=None if isinstance(group, Mapping) else group)


@register("all_reduce", "torch", "cpu")
def all_reduce_in_rank_order(
    x_TD: Tensor,
    group: Any,  # noqa: ANN401 - process group
    num_sms: int,
    first_row: int = 0,
) -> None:
    """Sum in rank order: the same bits on every rank, for every split of the rows."""
    if group is None:
        return
    parts = [torch.empty_like(x_TD) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x_TD, group=group)
    x_TD.copy_(_sum_in_order(parts))


@register("all_gather", "torch", "cpu")
@register("all_gather", "torch", "cuda")
def all_gather(
    x_TW: Tensor,
    out_TD: Tensor,
    group: Any,  # noqa: ANN401 - process group
    num_sms: int,
    first_row: int = 0,
) -> None:
    """out_TD = the ranks' columns next to each other; no group means one rank.

    A mapping of groups (one for each NCCL variant) stands for the default group here.
    """
    known = None if isinstance(group, Mapping) else group
    world_size = 1 if group is None else dist.get_world_size(known)
    check_shapes(x_TW, out_TD, world_size)
    if group is None:
        out_TD.copy_(x_TW)
        return
    x_TW = x_TW.contiguous()
    parts = [torch.empty_like(x_TW) for _ in range(world_size)]
    dist.all_gather(parts, x_TW, group=known)
    torch.cat(parts, dim=1, out=out_TD)


@register("sampling", "torch", "cpu")
@register("sampling", "torch", "cuda")
def sampling(logits_RV: Tensor, best_R: Tensor, token_ids_R: Tensor, num_sms: int) -> None:
    """Greedy: the largest logit of each row and its column within this rank's vocabulary shard."""
    torch.max(logits_RV, dim=-1, out=(best_R, token_ids_R))
