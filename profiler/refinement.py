"""Which points to measure next: dense where curves bend. A pure function of the rows so far.

1. Coarse: every variant at coarse rows and shares. A variant that is hopeless (30 % behind the best
   at every share) at the nearest rows on both sides is left out between them.
2. Dominated variants (15 % behind the best at every coarse share) keep their coarse rows only.
3. Shares: between two measured shares the middle one is measured. Where it lies more than 3 % off
   the line of throughput (1 / time, which is what the cost model draws between rows), both halves
   are looked at in the same way; elsewhere the curve is straight and nothing more is measured.
4. Rows: likewise between coarse numbers of rows, in time, on all SMs; where time bends there, the
   coarse shares are measured too.

Refinements come in order of expected gain (the relative error that a row may correct, less for
variants behind the best one), so that a run out of time has the best of them; those that may
correct less than 1 % are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .energy import point_costs
from .grid import TOKEN_STEP, Family
from .profile import Point, Row

DOMINATED, HOPELESS = 1.15, 1.3
"""Times the best time at the same point."""
BEND = 0.03
"""Relative error of interpolation from which a stretch is divided again."""
LEAST_GAIN = 0.01
POINT_S, LEAST_SAMPLED_S, CALLS_OF_SLOW_POINT = 0.008, 0.017, 7
"""Seconds of preparing a point, of measuring a fast one, and calls that a slow one takes."""

Times = Mapping[tuple[int, int], float | None]
"""(rows, share) -> us of one variant; None where it failed."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A point and how much measuring it should improve the profile."""

    gain: float
    """Coarse points: above 1. Others: relative error it may correct."""
    point: Point


def next_points(families: Iterable[Family], rows: Mapping[Point, Row]) -> list[Point]:
    """Points to measure next, most telling first; none when every curve is known."""
    times = _times_by_kernel(rows)
    wishes: dict[Point, float] = {}
    for family in families:
        for wish in _wishes(family, _times_of(family, times)):
            if wish.gain < LEAST_GAIN:
                continue
            wishes[wish.point] = max(wish.gain, wishes.get(wish.point, 0.0))
    return sorted(wishes, key=lambda point: -wishes[point])


def coarse_points(families: Iterable[Family], rows: Mapping[Point, Row]) -> list[Point]:
    """Coarse points that are still to be measured, as far as the rows so far tell."""
    times = _times_by_kernel(rows)
    return [wish.point for f in families for wish in _coarse(f, _times_of(f, times))]


def predicted_s(point: Point, row: Row | None = None) -> float:
    """Seconds that measuring a point takes, from its time or a guess of it."""
    if row is not None and not row.error:
        call_s = row.median_us * 1e-6
    else:
        flops, moved, _ = point_costs(point)
        call_s = max(flops / 5e14, moved / 3e12) * 132 / point.num_sms
    return POINT_S + max(LEAST_SAMPLED_S, CALLS_OF_SLOW_POINT * call_s)


def _times_by_kernel(rows: Mapping[Point, Row]) -> Mapping[tuple[object, ...], Times]:
    times = defaultdict[tuple[object, ...], dict[tuple[int, int], float | None]](dict)
    for point, row in rows.items():
        key = point.kind, point.shape, point.kv_len, point.variant
        times[key][point.tokens, point.num_sms] = None if row.error else row.median_us
    return times


def _times_of(family: Family, times: Mapping[tuple[object, ...], Times]) -> dict[str, Times]:
    """Times by variant."""
    kernel = family.kind, family.shape, family.kv_len
    return {variant: times.get((*kernel, variant), {}) for variant in family.variants}


def _wishes(family: Family, times: Mapping[str, Times]) -> Iterator[Wish]:
    coarse = list(_coarse(family, times))
    yield from coarse
    open_tokens = {wish.point.tokens for wish in coarse}
    for tokens in family.tokens:
        if tokens not in open_tokens:
            yield from _shares(family, times, tokens, _survivors(family, times, tokens))
    if not coarse:
        yield from _tokens(family, times)


def _coarse(family: Family, times: Mapping[str, Times]) -> Iterator[Wish]:
    """Every variant at coarse rows and shares; the first rows of all families come first."""
    measured: list[int] = []
    for rank, tokens in enumerate(family.tokens):
        missing = [
            family.point(variant, tokens, share)
            for share in family.shares
            for variant in family.variants
            if (tokens, share) not in times[variant]
            and not _is_hopeless_beside(family, times, variant, tokens, measured)
        ]
        yield from (Wish(100.0 - rank, point) for point in missing)
        if missing:
            return  # later rows leave out what these show to be hopeless
        measured.append(tokens)


def _ratio(times: Mapping[str, Times], variant: str, at: tuple[int, int]) -> float | None:
    """Time of a variant over the best one's at the same point; None where it has none."""
    mine = times[variant].get(at)
    if mine is None:
        return None
    known = [us for us in (other.get(at) for other in times.values()) if us is not None]
    return mine / min(known)


def _least_ratio(
    times: Mapping[str, Times], variant: str, tokens: int, shares: Sequence[int]
) -> float | None:
    found = [_ratio(times, variant, (tokens, share)) for share in shares]
    return min((ratio for ratio in found if ratio is not None), default=None)


