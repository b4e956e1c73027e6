"""What no plan of the declared space can beat: every cut, order, form, share, kernel and transport.

The space: 1 to `MOST_BATCHES` nano-batches cut at multiples of the space's granularity, all row
orders, any issue order, either form of joining the attention's output for each nano-batch, all
shares of the space, their complements, all SMs, and none where collectives can do without; the
collectives in a lane of their own, or all of them in that of compute. For each cut and each clock
the period is at least the value of the configuration LP (`configuration_lp.py`), of two
nano-batches that of the LP that keeps their orders too (`progress_lp.py`), in the simulator's own
model: times, joules and measured slowdowns of every kernel at every share.

Cuts are many (a thousand of 2048 rows). Those whose nano-batches are the same but for their order
have one bound. The rest is branch and bound over parts of the space, lowest first:

    screen   prices of similar cuts that were solved, tried on a cut and a cell of clocks
    LP       a cut's own prices
    halves   the nano-op whose share the LP mixes most takes a small share, or a large one

A part is done when its bound is within `AIM` of the best known plan. When all are, or when the
work is used up, the lowest bound of any part is that of the space. What the even cuts reach by
their LPs says how far it is worth screening others at first.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Lane
from ..search_spaces.schema import SearchSpace
from .configuration_lp import Bound
from .cost_model import CostModel
from .cut_bounds import Bounds, Part, rows_of, splits_of
from .milp_input import Split
from .patterns import COMPUTE, NETWORK

MOST_BATCHES = 4
FEW = 2
"""Nano-batches of the even cuts that tell how far the bound may come."""
AIM = 0.0095
"""A part whose bound is so close to the best plan is not looked at further."""
WORK = 1.5e9
"""Configurations priced in LPs, in all: about 15 seconds of one core."""
ALL_TRIALS = 60
"""Simulator trials of a space for which all of that is done."""
ROUNDS, LP_WORK = 12, 1e6
"""Of an LP, as far as work is counted, and what it takes whatever its size."""
SMALL = 1e5
"""Configurations of an LP that is solved sooner than prices are tried."""
SCREEN_WORK, ORDERED_WORK = 4e5, 600.0
"""Of trying prices on a cut, and of a state and group of the LP that keeps orders."""
CLOCKS_TRIED = 6
"""At most, to see what the LPs of a cut reach."""
NEARLY = 0.002
"""How far above what is looked for a bound need not be looked at yet."""
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
    began = time.perf_counter()
    every = [s for count in range(1, most_batches + 1) for s in splits_of(space, mix, count)]
    splits, passes = _distinct(every, mix), list[_Pass]()
    spare = work
    lanes: tuple[Lane, ...] = (COMPUTE, NETWORK) if graph.tp_degree > 1 else (NETWORK,)
    for collectives in lanes:
        bounds = Bounds(graph, cost_model, space, mix, is_powered, collectives)
        one = _Pass(bounds, splits, mix, best_us * (1 - AIM), work, spare)
        one.run()
        work -= one.spent
        passes.append(one)
    lowest: dict[int, _Lowest] = {}
    for count in sorted({count for one in passes for count in one.lowest}):
        lowest[count] = min((one.lowest[count] for one in passes), key=lambda found: found.us)
    loosest = min(passes, key=lambda one: min(found.us for found in one.lowest.values()))
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
    return SpaceBound(
        bound_us=min(bound_us, best_us),
        best_us=best_us,
        binds=loosest.binds(),
        counts=counts,
        num_cuts=len(every),
        num_full=sum(one.num_full for one in passes),
        seconds=time.perf_counter() - began,
    )


class _Pass:
    """Branch and bound over the parts of the space in which collectives take one lane."""

    def __init__(
        self,
        bounds: Bounds,
        splits: Sequence[Split],
        mix: RowMix,
        wanted_us: float,
        work: float,
        spare: float,
    ) -> None:
        self.bounds, self.splits, self.mix = bounds, splits, mix
        self.wanted_us, self.work, self.spare = wanted_us, work, spare
        self.screen = bounds.screen(splits)
        self.spent, self.num_full = 0.0, 0
        self.lowest: dict[int, _Lowest] = {}
        self.last: tuple[Split, Bound] | None = None
        self._queue: list[tuple[float, int, bool, Part]] = []
        self._numbers = itertools.count()

    def run(self) -> None:
        """Bound every part."""
        anchors = _anchors(self.splits)
        for split, is_even in anchors:
            is_large = self.bounds.problem(split).together.size > LARGE
            if is_large and not is_even:
                continue
            clock = self.bounds.highest_clock(split, self.wanted_us)
            for high in (clock, 0.92 * clock) if self.bounds.power and not is_large else (clock,):
                self._solve(Part(split, self.bounds.cell(high, 0.92 * high)), float("inf"))
        evens = [split for split, is_even in anchors if is_even and len(split.sizes) <= FEW]
        reached = [self._reached_us(split) for split in evens]
        aim_us = min([self.wanted_us, *(us * (1 + NEARLY) for us in reached)])
        for split in self.splits:
            for cell, us in self.bounds.cells(split, aim_us, self.screen):
                self._push(us, Part(split, cell))
                self.spent += SCREEN_WORK
            if self.bounds.power is not None:
                high = self.bounds.highest_clock(split, aim_us)
                cap_us = self.bounds.least_cap_us(split) * high**self.bounds.power.exponent
                self._push(max(aim_us, cap_us), Part(split, self.bounds.cell(1.0, high)))
        while self._queue:
            us, _, is_solved, part = heapq.heappop(self._queue)
            # Small ones take little more each, but shares halve without end: some, not all.
            is_spare = us < aim_us and self._size(part.split) <= SMALL
            work = self.work + (self.spare if is_spare else 0.0)
            if us >= self.wanted_us or self.spent >= work:
                self._finish(us, part.split)
            else:
                self._look_into(us, is_solved, part)

    def _reached_us(self, split: Split) -> float:
        """About what the LPs of a cut prove, over all clocks."""
        high = self.bounds.highest_clock(split, self.wanted_us)
        if self.bounds.power is None:
            cell = self.bounds.cell(1.0, 1.0)
            return self._solve(Part(split, cell), float("inf"))[0].us
        low, best_us = 0.6 * high, float("inf")
        for _ in range(CLOCKS_TRIED):  # time falls with the clock, and joules rise
            clock = (low * high) ** 0.5
            found, _ = self._solve(Part(split, self.bounds.cell(clock, clock)), float("inf"))
            best_us = min(best_us, found.us)
            if found.time_price > found.joule_price:
                low = clock
            else:
                high = clock
        return best_us

    def _solve(self, part: Part, enough_us: float) -> tuple[Bound, list[Part]]:
        before = self.bounds.ordered_size
        found, halves = self.bounds.solve(part, enough_us)
        size = self.bounds.problem(part.split).together.size
        self.spent += LP_WORK + ROUNDS * size * (1 + size / LARGE)
        self.spent += ORDERED_WORK * (self.bounds.ordered_size - before)
        self.num_full += 1
        return found, halves

    def _size(self, split: Split) -> float:
        """Configurations of a cut, as far as it is worth counting them."""
        return self.bounds.problem(split).together.size if len(split.sizes) <= FEW else LARGE

    def _look_into(self, us: float, is_solved: bool, part: Part) -> None:
        """Screen a part again, narrow its clocks, or solve it; push what is left of it."""
        enough_us = min(self.wanted_us, us * (1 + NEARLY))
        is_small = self._size(part.split) <= SMALL
        if not is_solved and not is_small:
            rows, order = rows_of(part.split, self.mix), part.split.row_order
            if self.bounds.is_wide(part):
                for half in self.bounds.narrower(part):
                    half_us = self.screen.bound_us(rows, order, half.cell, enough_us)
                    self.spent += SCREEN_WORK
                    self._push(max(us, half_us), half)
                return
            again_us = max(us, self.screen.bound_us(rows, order, part.cell, enough_us))
            self.spent += SCREEN_WORK
            if again_us >= enough_us:
                self._push(again_us, part)
                return
        found, halves = self._solve(part, self.wanted_us)
        us = max(us, found.us)
        if us < self.wanted_us:
            self.last = part.split, found
        if us >= self.wanted_us or not halves:
            self._finish(us, part.split)
            return
        for half in halves:
            self._push(us, half, is_solved=True)

    def _push(self, us: float, part: Part, is_solved: bool = False) -> None:
        if us >= self.wanted_us:
            self._finish(us, part.split)
        else:
            heapq.heappush(self._queue, (us, next(self._numbers), is_solved, part))

    def _finish(self, us: float, split: Split) -> None:
        known = self.lowest.setdefault(len(split.sizes), _Lowest(float("inf"), split))
        if us < known.us:
            known.us, known.split = us, split

    def binds(self) -> str:
        """What the bound of the loosest part is made of, in words."""
        if self.last is None:
            split = min(self.lowest.values(), key=lambda found: found.us).split
            clock = self.bounds.highest_clock(split, self.wanted_us)
            part = Part(split, self.bounds.cell(clock, clock))
            self.last = split, self.bounds.solve(part, float("inf"))[0]
        return self.bounds.binds(*self.last)


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
