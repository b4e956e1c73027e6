"""Does a profile fit this card: spread rows measured again, ratios by kind, a verdict. No torch.

A ratio is time now / time in the profile. A profile fits when the median is within 5 % and the
median of each kind within 10 %: less than that, two cards of one model differ by their clocks.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .grid import is_collective
from .profile import Point, Row

NUM_ROWS = 40
MEDIAN_TOLERANCE, KIND_TOLERANCE = 0.05, 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What measuring a profile's rows again has shown."""

    ratios: dict[Point, float]
    """Time now / time in the profile."""
    failed: dict[Point, str]
    """Points that did not run here, with the error."""

    @property
    def median(self) -> float:
        """Median ratio."""
        return statistics.median(self.ratios.values())

    @property
    def worst(self) -> tuple[Point, float]:
        """The point whose ratio is farthest from 1, either way."""
        return max(self.ratios.items(), key=lambda item: max(item[1], 1 / item[1]))

    @property
    def scale_by_kind(self) -> dict[str, float]:
        """Median ratio of each kind: what its times would have to be multiplied by."""
        found = defaultdict[str, list[float]](list)
        for point, ratio in self.ratios.items():
            found[point.kind].append(ratio)
        return {kind: statistics.median(ratios) for kind, ratios in sorted(found.items())}

    @property
    def fits(self) -> bool:
        """Whether the profile may be used on this card as it is."""
        is_close = abs(self.median - 1) <= MEDIAN_TOLERANCE and not self.failed
        scales = self.scale_by_kind.values()
        return is_close and all(abs(scale - 1) <= KIND_TOLERANCE for scale in scales)


def spread_rows(rows: Iterable[Row], count: int = NUM_ROWS) -> list[Row]:
    """About `count` measured rows over all kinds that one GPU can run, shapes, rows and shares.

    Each kind gives equally many, evenly spaced in the order of its points.
    """
    by_kind = defaultdict[str, list[Row]](list)
    for row in rows:
        kind = row.point.kind
        is_known = not row.error and row.source == "measured"
        if is_known and not is_collective(kind):
            by_kind[kind].append(row)
    chosen: list[Row] = []
    for position, kind in enumerate(sorted(by_kind, key=lambda kind: len(by_kind[kind]))):
        room = (count - len(chosen)) // (len(by_kind) - position)
        chosen += _evenly(sorted(by_kind[kind], key=lambda row: _order(row.point)), room)
    return chosen


def _order(point: Point) -> tuple[object, ...]:
    return point.num_sms, point.variant, point.shape, point.tokens, point.kv_len


def _evenly(rows: Sequence[Row], count: int) -> list[Row]:
    if len(rows) <= count:
        return list(rows)
    return [rows[(2 * index + 1) * len(rows) // (2 * count)] for index in range(count)]


def compare(profiled: Sequence[Row], measured: Sequence[Row]) -> Calibration:
    """Ratios of rows measured now to the profile's, in the same order.

    Raises:
        ValueError: nothing ran.
    """
    ratios: dict[Point, float] = {}
    failed: dict[Point, str] = {}
    for old, new in zip(profiled, measured, strict=True):
        assert old.point == new.point, (old, new)
        if new.error:
            failed[new.point] = new.error
        else:
            ratios[new.point] = new.median_us / old.median_us
    if not ratios:
        first = next(iter(failed.values()), "the profile has no measured rows")
        raise ValueError(f"no row of the profile could be measured again: {first}")
    return Calibration(ratios=ratios, failed=failed)
