"""What no plan of the declared space can beat: every cut, order, form, share, kernel and transport.

The space: 1 to `MOST_BATCHES` nano-batches cut at multiples of the space's granularity, all row
orders, any issue order, either form of joining the attention's output for each nano-batch, all
shares of the space, their complements, all SMs, and none where collectives can do without. For each
cut and each clock the period is at least the value of the configuration LP (`configuration_lp.py`),
in the simulator's own model: times, joules and measured slowdowns of every kernel at every share.

Cuts are many (a thousand of 2048 rows). Those whose nano-batches are the same but for their order
have one bound. The rest is branch and bound over parts of the space, lowest first:

    screen   prices of similar cuts that were solved, tried on a cut and a cell of clocks
    LP       a cut's own prices
    halves   the nano-op whose share the LP mixes most takes a small share, or a large one

A part is done when its bound is within `AIM` of the best known plan. When all are, or when the
work is used up, the lowest bound of any part is that of the space.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..runtime.op_graph import OpGraph, RowMix
from ..search_spaces.schema import SearchSpace
from .configuration_lp import Bound
from .cost_model import CostModel
from .cut_bounds import Bounds, Part, rows_of, splits_of
from .milp_input import Split

MOST_BATCHES = 4
AIM = 0.0095
"""A part whose bound is so close to the best plan is not looked at further."""
WORK = 4e9
"""Configurations priced in LPs, in all: about 20 seconds of one core."""
ALL_TRIALS = 60
"""Simulator trials of a space for which all of that is done."""
ROUNDS, LP_WORK = 12, 1e6
"""Of an LP, as far as work is counted, and what it takes whatever its size."""
LARGE = 1e6
"""Configurations of an LP that no longer fit a cache: they take longer each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountBound:
    """What one number of nano-batches can reach at best."""

    num_nano_batches: int
    bound_us: float
    """Of a whole iteration."""
    sizes: tuple[int, ...]
    """The cut of that bound."""
    row_order: str
    is_dominated: bool
    """No plan of this count is faster than the best known one by more than `AIM`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceBound:
    """A lower bound on the predicted period of every plan in the declared space."""

    bound_us: float
    best_us: float
    """Shortest predicted period of the race."""
    binds: str
    """What the bound's price lies on, and the cut that has it."""
    counts: tuple[CountBound, ...]
    num_cuts: int
    num_full: int
    """LPs solved; other parts of the space were above the bound already."""
    seconds: float

    @property
    def gap(self) -> float:
        """1 - bound / best."""
        return max(0.0, 1 - self.bound_us / self.best_us)

    def against(self, best_us: float) -> SpaceBound:
        """The same bound beside a plan that was found later."""
        counts = tuple(
            replace(c, is_dominated=c.bound_us >= best_us * (1 - AIM)) for c in self.counts
        )
        return replace(self, bound_us=min(self.bound_us, best_us), best_us=best_us, counts=counts)


@dataclass(slots=True)
class _Lowest:
    """Of the parts that are done, the lowest bound of each number of nano-batches."""

    us: float
    split: Split


