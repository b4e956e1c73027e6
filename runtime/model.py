"""A plain forward pass, to check the executor against: no nano-ops, no buffers, no kernels.

Every step is spelled out request by request in full precision, from the same weights and cached
keys; nothing is shared with the executor but the weights.

Shape legend: T rows of the logical batch, D hidden, N keys of one request, G kv heads, M query
heads of one kv head, H head dim, R logit rows, V this rank's vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from .batching import Request
from .kv_cache import PagedKvCache
from .weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOutput:
    """Result of `reference_forward`, rows in the order of the logical batch."""

    layer_outputs_TD: tuple[Tensor, ...]
    logits_RV: Tensor
    """Rows that predict a token, in request order; this rank's part of the vocabulary."""
    margins_T: tuple[Tensor, ...]
    """Per layer, [T]: how far the row is from other experts, in any layer so far."""


def reference_forward(
    weights: Weights,
    cache: PagedKvCache,
    requests: Sequence[Request],
    dtype: torch.dtype = torch.float64,
) -> ReferenceOutput:
    """Run one iteration; the cache is read at earlier positions and left as it is.

    With several tensor-parallel ranks, all of them must call it: partial sums are added over the
    default process group.
    """
    starts = [0, *accumulate(request.num_rows for request in requests)]
    token_ids = [token for request in requests for token in request.token_ids]
    positions = [
        request.first_position + offset
        for request in requests
        for offset in range(request.num_rows)
    ]
    device = weights.device
    positions_T = torch.tensor(positions, device=device)
    x_TD = weights.embedding_VD[torch.tensor(token_ids, device=device)].to(dtype)
    outputs: list[Tensor] = []
    margins: list[Tensor] = [torch.full_like(positions_T, float("inf"), dtype=dtype)]
    for layer, layer_weights in enumerate(weights.layers):
        past = _Past(cache.k_pages[layer], cache.v_pages[layer], cache.page_size)
        x_TD = _attention(weights, layer_weights, past, requests, starts, positions_T, x_TD)
        normed_TD = _norm(x_TD, layer_weights.ffn_norm_D, weights.model.rms_norm_eps)
        ffn_TD, margin_T = _feed_forward(weights, layer_weights, normed_TD)
        x_TD = x_TD + _sum_over_ranks(ffn_TD, weights)
        outputs.append(x_TD)
        margins.append(torch.minimum(margins[-1], margin_T))
    last = [
        start + request.num_rows - 1
        for start, request in zip(starts, requests, strict=False)
        if request.is_complete
    ]
    normed_RD = _norm(x_TD[last], weights.final_norm_D, weights.model.rms_norm_eps)
    return ReferenceOutput(
        layer_outputs_TD=tuple(outputs),
        logits_RV=normed_RD @ weights.lm_head_VD.to(dtype).t(),
        margins_T=tuple(margins[1:]),
    )


