"""From logits to tokens: what the executor calls behind the LM head.

A sampler is bound to a number of logit rows. Calling it launches on the current stream, allocates
nothing that a CUDA graph could not hold, and waits for nothing; every rank gets the same tokens.

Shape legend: R logit rows, V this rank's part of the vocabulary, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .kernels import torch_ops
from .weights import Weights


class Sampler(Protocol):
    """Chooses one token for each row of logits."""

    next_token_ids_R: Tensor
    """int64: what the last call chose, the same on every rank."""

    def __call__(self, logits_RV: Tensor) -> None:
        """Launch on the current stream."""
        ...


MakeSampler = Callable[[Weights, int], Sampler]
"""Makes the sampler of a rank for a number of logit rows."""


class GreedySampler:
    """The most likely token of each row; of equally likely ones, that with the smallest id."""

    def __init__(self, weights: Weights, num_rows: int) -> None:
        """Allocate for `num_rows` rows."""
        dtype, device, ranks = weights.lm_head_VD.dtype, weights.device, weights.tp_degree
        self._ranks, self._vocab_start = ranks, weights.vocab_start
        self._best_R = torch.empty(num_rows, dtype=dtype, device=device)
        self._local_ids_R = torch.empty(num_rows, dtype=torch.int64, device=device)
        self.next_token_ids_R = torch.empty_like(self._local_ids_R)
        self._all_best_WR = torch.empty((ranks, num_rows), dtype=dtype, device=device)
        self._all_ids_WR = torch.empty((ranks, num_rows), dtype=torch.int64, device=device)
        self._best_by_rank = list(self._all_best_WR.unbind(0))
        self._ids_by_rank = list(self._all_ids_WR.unbind(0))

    def __call__(self, logits_RV: Tensor) -> None:
        """Launch on the current stream."""
        if self._ranks == 1:
            torch_ops.sampling(logits_RV, self._best_R, self.next_token_ids_R, 0)
            return
        torch_ops.sampling(logits_RV, self._best_R, self._local_ids_R, 0)
        self._local_ids_R.add_(self._vocab_start)
        dist.all_gather(self._best_by_rank, self._best_R)
        dist.all_gather(self._ids_by_rank, self._local_ids_R)
        winner_1R = self._all_best_WR.argmax(dim=0, keepdim=True)
        torch.gather(self._all_ids_WR, 0, winner_1R, out=self.next_token_ids_R.unsqueeze(0))
