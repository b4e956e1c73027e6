"""Measured times of one kernel variant at one shape, and the values between its points.

A grid is sparse: some shares may have fewer KV lengths, some KV lengths fewer token counts. Each
axis is interpolated in the quantity that is closest to linear along it:

    tokens   time
    kv_len   time per key, over log(kv_len)
    num_sms  throughput (1 / time)

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
        self._tokens: dict[tuple[int, int], tuple[int, ...]] = {}
        self._kv_lens: dict[int, tuple[int, ...]] = {}
        for tokens, kv_len, num_sms in sorted(self.rows):
            key = num_sms, kv_len
            self._tokens[key] = (*self._tokens.get(key, ()), tokens)
        for num_sms, kv_len in sorted(self._tokens):
            self._kv_lens[num_sms] = (*self._kv_lens.get(num_sms, ()), kv_len)
        self._shares = tuple(sorted(self._kv_lens))

    def time(self, tokens: float, kv_len: float, num_sms: int) -> GridTime:
        """Time of the kernel there, in us."""
        low, high = _bracket(self._shares, num_sms)
        time = self._at_share(tokens, kv_len, low)
        if low == high:
            if low == num_sms:
                return time
            roofline = self._roofline_us
            ratio = roofline(tokens, kv_len, num_sms) / roofline(tokens, kv_len, low)
            return GridTime(time.us * ratio, False)
        above = self._at_share(tokens, kv_len, high)
        weight = (num_sms - low) / (high - low)
        return GridTime(1 / ((1 - weight) / time.us + weight / above.us), False)

    def _at_share(self, tokens: float, kv_len: float, num_sms: int) -> GridTime:
        low, high = _bracket(self._kv_lens[num_sms], kv_len)
        time = self._at_kv_len(tokens, low, num_sms)
        if low == high:
            if low == kv_len:
                return time
            roofline = self._roofline_us
            ratio = roofline(tokens, kv_len, num_sms) / roofline(tokens, low, num_sms)
            return GridTime(time.us * ratio, False)
        above = self._at_kv_len(tokens, high, num_sms)
        if low == 0:
            weight = kv_len / high
            return GridTime((1 - weight) * time.us + weight * above.us, False)
        weight = log(kv_len / low) / log(high / low)
        us_per_key = (1 - weight) * time.us / low + weight * above.us / high
        return GridTime(us_per_key * kv_len, False)

    def _at_kv_len(self, tokens: float, kv_len: int, num_sms: int) -> GridTime:
        low, high = _bracket(self._tokens[num_sms, kv_len], tokens)
        us = self.rows[low, kv_len, num_sms].median_us
        if low == high:
            if low == tokens:
                return GridTime(us, True)
            roofline = self._roofline_us
            ratio = roofline(tokens, kv_len, num_sms) / roofline(low, kv_len, num_sms)
            return GridTime(us * ratio, False)
        above = self.rows[high, kv_len, num_sms].median_us
        weight = (tokens - low) / (high - low)
        return GridTime((1 - weight) * us + weight * above, False)


def _bracket(values: Sequence[int], x: float) -> tuple[int, int]:
    """The neighbours of x in sorted values; twice the same value at a point or outside."""
    place = bisect_right(values, x)
    if place == 0:
        return values[0], values[0]
    low = values[place - 1]
    if low == x or place == len(values):
        return low, low
    return low, values[place]
