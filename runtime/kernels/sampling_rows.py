"""What sampling does to whole rows of logits, by PyTorch: noise, and the mass above a threshold.

A token is drawn as the largest of logit + temperature x Gumbel noise, which picks token v with
probability softmax(logits / temperature)[v]. The noise of a token depends on nothing but the row's
key and the token's id, so that neither the other rows nor the split of the vocabulary over ranks
changes what is drawn. The Triton versions are in `triton_sampling`.

Shape legend: R logit rows, V this rank's vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_32 = 0xFFFFFFFF
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
LARGEST_UNIFORM = 1.0 - 2.0**-24
"""Largest fp32 below 1: its logarithm is finite."""


def mix32(x: Tensor) -> Tensor:
    """A permutation of the 32-bit integers in which every input bit moves about half of them.

    Integers are kept in int64; its products wrap around, which leaves their low 32 bits right.
    """
    x = x & LOW_32
    x = ((x ^ (x >> 16)) * _MULTIPLIERS[0]) & LOW_32
    x = ((x ^ (x >> 15)) * _MULTIPLIERS[1]) & LOW_32
    return x ^ (x >> 16)


def row_keys(seeds_R: Tensor, steps_R: Tensor) -> Tensor:
    """Two words for each row, int64 [R, 2]: a hash of its seed and of the number of its token."""
    low_R, high_R = mix32(seeds_R), (seeds_R >> 32) & LOW_32
    first_R = mix32(mix32(low_R ^ high_R) + steps_R)
    second_R = mix32(mix32(low_R + high_R + 1) ^ mix32(steps_R + 1))
    return torch.stack((first_R, second_R), dim=1)


def gumbel(keys_R2: Tensor, token_ids_V: Tensor) -> Tensor:
    """Gumbel noise of each row and token, fp32 [R, V]."""
    hash_RV = mix32(mix32(token_ids_V + keys_R2[:, :1]) ^ keys_R2[:, 1:])
    uniform_RV = ((hash_RV.float() + 0.5) * 2.0**-32).clamp_max(LARGEST_UNIFORM)
    # -log(1 - u) is an exponential variable; small u, which make the largest noise, are exact.
    return torch.log1p(uniform_RV.neg_()).neg_().log_().neg_()


def noisy_best(
    logits_RV: Tensor,
    thresholds_R: Tensor,
    temperatures_R: Tensor,
    keys_R2: Tensor,
    vocab_start: int,
) -> tuple[Tensor, Tensor]:
    """The largest logit + temperature x noise among logits that reach the threshold.

    Returns:
        That sum in fp32, -inf where this rank has no such logit, and the column, int64; of equal
        sums the first column. With temperature 0 it is the largest logit, bit by bit.
    """
    token_ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device) + vocab_start
    logits = logits_RV.float()
    noisy_RV = torch.addcmul(logits, temperatures_R[:, None], gumbel(keys_R2, token_ids_V))
    noisy_RV.masked_fill_(~(logits >= thresholds_R[:, None]), float("-inf"))
    best = noisy_RV.max(dim=1)
    return best.values, best.indices


def kept_mass(
    logits_RV: Tensor, thresholds_R: Tensor, largest_R: Tensor, scales_R: Tensor
) -> Tensor:
    """Sum of exp((logit - largest) x scale) over logits that reach the threshold, fp64 [R].

    With scale 0 it counts them. Sums are in fp64, so that their order, and with it the number of
    ranks, hardly ever matters to a comparison with them.
    """
    logits = logits_RV.float()
    powers_RV = ((logits - largest_R[:, None]) * scales_R[:, None]).exp_()
    powers_RV.masked_fill_(~(logits >= thresholds_R[:, None]), 0.0)  # ~: NaN is reached by none
    return powers_RV.sum(dim=1, dtype=torch.float64)
