"""Schedules measured side by side, of which one that finds no memory is lost alone.

All share one sustained run where they can. When memory runs out, each is measured again beside
the base alone, and what does not fit even then is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..runtime.gpu_failures import OutOfMemoryError
from ..runtime.plan import Schedule, Timing

Measure = Callable[[Sequence[Schedule]], Sequence[Timing]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What one run told."""

    base: tuple[Timing, ...]
    timing: Timing | None
    """None: the schedule found no memory."""
    lost: str = ""
    """Why, in that case."""


def measure_what_fits(
    measure: Measure,
    base: Sequence[Schedule],
    others: Sequence[Schedule],
    tell: Callable[[str], None],
) -> list[Beside]:
    """Measure schedules beside a base, and lose those that find no memory.

    Args:
        measure: times schedules, interleaved, in one sustained run.
        base: in every run; may be empty.
        others: what may be lost.
        tell: told of each that is.

    Returns:
        One for each of `others`, in order.

    Raises:
        OutOfMemoryError: not even the base fits.
    """
    try:
        timings = tuple(measure([*base, *others]))
    except OutOfMemoryError:
        if not others:
            raise
    else:
        count = len(base)
        return [Beside(base=timings[:count], timing=timing) for timing in timings[count:]]
    alone = tuple(measure(base)) if base else ()
    found: list[Beside] = []
    for schedule in others:
        try:
            *beside, timing = measure([*base, schedule])
        except OutOfMemoryError as err:
            tell(f"schedule {schedule.name!r} is left out: {err}")
            found.append(Beside(base=alone, timing=None, lost=str(err)))
        else:
            found.append(Beside(base=tuple(beside), timing=timing))
    return found


def measure_race(
    measure: Measure, schedules: Sequence[Schedule], tell: Callable[[str], None]
) -> list[Timing | None]:
    """Measure schedules together; None for those that find no memory beside the first one.

    Raises:
        OutOfMemoryError: not even the first one fits.
    """
    first, *others = schedules
    turns = measure_what_fits(measure, [first], others, tell)
    base = turns[0].base[0] if turns else measure([first])[0]
    return [base, *(turn.timing for turn in turns)]
