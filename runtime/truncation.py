"""Top-k and top-p as one threshold a row: tokens whose logit reaches it may be drawn.

Thresholds are values, not ranks: tokens as likely as the last one kept are kept too, so that
nothing depends on how ties are ordered, or on how the vocabulary is split over ranks. Top-p counts
mass within what top-k keeps. Nothing is ever cut short, in either of two ways:

few   every row that is truncated has a top-k of at most `FEW`: the threshold is among the `FEW`
      largest logits, and so is that of top-p. Ranks exchange those, not the vocabulary.
any   the largest threshold that keeps enough tokens, then enough mass, found bit by bit: a pass
      over the logits for each bit of their type (16 in bf16). Ranks exchange one sum a row and
      bit.

Which way is for the host to say from the parameters (`sampling.mode_of`), so that nothing waits.

Shape legend: R logit rows, V this rank's vocabulary, W ranks, K the `FEW` largest logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FEW = 64
"""Largest top-k that is served from the largest logits."""
_LEAST_TEMPERATURE = 1e-5
"""Where mass is counted: below it, all of it is on the likeliest tokens."""
_NOTHING_CUT = float("-inf")

KeptMass = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`sampling_rows.kept_mass` or the Triton one."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that share a vocabulary."""

    count: int

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's tensor, [W, ...]."""
        if self.count == 1:
            return x[None]
        gathered = x.new_empty((self.count, *x.shape))
        dist.all_gather(list(gathered.unbind(0)), x.contiguous())
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        """Sum in rank order: the same bits everywhere."""
        return self.gather(x).sum(dim=0)

    def top(self, logits_RV: Tensor, count: int, vocab_start: int) -> tuple[Tensor, Tensor]:
        """The largest logits of the whole vocabulary, falling, in fp32, and their token ids.

        Fewer than `count` where the ranks together have fewer.
        """
        best = logits_RV.topk(min(count, logits_RV.shape[1]), dim=1)
        values_RK, ids_RK = best.values.float(), best.indices + vocab_start
        if self.count == 1:
            return values_RK, ids_RK
        short = count - values_RK.shape[1]  # the last rank may hold fewer tokens than the others
        values_RK = torch.nn.functional.pad(values_RK, (0, short), value=_NOTHING_CUT)
        ids_RK = torch.nn.functional.pad(ids_RK, (0, short))
        both_WRX = self.gather(torch.cat((values_RK.double(), ids_RK.double()), dim=1))
        values_RX, ids_RX = (
            part_WRK.transpose(0, 1).flatten(1) for part_WRK in both_WRX.chunk(2, dim=2)
        )
        merged = values_RX.topk(count, dim=1)
        return merged.values.float(), ids_RX.gather(1, merged.indices).long()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What rows ask for."""

    temperatures_R: Tensor
    top_ks_R: Tensor
    """int64; 0 keeps all tokens."""
    top_ps_R: Tensor
    """fp64; 1 keeps all."""

    @property
    def scales_R(self) -> Tensor:  # noqa: N802 - shape suffix
        """1 / temperature, fp32."""
        return self.temperatures_R.clamp_min(_LEAST_TEMPERATURE).reciprocal()


def thresholds_from_few(
    logits_RV: Tensor, limits: Limits, ranks: Ranks, kept_mass: KeptMass, *, has_top_p: bool
) -> Tensor:
    """fp32 [R], for rows with a top-k of 1 to `FEW` or with no truncation at all."""
    values_RK, _ = ranks.top(logits_RV, FEW, 0)
    is_cut_R = limits.top_ks_R > 0
    last_R1 = (limits.top_ks_R - 1).clamp(0, values_RK.shape[1] - 1)[:, None]
    by_count_R = values_RK.gather(1, last_R1)[:, 0]
    if not has_top_p:
        return torch.where(is_cut_R, by_count_R, _NOTHING_CUT)
    largest_R, scales_R = values_RK[:, 0].contiguous(), limits.scales_R
    kept_R = ranks.sum(kept_mass(logits_RV, by_count_R, largest_R, scales_R))
    mass_RK = ((values_RK - largest_R[:, None]) * scales_R[:, None]).exp().double().cumsum(dim=1)
    # The first that reaches the mass; where none of the larger ones does, the last of top-k.
    is_enough_RK = mass_RK >= (limits.top_ps_R * kept_R)[:, None]
    is_enough_RK &= values_RK > by_count_R[:, None]
    first_R1 = is_enough_RK.byte().argmax(dim=1, keepdim=True)
    by_mass_R = values_RK.gather(1, first_R1)[:, 0]
    is_found_R = is_enough_RK.any(dim=1) & (limits.top_ps_R < 1)
    found_R = torch.where(is_found_R, by_mass_R, by_count_R)
    return torch.where(is_cut_R, found_R, _NOTHING_CUT)


def thresholds_of_any(
    logits_RV: Tensor,
    limits: Limits,
    ranks: Ranks,
    kept_mass: KeptMass,
    *,
    has_top_k: bool,
    has_top_p: bool,
) -> Tensor:
    """fp32 [R], for any rows."""
    largest_R = ranks.gather(logits_RV.amax(dim=1).float()).amax(dim=0)
    thresholds_R = torch.full_like(largest_R, _NOTHING_CUT)
    if has_top_k:
        zeros_R = torch.zeros_like(largest_R)  # a scale of 0 counts

        def count(tried_R: Tensor) -> Tensor:
            return ranks.sum(kept_mass(logits_RV, tried_R, largest_R, zeros_R))

        found_R = _largest_with(count, limits.top_ks_R.double(), logits_RV.dtype)
        thresholds_R = torch.where(limits.top_ks_R > 0, found_R, thresholds_R)
    if has_top_p:
        scales_R = limits.scales_R

        def mass(tried_R: Tensor) -> Tensor:
            return ranks.sum(kept_mass(logits_RV, tried_R, largest_R, scales_R))

        found_R = _largest_with(mass, limits.top_ps_R * mass(thresholds_R), logits_RV.dtype)
        thresholds_R = torch.where(limits.top_ps_R < 1, found_R, thresholds_R)
    return thresholds_R


def _largest_with(
    measure: Callable[[Tensor], Tensor], wanted_R: Tensor, dtype: torch.dtype
) -> Tensor:
    """The largest threshold of this type whose measure, falling with it, is at least as wanted.

    Floating-point numbers of one type are ordered like integers, once those of negative ones are
    turned round. The integer is built from its highest bit down.
    """
    num_bits = 8 * dtype.itemsize
    keys_R = torch.full_like(wanted_R, -(1 << (num_bits - 1)), dtype=torch.int64)
    for bit in reversed(range(num_bits)):
        tried_R = keys_R + (1 << bit)
        is_enough_R = measure(_value_of(tried_R, dtype)) >= wanted_R
        keys_R = torch.where(is_enough_R, tried_R, keys_R)
    found_R = _value_of(keys_R, dtype)
    return torch.where(found_R.isnan(), _NOTHING_CUT, found_R)  # even all tokens are too few


def _value_of(keys_R: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 value of a place in the order; NaN, which no logit reaches, beyond the infinities."""
    num_bits = 8 * dtype.itemsize
    bits_R = torch.where(keys_R < 0, keys_R ^ ((1 << (num_bits - 1)) - 1), keys_R)
    integer = {16: torch.int16, 32: torch.int32}[num_bits]
    return bits_R.to(integer).view(dtype).float()
