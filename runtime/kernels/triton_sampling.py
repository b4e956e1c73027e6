"""What sampling does to whole rows of logits in one pass each: noise, mass above a threshold.

One program a row; blocks of a row are taken in order, so that results are the same bit by bit
whatever the other rows are. See `sampling_rows` for what is computed.

Shape legend: `sampling_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling_rows import LARGEST_UNIFORM

_BLOCK = 4096
_LARGEST_UNIFORM = tl.constexpr(LARGEST_UNIFORM)
_NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _mix32(x):  # noqa: ANN001, ANN202
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(token_ids, first_key, second_key):  # noqa: ANN001, ANN202
    x = _mix32(_mix32(token_ids + first_key) ^ second_key)
    uniform = tl.minimum((x.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _LARGEST_UNIFORM)
    # -log(1 - u): its series where 1 - u would lose the digits of u.
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.33333333 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.015625, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def _noisy_best(  # noqa: ANN202
    logits_ptr,  # noqa: ANN001
    thresholds_ptr,  # noqa: ANN001
    temperatures_ptr,  # noqa: ANN001
    keys_ptr,  # noqa: ANN001
    best_ptr,  # noqa: ANN001
    columns_ptr,  # noqa: ANN001
    stride,  # noqa: ANN001
    vocab_start,  # noqa: ANN001
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(thresholds_ptr + row)
    temperature = tl.load(temperatures_ptr + row)
    first_key = tl.load(keys_ptr + 2 * row).to(tl.uint32)
    second_key = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_column = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(
            logits_ptr + row * stride + columns, mask=columns < V, other=float("-inf")
        ).to(tl.float32)
        noise = _gumbel((columns + vocab_start).to(tl.uint32), first_key, second_key)
        noisy = tl.where(logits >= threshold, logits + temperature * noise, float("-inf"))
        is_better = noisy > best
        best = tl.where(is_better, noisy, best)
        best_column = tl.where(is_better, columns, best_column)
    top = tl.max(best, axis=0)
    tl.store(best_ptr + row, top)
    tl.store(columns_ptr + row, tl.min(tl.where(best == top, best_column, _NO_TOKEN), axis=0))


@triton.jit
def _largest(  # noqa: ANN202
    logits_ptr,  # noqa: ANN001
    best_ptr,  # noqa: ANN001
    columns_ptr,  # noqa: ANN001
    stride,  # noqa: ANN001
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_column = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(
            logits_ptr + row * stride + columns, mask=columns < V, other=float("-inf")
        ).to(tl.float32)
        is_better = logits > best
        best = tl.where(is_better, logits, best)
        best_column = tl.where(is_better, columns, best_column)
    top = tl.max(best, axis=0)
    tl.store(best_ptr + row, top.to(best_ptr.dtype.element_ty))
    tl.store(columns_ptr + row, tl.min(tl.where(best == top, best_column, _NO_TOKEN), axis=0))


@triton.jit
def _kept_mass(  # noqa: ANN202
    logits_ptr,  # noqa: ANN001
    thresholds_ptr,  # noqa: ANN001
    largest_ptr,  # noqa: ANN001
    scales_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride,  # noqa: ANN001
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(thresholds_ptr + row)
    largest = tl.load(largest_ptr + row)
    scale = tl.load(scales_ptr + row)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < V
        logits = tl.load(logits_ptr + row * stride + columns, mask=inside, other=0.0)
        logits = logits.to(tl.float32)
        powers = tl.exp((logits - largest) * scale)
        total += tl.where(inside & (logits >= threshold), powers, 0.0).to(tl.float64)
    tl.store(out_ptr + row, tl.sum(total, axis=0))


def largest(logits_RV: Tensor, best_R: Tensor, columns_R: Tensor) -> None:
    """The largest logit of each row and its column, of equal ones the first.

    Args:
        logits_RV: rows of consecutive columns.
        best_R: takes the logits, in their type.
        columns_R: int64, takes the columns.
    """
    rows, vocab = logits_RV.shape
    _check(logits_RV, best_R, columns_R)
    if rows:
        _largest[(rows,)](
            logits_RV,
            best_R,
            columns_R,
            logits_RV.stride(0),
            V=vocab,
            BLOCK=_BLOCK,
            num_warps=8,
        )


def noisy_best(
    logits_RV: Tensor,
    thresholds_R: Tensor,
    temperatures_R: Tensor,
    keys_R2: Tensor,
    vocab_start: int,
) -> tuple[Tensor, Tensor]:
    """See `sampling_rows.noisy_best`."""
    rows, vocab = logits_RV.shape
    best_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    columns_R = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    _check(logits_RV, thresholds_R, temperatures_R, keys_R2)
    if rows == 0:
        return best_R, columns_R
    _noisy_best[(rows,)](
        logits_RV,
        thresholds_R,
        temperatures_R,
        keys_R2,
        best_R,
        columns_R,
        logits_RV.stride(0),
        vocab_start,
        V=vocab,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return best_R, columns_R


def kept_mass(
    logits_RV: Tensor, thresholds_R: Tensor, largest_R: Tensor, scales_R: Tensor
) -> Tensor:
    """See `sampling_rows.kept_mass`."""
    rows, vocab = logits_RV.shape
    out_R = torch.empty(rows, dtype=torch.float64, device=logits_RV.device)
    _check(logits_RV, thresholds_R, largest_R, scales_R)
    if rows == 0:
        return out_R
    _kept_mass[(rows,)](
        logits_RV,
        thresholds_R,
        largest_R,
        scales_R,
        out_R,
        logits_RV.stride(0),
        V=vocab,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return out_R


def _check(logits_RV: Tensor, *by_row: Tensor) -> None:
    assert logits_RV.stride(1) == 1, logits_RV.stride()
    for tensor in by_row:
        assert tensor.is_contiguous(), tensor.stride()
