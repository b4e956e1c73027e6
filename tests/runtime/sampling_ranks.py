"""Samplers without a model: one rank's, or what the tests run on several."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from nanoflow_tune.runtime.sampling import SamplingTable, TokenSampler
from nanoflow_tune.runtime.step import SlotTaken


def make_sampler(logits_RV, params, seeds, *, rank=0, ranks=1, steps=0, vocab_size=None):
    """A sampler whose row r is in slot R - 1 - r, so that slots and rows differ."""
    share = -(-(vocab_size or logits_RV.shape[1]) // ranks)
    weights = SimpleNamespace(
        lm_head_VD=torch.empty(0, dtype=logits_RV.dtype),
        device=torch.device("cpu"),
        tp_degree=ranks,
        vocab_start=rank * share,
        model=SimpleNamespace(vocab_size=vocab_size or logits_RV.shape[1]),
    )
    rows = len(params)
    table = SamplingTable(rows, torch.device("cpu"))
    slots = [rows - 1 - row for row in range(rows)]
    table.take(
        [
            SlotTaken(slot=slot, sampling=sampling, seed=seed, num_generated=steps)
            for slot, sampling, seed in zip(slots, params, seeds, strict=True)
        ]
    )
    return TokenSampler(weights, rows, table=table, slots_R=torch.tensor(slots, dtype=torch.int64))


def sample(ctx, logits_RV, params, seeds, modes):
    """Sample on this rank's slice of the logits, once for each mode."""
    vocab = logits_RV.shape[1]
    share = -(-vocab // ctx.world_size)
    own_RV = logits_RV[:, ctx.rank * share : (ctx.rank + 1) * share].contiguous()
    sampler = make_sampler(
        own_RV, params, seeds, rank=ctx.rank, ranks=ctx.world_size, vocab_size=vocab
    )
    results = []
    for mode in modes:
        sampler.mode = mode
        sampler(own_RV)
        results.append(
            (
                sampler.next_token_ids_R.clone(),
                sampler.logprobs_R.clone(),
                sampler.top_logprobs_RK.clone(),
                sampler.top_ids_RK.clone(),
            )
        )
    return results
