"""Rows of one point that cannot both be true, found before one of them replaces the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from .profile import Point, Row

MAX_RATIO = 3.0
"""Times the fastest row of a point that its slowest one may take."""


class ContradictoryProfileError(ValueError):
    """No search can believe this profile."""


def row_name(row: Row) -> str:
    """A row as a reader finds it in the file."""
    point = row.point
    keys = f", {point.kv_len} keys" if point.kv_len else ""
    return (
        f"{point.kind} {point.shape} {point.variant} {point.tokens} tokens{keys} on "
        f"{point.num_sms} SMs ({row.median_us:g} us)"
    )


def refuse_contradictions(rows: Iterable[Row], where: str = "a profile") -> None:
    """Refuse measured rows of one point whose times are more than `MAX_RATIO` apart.

    Args:
        rows: any; failed ones and those that were not measured are passed over.
        where: the file, for the message.

    Raises:
        ContradictoryProfileError: with the rows, the rule and the remedy.
    """
    of_point = defaultdict[Point, list[Row]](list)
    for row in rows:
        if row.source == "measured" and not row.error:
            of_point[row.point].append(row)
    for same in of_point.values():
        low = min(same, key=lambda row: row.median_us)
        high = max(same, key=lambda row: row.median_us)
        if high.median_us > MAX_RATIO * low.median_us:
            raise ContradictoryProfileError(
                f"{where}: rows of one point must agree within {MAX_RATIO:g} times, but got "
                f"{row_name(low)} and {high.median_us:g} us; delete the wrong row, or profile that "
                "point again"
            )
