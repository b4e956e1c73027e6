"""Grouped GEMM of mixture-of-experts layers by PyTorch: each expert's rows times its own weights.

Rows come sorted by expert. Where each expert's rows end is known on the device alone, so that
nothing waits for the router. The Triton variants are in `triton_grouped_gemm`.

Shape legend: T routed rows (tokens x experts per token), K depth, N width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register

_TMA_ALIGNMENT = 16
"""Bytes of which every row stride must be a multiple."""


@register("grouped_gemm", "torch", "cpu")
def grouped_gemm(
    x_TK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, out_TN: Tensor, num_sms: int
) -> None:
    """One expert after the other, fp32 accumulation; reads the offsets on the host.

    Raises:
        ValueError: the offsets fall, or leave the rows of `x_TK`.
    """
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if not start <= end <= x_TK.shape[0]:
            raise ValueError(
                f"offsets must rise from 0 to the number of rows, {x_TK.shape[0]}, but got "
                f"{offsets_E.tolist()}: pass the cumulative sum of each expert's rows"
            )
        out_TN[start:end] = (x_TK[start:end].float() @ weight_ENK[expert].float().T).to(
            out_TN.dtype
        )
        start = end


@register("grouped_gemm_silu", "torch", "cpu")
def grouped_gemm_silu(
    x_TK: Tensor,
    weight_E2FK: Tensor,
    offsets_E: Tensor,
    scratch_T2F: Tensor,
    out_TF: Tensor,
    num_sms: int,
) -> None:
    """Both products, rounded to the dtype, then SiLU x up."""
    grouped_gemm(x_TK, weight_E2FK, offsets_E, scratch_T2F, num_sms)
    up_TF, gate_TF = scratch_T2F.chunk(2, dim=-1)
    out_TF.copy_(torch.nn.functional.silu(gate_TF.float()) * up_TF.float())


@register("grouped_gemm", "torch_grouped", "cuda")
def torch_grouped_gemm(
    x_TK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, out_TN: Tensor, num_sms: int
) -> None:
    """PyTorch's grouped GEMM (bf16), which sizes its grid for the whole device.

    It has no `out`, so that its result is copied once.

    Raises:
        ValueError: a row stride that is no multiple of 16 bytes.
    """
    check_alignment(x_TK, weight_ENK, out_TN)
    out_TN.copy_(torch.nn.functional.grouped_mm(x_TK, weight_ENK.transpose(1, 2), offs=offsets_E))


def check_alignment(*tensors: Tensor) -> None:
    """Refuse operands that the tensor memory accelerator cannot address.

    Raises:
        ValueError: rows that are not contiguous, or a stride that is no multiple of 16 bytes.
    """
    for tensor in tensors:
        strides = tensor.stride()
        bad = [s for s in strides[:-1] if s * tensor.element_size() % _TMA_ALIGNMENT]
        if strides[-1] != 1 or bad:
            raise ValueError(
                f"a grouped GEMM takes contiguous rows with strides of a multiple of "
                f"{_TMA_ALIGNMENT} bytes, but got strides {strides} of {tensor.dtype}: pad them"
            )
