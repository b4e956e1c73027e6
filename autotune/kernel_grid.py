"""Measured times of one kernel variant at one shape, and the values between its points.

A grid is irregular: the profiler measures shares densely where their curve bends, at each number of
rows by itself, and some rows on all SMs only. So a column (one KV length and number of rows) is
interpolated along its own shares first, then between the nearest columns whose shares reach around
the one asked for. Each axis is interpolated in the quantity that is closest to linear along it:

    num_sms  throughput (1 / time)
    tokens   time
    kv_len   time per key, over log(kv_len)

Outside the measured range the utilisation of the nearest point is kept: its time is scaled by the
ratio of the roofline times of the two points.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log

from ..profiler.profile import Row

RooflineUs = Callable[[float, float, int], float]
"""(tokens, kv_len, num_sms) -> us of the same kernel on a perfect machine."""


@dataclass(frozen=True, slots=True)
class GridTime:
    """Time at one point of a grid."""

    us: float
    is_measured: bool
    """The point itself was measured."""


class KernelGrid:
    """All usable rows of one (kind, shape, variant)."""

    def __init__(self, rows: Iterable[Row], roofline_us: RooflineUs) -> None:
        self.rows = {(r.point.tokens, r.point.kv_len, r.point.num_sms): r for r in rows}
        self._roofline_us = roofline_us
        columns: dict[int, dict[int, list[int]]] = {}
        for tokens, kv_len, num_sms in sorted(self.rows):
            columns.setdefault(kv_len, {}).setdefault(tokens, []).append(num_sms)
        self._columns = columns
        """KV length -> tokens -> shares, each in order."""
        self._kv_lens = tuple(sorted(columns))
        self.least_share = min((num_sms for _, _, num_sms in self.rows), default=0)
        """Smallest share that was measured; 0 for kernels that take no SMs."""

    def time(self, tokens: float, kv_len: float, num_sms: int) -> GridTime:
        """Time of the kernel there, in us."""
        if (tokens, kv_len, num_sms) in self.rows:
            return GridTime(self.rows[int(tokens), int(kv_len), num_sms].median_us, True)
        low, high = _bracket(self._kv_lens, kv_len)
        us = self._at_kv_len(tokens, low, num_sms)
        if low == high:
            if low != kv_len:
                us *= self._roofline_us(tokens, kv_len, num_sms)
                us /= self._roofline_us(tokens, low, num_sms)
            return GridTime(us, False)
        above_us = self._at_kv_len(tokens, high, num_sms)
        if low == 0:
            weight = kv_len / high
            return GridTime((1 - weight) * us + weight * above_us, False)
        weight = log(kv_len / low) / log(high / low)
        us_per_key = (1 - weight) * us / low + weight * above_us / high
        return GridTime(us_per_key * kv_len, False)

    def _at_kv_len(self, tokens: float, kv_len: int, num_sms: int) -> float:
        columns = self._columns[kv_len]
        around = [rows for rows, shares in columns.items() if shares[0] <= num_sms <= shares[-1]]
        low, high = _bracket(around or list(columns), tokens)
        us = self._at_column(low, kv_len, num_sms)
        if low == high:
            if low != tokens:
                us *= self._roofline_us(tokens, kv_len, num_sms)
                us /= self._roofline_us(low, kv_len, num_sms)
            return us
        weight = (tokens - low) / (high - low)
        return (1 - weight) * us + weight * self._at_column(high, kv_len, num_sms)

    def _at_column(self, tokens: int, kv_len: int, num_sms: int) -> float:
        low, high = _bracket(self._columns[kv_len][tokens], num_sms)
        us = self.rows[tokens, kv_len, low].median_us
        if low == high:
            if low != num_sms:
                us *= self._roofline_us(tokens, kv_len, num_sms)
                us /= self._roofline_us(tokens, kv_len, low)
            return us
        weight = (num_sms - low) / (high - low)
        return 1 / ((1 - weight) / us + weight / self.rows[tokens, kv_len, high].median_us)


def _bracket(values: Sequence[int], x: float) -> tuple[int, int]:
    """The neighbours of x in sorted values; twice the same value at a point or outside."""
    place = bisect_right(values, x)
    if place == 0:
        return values[0], values[0]
    low = values[place - 1]
    if low == x or place == len(values):
        return low, low
    return low, values[place]
