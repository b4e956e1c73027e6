"""From logits to tokens: what the executor calls behind the LM head.

A sampler is bound to a number of logit rows. Calling it launches on the current stream, allocates
nothing that a CUDA graph could not hold, and waits for nothing; every rank gets the same tokens.
Of the vocabulary only what `truncation` says and one candidate a row pass between ranks.

    table = SamplingTable(num_slots, device)
    sampler = TokenSampler(weights, num_rows, table=table, slots_R=slots_R)
    table.take(slots_taken)                       # a request moves into a slot
    sampler.mode = mode_of(params of the step)    # what this step's rows need
    sampler(logits_RV)                            # next_token_ids_R, log-probabilities

Shape legend: R logit rows, V this rank's part of the vocabulary, W ranks, N slots and a spare one,
K alternatives reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .kernels import sampling_rows, torch_ops
from .sequence import MAX_LOGPROBS, SamplingParams
from .step import SlotTaken
from .truncation import FEW, Limits, Ranks, thresholds_from_few, thresholds_of_any
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
        self._largest: Callable[[Tensor, Tensor, Tensor], None] = _largest
        if device.type == "cuda":
            from .kernels import triton_sampling

            self._largest = triton_sampling.largest
        self._best_by_rank = list(self._all_best_WR.unbind(0))
        self._ids_by_rank = list(self._all_ids_WR.unbind(0))

    def __call__(self, logits_RV: Tensor) -> None:
        """Launch on the current stream."""
        if self._ranks == 1:
            self._largest(logits_RV, self._best_R, self.next_token_ids_R)
            return
        self._largest(logits_RV, self._best_R, self._local_ids_R)
        self._local_ids_R.add_(self._vocab_start)
        dist.all_gather(self._best_by_rank, self._best_R)
        dist.all_gather(self._ids_by_rank, self._local_ids_R)
        winner_1R = self._all_best_WR.argmax(dim=0, keepdim=True)
        torch.gather(self._all_ids_WR, 0, winner_1R, out=self.next_token_ids_R.unsqueeze(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingMode:
    """What the rows of one step need; passes over the logits that none needs are left out.

    A row's token is the same in every mode that has what the row needs.
    """

    is_random: bool = False
    """Some row has a temperature."""
    cut: Literal["nothing", "few", "any"] = "nothing"
    """How thresholds are found, see `truncation`."""
    has_top_k: bool = False
    has_top_p: bool = False
    has_logprobs: bool = False
    has_alternatives: bool = False


GREEDY = SamplingMode()


def mode_of(params: Iterable[SamplingParams]) -> SamplingMode:
    """What rows with these parameters need."""
    rows = list(params)
    drawn = [row for row in rows if row.temperature > 0]
    cut = [row for row in drawn if row.top_k > 0 or row.top_p < 1]
    are_few = all(0 < row.top_k <= FEW for row in cut)
    return SamplingMode(
        is_random=bool(drawn),
        cut="nothing" if not cut else "few" if are_few else "any",
        has_top_k=any(row.top_k > 0 for row in cut),
        has_top_p=any(row.top_p < 1 for row in cut),
        has_logprobs=any(row.logprobs is not None for row in rows),
        has_alternatives=any(row.logprobs for row in rows),
    )


class SamplingTable:
    """Sampling parameters by slot, on the device; the spare last slot is greedy."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        """Make all slots greedy."""
        self._words_XN = torch.zeros((5, num_slots + 1), dtype=torch.int64, device=device)
        self._temperatures_N = self._words_XN[0].view(torch.float64)
        self._top_ps_N = self._words_XN[1].view(torch.float64)
        self._top_ks_N, self._seeds_N, self._num_generated_N = self._words_XN[2:].unbind(0)
        self._top_ps_N.fill_(1.0)

    def take(self, taken: Sequence[SlotTaken]) -> None:
        """Put requests into slots; what runs already on the current stream keeps what it had."""
        if not taken:
            return
        sampling = [item.sampling for item in taken]
        numbers_2X = np.array([[s.temperature for s in sampling], [s.top_p for s in sampling]])
        words_X = [
            [item.slot for item in taken],
            [s.top_k for s in sampling],
            [_signed(item.seed) for item in taken],
            [item.num_generated for item in taken],
        ]
        words_4X = np.array(words_X, dtype=np.int64)
        host = torch.from_numpy(
            np.concatenate((words_4X[:1], numbers_2X.view(np.int64), words_4X[1:]))
        )
        device = self._words_XN.device
        if device.type == "cuda":
            host = host.pin_memory()  # kept by its allocator until the copy is done
        sent = host.to(device, non_blocking=True)
        self._words_XN.index_copy_(1, sent[0], sent[1:])

    def limits(self, slots_R: Tensor) -> Limits:
        """What the rows of these slots ask for."""
        return Limits(
            temperatures_R=self._temperatures_N[slots_R].float(),
            top_ks_R=self._top_ks_N[slots_R],
            top_ps_R=self._top_ps_N[slots_R],
        )

    def keys(self, slots_R: Tensor) -> Tensor:
        """Keys of the next token's noise, int64 [R, 2]."""
        return sampling_rows.row_keys(self._seeds_N[slots_R], self._num_generated_N[slots_R])

    def count_tokens(self, slots_R: Tensor) -> None:
        """One more token in each of these slots."""
        self._num_generated_N.index_add_(0, slots_R, torch.ones_like(slots_R))