def _is_hopeless_beside(
    family: Family, times: Mapping[str, Times], variant: str, tokens: int, measured: Sequence[int]
) -> bool:
    """Whether the variant is far behind at the nearest measured rows below and above."""
    below = max((other for other in measured if other < tokens), default=None)
    above = min((other for other in measured if other > tokens), default=None)
    if below is None or above is None:
        return False
    ratios = [_least_ratio(times, variant, rows, family.shares) for rows in (below, above)]
    return all(ratio is None or ratio > HOPELESS for ratio in ratios)


def _survivors(family: Family, times: Mapping[str, Times], tokens: int) -> list[str]:
    """Variants within 15 % of the best at one coarse share at least."""
    ratios = {v: _least_ratio(times, v, tokens, family.shares) for v in family.variants}
    return [v for v, ratio in ratios.items() if ratio is not None and ratio <= DOMINATED]


def _closeness(ratio: float) -> float:
    """1 for the best variant, falling to 0.1 for one that is dominated."""
    return max(0.1, 1 - (ratio - 1) / (DOMINATED - 1))


def _shares(
    family: Family, times: Mapping[str, Times], tokens: int, variants: Iterable[str]
) -> Iterator[Wish]:
    coarse = sorted(family.shares)
    for variant in variants:
        mine = times[variant]
        closest = _closeness(_least_ratio(times, variant, tokens, coarse) or 1.0)
        if family.edge and (tokens, family.edge) not in mine:
            yield Wish(0.1 * closest * family.weight, family.point(variant, tokens, family.edge))
        known = [s for s in (family.edge, *coarse) if mine.get((tokens, s)) is not None]
        for low, high in pairwise(known):
            ends = [_ratio(times, variant, (tokens, share)) or 1.0 for share in (low, high)]
            if low in coarse and min(ends) > DOMINATED:
                continue  # another variant is the one to take there
            prior = 0.3 * (high - low) / family.num_sms
            line = _Line({s: us for (rows, s), us in mine.items() if rows == tokens}, True)
            for gain, share in line.openings(low, high, prior, family.lattice):
                gain *= _closeness(min(ends)) * family.weight
                yield Wish(gain, family.point(variant, tokens, share))


def _tokens(family: Family, times: Mapping[str, Times]) -> Iterator[Wish]:
    coarse = sorted(family.tokens)
    lattice = range(coarse[0], coarse[-1] + 1, TOKEN_STEP)
    for variant in family.variants:
        mine = times[variant]
        line = _Line({rows: us for (rows, s), us in mine.items() if s == family.num_sms}, False)
        for low, high in pairwise(coarse):
            ratios = [_least_ratio(times, variant, rows, family.shares) for rows in (low, high)]
            best = min((ratio for ratio in ratios if ratio is not None), default=DOMINATED + 1)
            if best > DOMINATED or mine.get((low, family.num_sms)) is None:
                continue
            if mine.get((high, family.num_sms)) is None:
                continue
            weight = _closeness(best) * family.weight
            for gain, rows in line.openings(low, high, 0.1 * (high - low) / high, lattice):
                yield Wish(gain * weight, family.point(variant, rows, family.num_sms))
            for error, rows in line.bends(low, high, lattice):
                for share in family.shares[1:]:
                    if (rows, share) not in mine:
                        yield Wish(error * weight, family.point(variant, rows, share))


class _Line:
    """Measured times of one variant along one axis, and where to look between them."""

    def __init__(self, times: Mapping[int, float | None], is_throughput: bool) -> None:
        self._times = times
        self._is_throughput = is_throughput

    def openings(
        self, low: int, high: int, gain: float, lattice: Sequence[int]
    ) -> Iterator[tuple[float, int]]:
        """Unmeasured places in a stretch that may bend, each with the error it may correct."""
        middle = _middle(low, high, lattice)
        if middle is None:
            return
        if middle not in self._times:
            yield gain, middle
            return
        error = self._error(low, middle, high)
        if error > BEND:
            yield from self.openings(low, middle, error / 2, lattice)
            yield from self.openings(middle, high, error / 2, lattice)

    def bends(self, low: int, high: int, lattice: Sequence[int]) -> Iterator[tuple[float, int]]:
        """Measured places off the line between their neighbours, with the error there."""
        middle = _middle(low, high, lattice)
        if middle is None or middle not in self._times:
            return
        error = self._error(low, middle, high)
        if error > BEND:
            yield error, middle
            yield from self.bends(low, middle, lattice)
            yield from self.bends(middle, high, lattice)

    def _error(self, low: int, middle: int, high: int) -> float:
        """Interpolated against measured time in the middle; 0 where one of them failed."""
        ends, true = (self._times.get(low), self._times.get(high)), self._times[middle]
        if ends[0] is None or ends[1] is None or true is None:
            return 0.0
        weight = (middle - low) / (high - low)
        if self._is_throughput:
            guess = 1 / ((1 - weight) / ends[0] + weight / ends[1])
        else:
            guess = (1 - weight) * ends[0] + weight * ends[1]
        return abs(guess / true - 1)


def _middle(low: int, high: int, lattice: Sequence[int]) -> int | None:
    """The legal place nearest the middle of a stretch; None where there is none within."""
    inside = [place for place in lattice if low < place < high]
    return min(inside, key=lambda p: (abs(2 * p - low - high), -p), default=None)
