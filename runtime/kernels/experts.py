"""Router and combine of mixture-of-experts layers by PyTorch: the CPU path, and a reference.

A router sends each row to its best experts and lays the rows out for grouped GEMMs: sorted by
expert, rows of an expert in the order of the batch. Nothing waits for the device. The Triton
variants are in `triton_experts`.

Shape legend: T rows, D hidden, E experts, J experts of a row, R = T x J routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register


@register("moe_router", "torch", "cpu")
@register("moe_router", "torch", "cuda")
def moe_router(
    x_TD: Tensor,
    weight_ED: Tensor,
    routed_RD: Tensor,
    offsets_E: Tensor,
    places_TJ: Tensor,
    weights_TJ: Tensor,
    num_sms: int,
) -> None:
    """Softmax over the logits of the J best experts; of equal ones, some are taken."""
    per_token = places_TJ.shape[1]
    logits_TE = x_TD.float() @ weight_ED.float().t()
    best = logits_TE.topk(per_token, dim=1)
    weights_TJ.copy_(best.values.softmax(dim=1))
    experts_R, order_R = best.indices.flatten().sort(stable=True)
    torch.index_select(x_TD, 0, order_R // per_token, out=routed_RD)
    experts_E = torch.arange(offsets_E.shape[0], device=x_TD.device)
    offsets_E.copy_(torch.searchsorted(experts_R, experts_E, right=True))
    rows_R = torch.arange(order_R.shape[0], device=x_TD.device, dtype=places_TJ.dtype)
    places_TJ.view(-1).index_copy_(0, order_R, rows_R)


@register("moe_combine", "torch", "cpu")
@register("moe_combine", "torch", "cuda")
def moe_combine(
    rows_RD: Tensor, places_TJ: Tensor, weights_TJ: Tensor, out_TD: Tensor, num_sms: int
) -> None:
    """Weighted sum in fp32."""
    parts_TJD = rows_RD[places_TJ.long()].float()
    out_TD.copy_((parts_TJD * weights_TJ.unsqueeze(-1)).sum(dim=1))
