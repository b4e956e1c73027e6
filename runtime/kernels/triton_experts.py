"""Router and combine of mixture-of-experts layers in three kernels and one; no atomics.

    choose   logits of all experts, the best J of them, softmax over those
    place    one program an expert: where its rows start, and which comes where
    spread   each row to its J places

Shape legend: `experts`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import register

_BLOCK_M, _BLOCK_K, _BLOCK_R = 16, 256, 1024
_LEAST_EXPERTS = 16
"""Columns that a tensor-core instruction takes at least."""


@triton.jit
def _choose(  # noqa: ANN202
    x_ptr,  # noqa: ANN001
    weight_ptr,  # noqa: ANN001
    experts_ptr,  # noqa: ANN001
    weights_ptr,  # noqa: ANN001
    T,  # noqa: ANN001
    stride_x,  # noqa: ANN001
    D: tl.constexpr,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    J: tl.constexpr,
    J_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M rows a program."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    experts = tl.arange(0, E_BLOCK)
    logits = tl.zeros((BLOCK_M, E_BLOCK), dtype=tl.float32)
    for first in range(0, D, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        inside = columns < D
        x = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * stride_x + columns[None, :],
            mask=(rows[:, None] < T) & inside[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + experts[:, None] * D + columns[None, :],
            mask=(experts[:, None] < E) & inside[None, :],
            other=0.0,
        )
        logits = tl.dot(x, weight.T, logits, input_precision="ieee")
    logits = tl.where(experts[None, :] < E, logits, float("-inf"))
    turns = tl.arange(0, J_BLOCK)
    best = tl.max(logits, axis=1)
    weights = tl.zeros((BLOCK_M, J_BLOCK), dtype=tl.float32)
    for turn in tl.static_range(J):
        value = tl.max(logits, axis=1)
        expert = tl.argmax(logits, axis=1)
        weights = tl.where(turns[None, :] == turn, tl.exp(value - best)[:, None], weights)
        logits = tl.where(experts[None, :] == expert[:, None], float("-inf"), logits)
        tl.store(experts_ptr + rows * J + turn, expert, mask=rows < T)
    weights = weights / tl.sum(weights, axis=1)[:, None]
    tl.store(
        weights_ptr + rows[:, None] * J + turns[None, :],
        weights,
        mask=(rows[:, None] < T) & (turns[None, :] < J),
    )


@triton.jit
def _place(  # noqa: ANN202
    experts_ptr,  # noqa: ANN001
    offsets_ptr,  # noqa: ANN001
    places_ptr,  # noqa: ANN001
    R,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    """One expert a program: it counts the rows of those before it, then numbers its own."""
    expert = tl.program_id(0)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, R, BLOCK):
        index = first + tl.arange(0, BLOCK)
        chosen = tl.load(experts_ptr + index, mask=index < R, other=2147483647)
        before += (chosen < expert).to(tl.int32)
    start = tl.sum(before, axis=0)
    for first in range(0, R, BLOCK):
        index = first + tl.arange(0, BLOCK)
        chosen = tl.load(experts_ptr + index, mask=index < R, other=2147483647)
        is_own = (chosen == expert).to(tl.int32)
        tl.store(places_ptr + index, start + tl.cumsum(is_own, axis=0) - 1, mask=is_own > 0)
        start += tl.sum(is_own, axis=0)
    tl.store(offsets_ptr + expert, start)


@triton.jit
def _spread(  # noqa: ANN202
    x_ptr,  # noqa: ANN001
    places_ptr,  # noqa: ANN001
    routed_ptr,  # noqa: ANN001
    stride_x,  # noqa: ANN001
    stride_routed,  # noqa: ANN001
    D,  # noqa: ANN001
    J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row a program, read once and written J times."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * stride_x + columns, mask=columns < D)
    for turn in tl.static_range(J):
        place = tl.load(places_ptr + row * J + turn).to(tl.int64)
        tl.store(routed_ptr + place * stride_routed + columns, x, mask=columns < D)


@triton.jit
def _combine(  # noqa: ANN202
    rows_ptr,  # noqa: ANN001
    places_ptr,  # noqa: ANN001
    weights_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride_rows,  # noqa: ANN001
    stride_out,  # noqa: ANN001
    D,  # noqa: ANN001
    J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of the result a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for turn in tl.static_range(J):
        place = tl.load(places_ptr + row * J + turn).to(tl.int64)
        weight = tl.load(weights_ptr + row * J + turn)
        part = tl.load(rows_ptr + place * stride_rows + columns, mask=columns < D, other=0.0)
        total += weight * part.to(tl.float32)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_out + columns, out, mask=columns < D)


@register("moe_router", "triton", "cuda")
def moe_router(
    x_TD: Tensor,
    weight_ED: Tensor,
    routed_RD: Tensor,
    offsets_E: Tensor,
    places_TJ: Tensor,
    weights_TJ: Tensor,
    num_sms: int,
) -> None:
    """Of equal logits, the expert with the smaller number is taken."""
    (rows, hidden), per_token = x_TD.shape, places_TJ.shape[1]
    num_experts = weight_ED.shape[0]
    for tensor in (weight_ED, places_TJ, weights_TJ):
        assert tensor.is_contiguous(), tensor.stride()
    experts_TJ = torch.empty_like(places_TJ)
    _choose[(triton.cdiv(rows, _BLOCK_M),)](
        x_TD,
        weight_ED,
        experts_TJ,
        weights_TJ,
        rows,
        x_TD.stride(0),
        D=hidden,
        E=num_experts,
        E_BLOCK=max(_LEAST_EXPERTS, triton.next_power_of_2(num_experts)),
        J=per_token,
        J_BLOCK=triton.next_power_of_2(per_token),
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
    )
    _place[(num_experts,)](
        experts_TJ, offsets_E, places_TJ, rows * per_token, BLOCK=_BLOCK_R, num_warps=8
    )
    _spread[(rows,)](
        x_TD,
        places_TJ,
        routed_RD,
        x_TD.stride(0),
        routed_RD.stride(0),
        hidden,
        J=per_token,
        BLOCK_D=triton.next_power_of_2(hidden),
        num_warps=8,
    )


@register("moe_combine", "triton", "cuda")
def moe_combine(
    rows_RD: Tensor, places_TJ: Tensor, weights_TJ: Tensor, out_TD: Tensor, num_sms: int
) -> None:
    """Weighted sum in fp32, best expert first."""
    hidden = out_TD.shape[1]
    _combine[(out_TD.shape[0],)](
        rows_RD,
        places_TJ,
        weights_TJ,
        out_TD,
        rows_RD.stride(0),
        out_TD.stride(0),
        hidden,
        J=places_TJ.shape[1],
        BLOCK_D=triton.next_power_of_2(hidden),
        num_warps=8,
    )
