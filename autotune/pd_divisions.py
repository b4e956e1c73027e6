"""The table of SM divisions for SGLang's PD multiplexing under a limit on the time per token.

Row by row: as long as decode steps keep the limit, decode gets as few SMs as it can do with, so
that prefill has the rest; a larger decode batch goes on to the next row. SGLang takes the last row
whose threshold the decode batch reaches, so thresholds rise and the first one is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..profiler.profile import Source
from .cost_model import worst_source
from .pd_curves import PdCurves

DECODE_STEP = 8
"""Decode batches are looked at in steps of this."""


class LimitNotMetError(ValueError):
    """No division keeps the limit on the time per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """One row of the table, with what was predicted for it."""

    prefill_sms: int
    decode_sms: int
    least_decodes: int
    """The row's threshold."""
    most_decodes: int
    """Largest decode batch that keeps the limit on these SMs, or that was asked about."""
    decode_step_us: float
    """Of `most_decodes`, beside prefill."""
    prefill_tokens_per_s: float
    """Beside decode, one replica."""
    source: Source


def possible_divisions(
    num_sms: int, granularity: int, least_measured_sms: int
) -> list[tuple[int, int]]:
    """(prefill, decode) SMs that the driver can make, neither smaller than what was measured.

    Args:
        num_sms: of the GPU.
        granularity: least size of a part, and the unit of the prefill part; decode gets the rest.
        least_measured_sms: smallest SM share that the profile has of both jobs.
    """
    least = max(granularity, least_measured_sms)
    prefills = range(granularity, num_sms - granularity + 1, granularity)
    return [(sms, num_sms - sms) for sms in prefills if sms >= least and num_sms - sms >= least]


def divisions(
    curves: PdCurves,
    candidates: Sequence[tuple[int, int]],
    *,
    limit_us: float,
    max_decodes: int,
    max_rows: int,
) -> tuple[Division, ...]:
    """The rows, smallest decode part first; the last one's `most_decodes` is as far as they reach.

    Args:
        curves: of the model on the GPU.
        candidates: (prefill, decode) SMs to choose from.
        limit_us: largest time of one decode step.
        max_decodes: decode batch up to which the table is made.
        max_rows: of the table: every row costs SGLang one set of CUDA graphs.

    Raises:
        LimitNotMetError: not even the smallest decode batch keeps the limit anywhere.
    """
    rising = sorted(candidates, key=lambda division: division[1])
    reached: list[tuple[tuple[int, int], int]] = []
    for division in rising:
        most = _most_decodes(curves, division, limit_us, max_decodes)
        if most > (reached[-1][1] if reached else 0):
            reached.append((division, most))
        if most >= max_decodes:
            break
    if not reached:
        best_us = min(curves.decode_step(1, sms, prefill).us for prefill, sms in rising)
        raise LimitNotMetError(
            f"a decode step beside a prefill must keep --tpot-ms {limit_us / 1e3:g}, but one "
            f"request takes at least {best_us / 1e3:.1f} ms on any division; give a larger "
            "--tpot-ms, or more GPUs"
        )
    return _rows(curves, _thinned(reached, max_rows))


def _most_decodes(
    curves: PdCurves, division: tuple[int, int], limit_us: float, max_decodes: int
) -> int:
    """Largest decode batch up to which every one keeps the limit; 0 if none does."""
    prefill_sms, decode_sms = division
    most = 0
    for decodes in sorted({1, *range(DECODE_STEP, max_decodes, DECODE_STEP), max_decodes}):
        if curves.decode_step(decodes, decode_sms, prefill_sms).us > limit_us:
            break
        most = decodes
    return most


def _thinned(
    reached: list[tuple[tuple[int, int], int]], max_rows: int
) -> list[tuple[tuple[int, int], int]]:
    """At most `max_rows`, evenly spaced, the last among them."""
    if len(reached) <= max_rows:
        return reached
    if max_rows == 1:
        return reached[-1:]
    places = [round(i * (len(reached) - 1) / (max_rows - 1)) for i in range(max_rows)]
    return [reached[place] for place in places]


def _rows(curves: PdCurves, reached: list[tuple[tuple[int, int], int]]) -> tuple[Division, ...]:
    rows: list[Division] = []
    for (prefill_sms, decode_sms), most in reached:
        step = curves.decode_step(most, decode_sms, prefill_sms)
        fill = curves.prefill(curves.prefill_tokens, prefill_sms, most, decode_sms)
        rows.append(
            Division(
                prefill_sms=prefill_sms,
                decode_sms=decode_sms,
                least_decodes=rows[-1].most_decodes + 1 if rows else 1,
                most_decodes=most,
                decode_step_us=step.us,
                prefill_tokens_per_s=curves.prefill_tokens / fill.us * 1e6,
                source=worst_source([step.source, fill.source]),
            )
        )
    return tuple(rows)