def space_bound(
    graph: OpGraph,
    cost_model: CostModel,
    space: SearchSpace,
    mix: RowMix,
    *,
    best_us: float,
    is_powered: bool,
    most_batches: int = MOST_BATCHES,
    work: float | None = None,
) -> SpaceBound:
    """Bound every plan of the declared space.

    Args:
        graph: of one rank.
        cost_model: durations, joules and slowdowns.
        space: granularity, shares, row orders.
        mix: rows of the dense batch.
        best_us: shortest predicted period known.
        is_powered: predictions are held to the power cap.
        most_batches: largest number of nano-batches; fewer make the bound one of a smaller space.
        work: configurations priced at most; with fewer than needed the bound is valid but looser.
            By default less where the space asks for few trials.
    """
    work = WORK * min(1.0, space.simulator_trials / ALL_TRIALS) ** 2 if work is None else work
    began, wanted_us = time.perf_counter(), best_us * (1 - AIM)
    bounds = Bounds(graph, cost_model, space, mix, is_powered)
    every = [s for count in range(1, most_batches + 1) for s in splits_of(space, mix, count)]
    splits = _distinct(every, mix)
    screen, spent, num_full = bounds.screen(splits), 0.0, 0
    for split, is_even in _anchors(splits):
        is_large = bounds.problem(split).together.can.size > LARGE
        if is_large and not is_even:
            continue
        clock = bounds.highest_clock(split, wanted_us)
        for part in (clock, 0.97 * clock) if bounds.power and not is_large else (clock,):
            found, _ = bounds.solve(Part(split, bounds.cell(part, 0.996 * part)), float("inf"))
            num_full += found.us > 0
    queue: list[tuple[float, int, bool, Part]] = []
    numbers = itertools.count()
    lowest: dict[int, _Lowest] = {}

    def finish(us: float, split: Split) -> None:
        known = lowest.setdefault(len(split.sizes), _Lowest(float("inf"), split))
        if us < known.us:
            known.us, known.split = us, split

    for split in splits:
        for cell, us in bounds.cells(split, wanted_us, screen):
            if us >= wanted_us:
                finish(us, split)
            else:
                heapq.heappush(queue, (us, next(numbers), False, Part(split, cell)))
        if bounds.power is not None:
            high = bounds.highest_clock(split, wanted_us)
            finish(max(wanted_us, bounds.least_cap_us(split) * high**bounds.power.exponent), split)
    last: tuple[Split, Bound] | None = None
    while queue:
        us, _, is_solved, part = heapq.heappop(queue)
        if us >= wanted_us or spent >= work:
            finish(us, part.split)
            continue
        if not is_solved:
            again_us = screen.bound_us(
                rows_of(part.split, mix), part.split.row_order, part.cell, wanted_us
            )
            if again_us >= wanted_us:
                finish(again_us, part.split)
                continue
            if bounds.is_wide(part):
                for half in bounds.narrower(part):
                    rows, order = rows_of(half.split, mix), half.split.row_order
                    half_us = max(us, screen.bound_us(rows, order, half.cell, wanted_us))
                    heapq.heappush(queue, (half_us, next(numbers), False, half))
                continue
        found, halves = bounds.solve(part, wanted_us)
        num_full += 1
        size = bounds.problem(part.split).together.can.size
        spent += LP_WORK + ROUNDS * size * (1 + size / LARGE)
        us = max(us, found.us)
        last = part.split, found
        if us >= wanted_us or not halves:
            finish(us, part.split)
            continue
        for half in halves:
            heapq.heappush(queue, (us, next(numbers), True, half))
    counts = tuple(
        CountBound(
            num_nano_batches=count,
            bound_us=found.us,
            sizes=found.split.sizes,
            row_order=found.split.row_order,
            is_dominated=found.us >= best_us * (1 - AIM),
        )
        for count, found in sorted(lowest.items())
    )
    bound_us = min(found.us for found in lowest.values())
    if last is None:
        split = min(lowest.values(), key=lambda found: found.us).split
        clock = bounds.highest_clock(split, wanted_us)
        last = split, bounds.solve(Part(split, bounds.cell(clock, clock)), float("inf"))[0]
    return SpaceBound(
        bound_us=min(bound_us, best_us),
        best_us=best_us,
        binds=bounds.binds(*last),
        counts=counts,
        num_cuts=len(every),
        num_full=num_full,
        seconds=time.perf_counter() - began,
    )


def _distinct(splits: Sequence[Split], mix: RowMix) -> list[Split]:
    """One of those whose nano-batches are the same but for their order."""
    kept: dict[tuple[tuple[float, float], ...], Split] = {}
    for split in splits:
        held = sorted((rows.decode_tokens, rows.prefill_tokens) for rows in rows_of(split, mix))
        kept.setdefault(tuple(held), split)
    return list(kept.values())


def _anchors(splits: Sequence[Split]) -> list[tuple[Split, bool]]:
    """Cuts to solve first, and whether it is an even one.

    Of each count and row order the most even, a middling and the least even one.
    """
    groups: dict[tuple[int, str], list[Split]] = {}
    for split in splits:
        groups.setdefault((len(split.sizes), split.row_order), []).append(split)
    found: list[tuple[Split, bool]] = []
    for group in groups.values():
        ranked = sorted(group, key=lambda s: (max(s.sizes) - min(s.sizes), s.sizes))
        chosen = dict.fromkeys((ranked[0], ranked[len(ranked) // 2], ranked[-1]))
        found += [(split, number == 0) for number, split in enumerate(chosen)]
    return found
