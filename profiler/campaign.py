"""One profile run within its minutes: curves first, then joules, then co-runs.

Each stage has until a fixed part of the time; what it leaves over goes to the next. Nothing is
started that is predicted to end too late. Measuring, writing and the clock are passed in, so that
the whole run can be tried without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, MutableMapping, Sequence
from dataclasses import dataclass

from .grid import Family
from .joule_points import joule_points
from .profile import Point, ProfilePart, Row
from .refinement import next_points, predicted_s

CHUNK = 96
"""Points between two looks at the curves."""
SOLO_UNTIL, JOULES_UNTIL = 0.62, 0.85
"""Parts of the run's time by which its stages end when there are co-runs, which have the rest."""
SECONDS_PER_JOULE_POINT = 0.5
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


OnChunk = Callable[[int, Sequence[Point]], None]
"""Told (rows so far, points known to be left, the next `CHUNK` of them first) before each chunk."""


def _say_nothing(done: int, left: Sequence[Point]) -> None:
    """For runs that nobody watches."""


def stage_ends(parts: Collection[ProfilePart]) -> tuple[float, float]:
    """Parts of the time by which curves, and joules, must end: the last stage has all of it."""
    if "pairs" in parts or "collectives" in parts:
        return SOLO_UNTIL, JOULES_UNTIL
    return (SOLO_UNTIL / JOULES_UNTIL if "joules" in parts else 1.0), 1.0


def measure_curves(
    families: Iterable[Family],
    rows: MutableMapping[Point, Row],
    measure: Callable[[Point], Row],
    budget: Budget,
    on_chunk: OnChunk = _say_nothing,
    until: float = SOLO_UNTIL,
) -> bool:
    """Measure points by expected gain until the curves are known or the time is over.

    Args:
        families: what may be measured.
        rows: measured so far; new ones are put in.
        measure: times one point and stores its row.
        budget: of the run.
        on_chunk: see `OnChunk`.
        until: part of the run's time by which this must end.

    Returns:
        Whether every curve is known.
    """
    families = tuple(families)
    while points := next_points(families, rows):
        on_chunk(len(rows), points)
        for point in points[:CHUNK]:
            if not budget.has_room(predicted_s(point), until):
                return False
            rows[point] = measure(point)
    return True


def measure_joules(
    families: Iterable[Family],
    rows: MutableMapping[Point, Row],
    measure: Callable[[Point], Row],
    budget: Budget,
    on_chunk: OnChunk = _say_nothing,
    until: float = JOULES_UNTIL,
) -> None:
    """Measure joules of the most telling rows until `joule_points` has none or time is over."""
    families = tuple(families)
    while points := joule_points(families, rows):
        on_chunk(len(rows), points)
        for point in points[:CHUNK]:
            if not budget.has_room(SECONDS_PER_JOULE_POINT, until):
                return
            rows[point] = measure(point)
