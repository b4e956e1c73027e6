"""What two kernels cost each other at one clock: measured pairs without the fall of the clocks.

A pair runs for 0.4 s at the power cap, each kernel alone for 40 ms below it. So the measured
slowdown of a compute-bound kernel holds two things: what its neighbour costs it, and the clock that
both together may have. A plan's clock is found from the joules of the whole plan
(`power_model.py`); only the first may be counted beside it.

    clock of the pair      x:  sum of D(x) / time beside the other = headroom
    slowdown at one clock  measured slowdown / (time alone at x / burst time)

The clock in rows to 2026-11-25 is one reading from before the cap is enforced, so that x comes from
joules and times. Memory-bound kernels keep theirs: the simulator takes the larger of what the clock
and what the neighbour costs them. Collectives do not follow the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

from ..profiler.profile import PairRow, Point
from ..runtime.op_graph import OpKind
from ..runtime.op_shapes import RESOURCE_OF_KIND
from .power_model import Load, PowerModel

NEAR_CAP = 0.85
"""Part of the cap below which a pair's mean watts say that the cap did not bind; the mean is noisy,
and holds the time before it did."""


def pair_clock(pair: PairRow, loads: tuple[Load, Load], power: PowerModel) -> float:
    """The x that a pair settled at: 1 where the cap did not bind."""
    if pair.watts < NEAR_CAP * power.cap_w:
        return 1.0
    slowdowns = pair.slowdown_a, pair.slowdown_b
    pairs = list(zip(loads, slowdowns, strict=True))
    watts = sum(1e6 * load.joules / (load.us * slow) for load, slow in pairs if load.us * slow > 0)
    return power.clock_under_cap(watts * 1e-6, lambda _: 1.0)


def at_equal_clocks(
    pairs: Iterable[PairRow], load_of: Callable[[Point], Load | None], power: PowerModel
) -> list[PairRow]:
    """The pairs with slowdowns at one clock.

    Args:
        pairs: as measured.
        load_of: what a kernel alone asks of the card; None where its time was not measured, whose
            pairs stay as they are.
        power: of the same card.
    """
    found: list[PairRow] = []
    for pair in pairs:
        load_a, load_b = load_of(pair.a), load_of(pair.b)
        if load_a is None or load_b is None:
            found.append(pair)
            continue
        clock = pair_clock(pair, (load_a, load_b), power)
        found.append(
            replace(
                pair,
                slowdown_a=pair.slowdown_a / _fall(pair.a, load_a, clock),
                slowdown_b=pair.slowdown_b / _fall(pair.b, load_b, clock),
            )
        )
    return found


def _fall(point: Point, load: Load, clock: float) -> float:
    """How much longer the clock alone makes a compute-bound kernel take; 1 for others."""
    if RESOURCE_OF_KIND[cast(OpKind, point.kind)] != "compute" or load.us <= 0:
        return 1.0
    return load.us_at(clock) / load.us
