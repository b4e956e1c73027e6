"""Which rows should have their joules measured next, until a tenth of all have. A pure function.

First what every family needs: its fastest variant at its coarse shares and, on all SMs, at its two
most telling numbers of rows, and the runner-up on all SMs. Then rows that tell what is known least:
each of a row's groups (its kind with its variant, its share, its number of rows, its shape) counts
the less, the more measured rows it has; families whose watts vary count more.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping

from .grid import Family
from .profile import Point, Row
from .refinement import DOMINATED

JOULE_SHARE = 0.1
"""Part of the rows whose joules are measured, at least the ones every family has."""
_BASIC_ROWS = 5
_SPREAD_WEIGHT = 2.0
"""How much more a row counts where the watts of its family vary by all of them."""


def joule_points(families: Iterable[Family], rows: Mapping[Point, Row]) -> list[Point]:
    """Rows whose joules should be measured next, most telling first; none when a tenth have."""
    by_family = {family: _ranked_rows(family, rows) for family in families}
    first = [
        (rank, point)
        for ranked in by_family.values()
        for rank, point in enumerate(ranked[:_BASIC_ROWS])
        if not rows[point].has_measured_joules
    ]
    if first:
        return [point for _, point in sorted(first, key=lambda item: item[0])]
    measured = sum(row.has_measured_joules for row in rows.values())
    room = round(JOULE_SHARE * sum(not row.error for row in rows.values())) - measured
    more: dict[Point, float] = {}
    for family, ranked in by_family.items():
        watts = [rows[point].watts for point in ranked[:_BASIC_ROWS] if rows[point].watts > 0]
        spread = (max(watts) - min(watts)) / max(watts) if watts else 0.0
        for point in (*ranked[_BASIC_ROWS:], *_close_variants(family, rows)):
            if not rows[point].has_measured_joules:
                more[point] = 1 + _SPREAD_WEIGHT * spread
    return _spread_out(more, rows, room)


def _groups(point: Point) -> tuple[tuple[object, ...], ...]:
    """Sets of rows that a row tells something about."""
    kind = point.kind
    return (
        (kind, "variant", point.variant),
        (kind, "share", point.num_sms),
        (kind, "rows", point.tokens),
        (kind, "shape", point.shape, point.kv_len),
    )


def _spread_out(
    weights: Mapping[Point, float], rows: Mapping[Point, Row], count: int
) -> list[Point]:
    """The points that add most, each judged with those before it as measured."""
    known = Counter[tuple[object, ...]]()
    for row in rows.values():
        if row.has_measured_joules:
            known.update(_groups(row.point))

    def gain(point: Point) -> float:
        return weights[point] * sum(1 / (1 + known[group]) for group in _groups(point))

    # Gains only fall, so that what is on top with a gain of now is the best.
    heap = [(-gain(point), place, point) for place, point in enumerate(weights)]
    heapq.heapify(heap)
    chosen: list[Point] = []
    while heap and len(chosen) < count:
        former, place, point = heapq.heappop(heap)
        now = gain(point)
        if now < -former:
            heapq.heappush(heap, (-now, place, point))
            continue
        chosen.append(point)
        known.update(_groups(point))
    return chosen


def _ranked_rows(family: Family, rows: Mapping[Point, Row]) -> list[Point]:
    """Measured coarse rows of the two fastest variants at each place, most telling first."""
    first, others = family.tokens[0], family.tokens[1:]
    places = [(first, share, 0) for share in family.shares[:1]]
    places += [(first, family.num_sms, 1)]
    places += [(others[0], family.num_sms, 0)] if others else []
    places += [(first, share, 0) for share in (*family.shares[1:], family.edge) if share]
    places += [(tokens, share, 0) for tokens in others for share in family.shares]
    ranked: list[Point] = []
    for tokens, share, place in places:
        ranked += _fastest(family, rows, tokens, share)[place : place + 1]
    return list(dict.fromkeys(ranked))


def _fastest(family: Family, rows: Mapping[Point, Row], tokens: int, share: int) -> list[Point]:
    """Measured variants at one place, the fastest first."""
    points = [family.point(variant, tokens, share) for variant in family.variants]
    known = [point for point in points if point in rows and not rows[point].error]
    return sorted(known, key=lambda point: (rows[point].median_us, point.variant))


def _close_variants(family: Family, rows: Mapping[Point, Row]) -> list[Point]:
    """At the most telling rows every variant that is 15 % behind the best at most."""
    found: list[Point] = []
    for share in family.shares:
        fastest = _fastest(family, rows, family.tokens[0], share)
        limit = DOMINATED * rows[fastest[0]].median_us if fastest else 0.0
        found += [point for point in fastest if rows[point].median_us <= limit]
    return found