class TokenSampler:
    """Tokens by each row's own parameters, and their log-probabilities.

    The same seed gives the same tokens whatever else is in the batch, and on any number of ranks,
    as far as the logits are the same.
    """

    def __init__(
        self, weights: Weights, num_rows: int, *, table: SamplingTable, slots_R: Tensor
    ) -> None:
        """Allocate for `num_rows` rows.

        Args:
            weights: whose logits are sampled.
            num_rows: logit rows.
            table: parameters; several samplers may share it.
            slots_R: int64, slot of each row; read by every call, so it may change between them.
        """
        self.mode = GREEDY
        """What the next call computes."""
        self._table, self._slots_R = table, slots_R
        self._vocab_start = weights.vocab_start
        self._ranks = Ranks(weights.tp_degree)
        self._greedy = GreedySampler(weights, num_rows)
        self.next_token_ids_R = self._greedy.next_token_ids_R
        new_RX = (num_rows, min(MAX_LOGPROBS, weights.model.vocab_size))
        device = weights.device
        self.logprobs_R = torch.empty(num_rows, dtype=torch.float32, device=device)
        """fp32, before temperature, top-k and top-p; of modes with `has_logprobs`."""
        self.top_ids_RK = torch.empty(new_RX, dtype=torch.int64, device=device)
        """Likeliest tokens, likeliest first; of modes with `has_alternatives`."""
        self.top_logprobs_RK = torch.empty(new_RX, dtype=torch.float32, device=device)
        self._noisy_best, self._kept_mass = sampling_rows.noisy_best, sampling_rows.kept_mass
        if device.type == "cuda":
            from .kernels import triton_sampling

            self._noisy_best, self._kept_mass = (
                triton_sampling.noisy_best,
                triton_sampling.kept_mass,
            )

    def __call__(self, logits_RV: Tensor) -> None:
        """Launch on the current stream."""
        if self.mode.is_random:
            self._draw(logits_RV)
        else:
            self._greedy(logits_RV)
        if self.mode.has_logprobs:
            self._report(logits_RV)
        self._table.count_tokens(self._slots_R)

    def _draw(self, logits_RV: Tensor) -> None:
        limits = self._table.limits(self._slots_R)
        best_R, columns_R = self._noisy_best(
            logits_RV,
            self._thresholds(logits_RV, limits),
            limits.temperatures_R,
            self._table.keys(self._slots_R),
            self._vocab_start,
        )
        columns_R = columns_R + self._vocab_start
        candidates_WR2 = self._ranks.gather(torch.stack((best_R.double(), columns_R.double()), 1))
        winners_1R = candidates_WR2[..., 0].argmax(dim=0, keepdim=True)
        chosen_R = candidates_WR2[..., 1].gather(0, winners_1R)[0]
        self.next_token_ids_R.copy_(chosen_R)

    def _thresholds(self, logits_RV: Tensor, limits: Limits) -> Tensor:
        mode, ranks = self.mode, self._ranks
        match mode.cut:
            case "nothing":
                return torch.full_like(limits.temperatures_R, float("-inf"))
            case "few":
                return thresholds_from_few(
                    logits_RV, limits, ranks, self._kept_mass, has_top_p=mode.has_top_p
                )
            case "any":
                return thresholds_of_any(
                    logits_RV,
                    limits,
                    ranks,
                    self._kept_mass,
                    has_top_k=mode.has_top_k,
                    has_top_p=mode.has_top_p,
                )

    def _report(self, logits_RV: Tensor) -> None:
        """Log-probabilities of the chosen tokens, and the likeliest ones."""
        largest_R = self._ranks.gather(logits_RV.amax(dim=1).float()).amax(dim=0)
        all_R, ones_R = torch.full_like(largest_R, float("-inf")), torch.ones_like(largest_R)
        mass_R = self._ranks.sum(self._kept_mass(logits_RV, all_R, largest_R, ones_R))
        log_sum_R = largest_R + mass_R.log().float()
        columns_R = self.next_token_ids_R - self._vocab_start
        is_here_R = (columns_R >= 0) & (columns_R < logits_RV.shape[1])
        own_R1 = columns_R.clamp(0, logits_RV.shape[1] - 1)[:, None]
        own_R = torch.where(is_here_R, logits_RV.gather(1, own_R1)[:, 0].float(), 0.0)
        torch.sub(self._ranks.sum(own_R), log_sum_R, out=self.logprobs_R)
        if self.mode.has_alternatives:
            count = self.top_ids_RK.shape[1]
            values_RK, ids_RK = self._ranks.top(logits_RV, count, self._vocab_start)
            self.top_ids_RK.copy_(ids_RK)
            torch.sub(values_RK, log_sum_R[:, None], out=self.top_logprobs_RK)


def _largest(logits_RV: Tensor, best_R: Tensor, columns_R: Tensor) -> None:
    torch_ops.sampling(logits_RV, best_R, columns_R, 0)


def _signed(seed: int) -> int:
    """The low 64 bits of a seed, as a signed number."""
    low = seed & (2**64 - 1)
    return low - 2**64 if low >= 2**63 else low
