"""One profile run within its minutes: curves first, then joules, then co-runs.

Each stage has until a fixed part of the time; what it leaves over goes to the next. Nothing is
started that is predicted to end too late. Measuring, writing and the clock are passed in, so that
the whole run can be tried without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass

from .grid import Family
from .profile import Point, Row
from .refinement import next_points, predicted_s

CHUNK = 96
"""Points between two looks at the curves."""
SOLO_UNTIL, JOULES_UNTIL = 0.62, 0.85
"""Parts of the run's time by which its stages end; co-runs have the rest."""
SECONDS_PER_JOULE_POINT = 0.55
SECONDS_PER_PAIR = 0.8
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When the stages of a run must end, on its own clock."""

    clock: Clock
    start_s: float
    seconds: float

    def ends_at(self, part: float) -> float:
        """Clock time when a part of the run is over."""
        return self.start_s + part * self.seconds

    def has_room(self, seconds: float, part: float) -> bool:
        """Whether something of this length still fits before a part of the run is over."""
        return self.clock() + seconds <= self.ends_at(part)


def measure_curves(
    families: Iterable[Family],
    rows: MutableMapping[Point, Row],
    measure: Callable[[Point], Row],
    budget: Budget,
    on_chunk: Callable[[int, int], None] = lambda done, left: None,
) -> bool:
    """Measure points by expected gain until the curves are known or the time is over.

    Args:
        families: what may be measured.
        rows: measured so far; new ones are put in.
        measure: times one point and stores its row.
        budget: of the run.
        on_chunk: told (rows so far, points known to be left) before each chunk.

    Returns:
        Whether every curve is known.
    """
    families = tuple(families)
    while points := next_points(families, rows):
        on_chunk(len(rows), len(points))
        for point in points[:CHUNK]:
            if not budget.has_room(predicted_s(point), SOLO_UNTIL):
                return False
            rows[point] = measure(point)
    return True


def measure_joules(
    families: Iterable[Family],
    rows: MutableMapping[Point, Row],
    measure: Callable[[Point], Row],
    budget: Budget,
) -> None:
    """Measure joules of the most telling rows until `joule_points` has none or time is over."""
    families = tuple(families)
    while points := joule_points(families, rows):
        for point in points[:CHUNK]:
            if not budget.has_room(SECONDS_PER_JOULE_POINT, JOULES_UNTIL):
                return
            rows[point] = measure(point)


JOULE_SHARE = 0.1
"""Part of the rows whose joules are measured, at least the ones every family has."""


def joule_points(families: Iterable[Family], rows: MutableMapping[Point, Row]) -> list[Point]:
    """Rows whose joules should be measured next, most telling first.

    Each family has its fastest variant at its coarse shares and, on all SMs, at its two most
    telling numbers of rows, and the runner-up on all SMs. Then come the other coarse rows of the
    fastest variants, families whose watts vary most first, up to a tenth of all rows.
    """
    families = tuple(families)
    by_family = {family: _ranked_rows(family, rows) for family in families}
    first = [
        (rank, point)
        for ranked in by_family.values()
        for rank, point in enumerate(ranked[:_BASIC_ROWS])
        if rows[point].joules_source != "measured"
    ]
    if first:
        return [point for _, point in sorted(first, key=lambda item: item[0])]
    measured = sum(row.joules_source == "measured" for row in rows.values())
    room = round(JOULE_SHARE * sum(not row.error for row in rows.values())) - measured
    more: list[tuple[float, Point]] = []
    for ranked in by_family.values():
        watts = [rows[point].watts for point in ranked[:_BASIC_ROWS] if rows[point].watts > 0]
        spread = (max(watts) - min(watts)) / max(watts) if watts else 0.0
        more += [
            (-spread, point)
            for point in ranked[_BASIC_ROWS:]
            if rows[point].joules_source != "measured"
        ]
    return [point for _, point in sorted(more, key=lambda item: item[0])][: max(0, room)]


_BASIC_ROWS = 5


def _ranked_rows(family: Family, rows: MutableMapping[Point, Row]) -> list[Point]:
    """Measured coarse rows of the two fastest variants at each place, most telling first."""
    first, others = family.tokens[0], family.tokens[1:]
    places = [(first, share, 0) for share in family.shares[:1]]
    places += [(first, family.num_sms, 1)]
    places += [(others[0], family.num_sms, 0)] if others else []
    places += [(first, share, 0) for share in (*family.shares[1:], family.edge) if share]
    places += [(tokens, share, 0) for tokens in others for share in family.shares]
    ranked: list[Point] = []
    for tokens, share, place in places:
        points = [family.point(variant, tokens, share) for variant in family.variants]
        known = [point for point in points if point in rows and not rows[point].error]
        known.sort(key=lambda point: (rows[point].median_us, point.variant))
        ranked += known[place : place + 1]
    return list(dict.fromkeys(ranked))