@dataclass(frozen=True, slots=True)
class _Past:
    k_pages_PGBH: Tensor
    v_pages_PGBH: Tensor
    page_size: int

    def read(self, request: Request) -> tuple[Tensor, Tensor]:
        """Keys and values before this iteration, [N, G, H]."""
        count = request.first_position
        pages = torch.tensor(
            request.pages[: -(-count // self.page_size)],
            dtype=torch.int64,
            device=self.k_pages_PGBH.device,
        )
        k_NGH, v_NGH = (
            pages_PGBH[pages].transpose(1, 2).flatten(0, 1)[:count]
            for pages_PGBH in (self.k_pages_PGBH, self.v_pages_PGBH)
        )
        return k_NGH, v_NGH


def _attention(
    weights: Weights,
    layer: LayerWeights,
    past: _Past,
    requests: Sequence[Request],
    starts: Sequence[int],
    positions_T: Tensor,
    x_TD: Tensor,
) -> Tensor:
    heads, eps, dtype = weights.heads, weights.model.rms_norm_eps, x_TD.dtype
    qkv_TC = _norm(x_TD, layer.attn_norm_D, eps) @ layer.kqv_CD.to(dtype).t()
    if layer.kqv_bias_C is not None:
        qkv_TC = qkv_TC + layer.kqv_bias_C.to(dtype)
    q_TQ, k_TK, v_TK = qkv_TC.split([heads.qo_size, heads.kv_size, heads.kv_size], dim=-1)
    cos_sin_TH = weights.cos_sin_LH[positions_T].to(dtype)
    q_TXH = _rotate(q_TQ.unflatten(1, (-1, heads.head_dim)), cos_sin_TH)
    k_TGH = _rotate(k_TK.unflatten(1, (-1, heads.head_dim)), cos_sin_TH)
    v_TGH = v_TK.unflatten(1, (-1, heads.head_dim))
    attended: list[Tensor] = []
    for start, request in zip(starts, requests, strict=False):
        rows = slice(start, start + request.num_rows)
        past_k_NGH, past_v_NGH = past.read(request)
        k_NGH = torch.cat((past_k_NGH.to(dtype), k_TGH[rows]))
        v_NGH = torch.cat((past_v_NGH.to(dtype), v_TGH[rows]))
        attended.append(_attend(q_TXH[rows], k_NGH, v_NGH, request.first_position))
    return x_TD + _sum_over_ranks(torch.cat(attended) @ layer.o_proj_DQ.to(dtype).t(), weights)


def _feed_forward(weights: Weights, layer: LayerWeights, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank adds to the residual, and by row how clear the choice of experts was.

    A margin is the distance between the last expert chosen and the first that was not, in units of
    the standard deviation of the row's logits.
    """
    if layer.router_ED is None:
        unlimited_T = x_TD.new_full((x_TD.shape[0],), float("inf"))
        return _swiglu(x_TD, layer.up_gate_2FD, layer.down_DF), unlimited_T
    per_token = weights.model.num_experts_per_tok or 1
    logits_TE = x_TD @ layer.router_ED.to(x_TD.dtype).t()
    ranked_TE, experts_TE = logits_TE.sort(dim=-1, descending=True)
    gates_TE = torch.zeros_like(logits_TE)
    kept = slice(None), slice(per_token)
    gates_TE.scatter_(1, experts_TE[kept], torch.softmax(ranked_TE[kept], dim=-1))
    out_TD = torch.zeros_like(x_TD)
    for expert in range(logits_TE.shape[1]):
        rows_T = gates_TE[:, expert] > 0
        part_TD = _swiglu(x_TD[rows_T], layer.up_gate_2FD[expert], layer.down_DF[expert])
        out_TD[rows_T] += gates_TE[rows_T, expert, None] * part_TD
    if per_token == logits_TE.shape[1]:
        return out_TD, x_TD.new_full((x_TD.shape[0],), float("inf"))
    gap_T = ranked_TE[:, per_token - 1] - ranked_TE[:, per_token]
    return out_TD, gap_T / logits_TE.std(dim=-1)


def _swiglu(x_TD: Tensor, up_gate_2FD: Tensor, down_DF: Tensor) -> Tensor:
    up_TF, gate_TF = (x_TD @ up_gate_2FD.to(x_TD.dtype).t()).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate_TF) * up_TF) @ down_DF.to(x_TD.dtype).t()


def _norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_TD / torch.sqrt(x_TD.square().mean(-1, keepdim=True) + eps) * weight_D.to(x_TD.dtype)


def _rotate(x_TXH: Tensor, cos_sin_TH: Tensor) -> Tensor:
    half = x_TXH.shape[-1] // 2
    cos_TXh, sin_TXh = cos_sin_TH[:, None, :half], cos_sin_TH[:, None, half:]
    first_TXh, second_TXh = x_TXH[..., :half], x_TXH[..., half:]
    return torch.cat(
        (first_TXh * cos_TXh - second_TXh * sin_TXh, second_TXh * cos_TXh + first_TXh * sin_TXh),
        dim=-1,
    )


def _attend(q_TXH: Tensor, k_NGH: Tensor, v_NGH: Tensor, first_position: int) -> Tensor:
    """Row t sees keys 0 to first_position + t; returns [T, Q]."""
    num_rows, num_keys = q_TXH.shape[0], k_NGH.shape[0]
    q_TGMH = q_TXH.unflatten(1, (k_NGH.shape[1], -1))
    scores_GMTN = torch.einsum("tgmh,ngh->gmtn", q_TGMH, k_NGH) / q_TXH.shape[-1] ** 0.5
    if num_rows > 1:
        keys_N = torch.arange(num_keys, device=q_TXH.device)
        last_T = first_position + torch.arange(num_rows, device=q_TXH.device)
        scores_GMTN = scores_GMTN.masked_fill(keys_N > last_T[:, None], float("-inf"))
    out_TGMH = torch.einsum("gmtn,ngh->tgmh", torch.softmax(scores_GMTN, dim=-1), v_NGH)
    return out_TGMH.flatten(1)


def _sum_over_ranks(x_TD: Tensor, weights: Weights) -> Tensor:
    if weights.tp_degree > 1:
        x_TD = x_TD.contiguous()
        dist.all_reduce(x_TD)
    return x_TD
