"""What no plan of the declared space can beat: every cut, order, share, kernel and transport.

The space: 1 to `MOST_BATCHES` nano-batches cut at multiples of the space's granularity, all row
orders, any issue order, all shares of the space, their complements, all SMs, and none where
collectives can do without. For each cut, one layer takes at least the value of the configuration
LP (`configuration_lp.py`), in the simulator's own model: the fastest variant of each op at each
share, and the measured slowdowns. A whole iteration takes `num_layers` times that and what is
beyond the layers; where the power cap is known it is joined with the time that the least dynamic
joules need, as the simulator joins them.

Cuts are many (a thousand of 2048 rows), so they are bounded best first:

    coarse   each op as one, at the rate of its most efficient nano-op on each share, at prices
             carried over from the even cut; one pass over some ten thousand configurations
    full     every nano-op by itself, prices from column generation

The cut with the lowest bound is made full until the lowest one is full already: that is the bound
of the space. Cuts whose bound is above the best known plan are shown to be dominated.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, replace

from ..runtime.op_graph import OpGraph, RowMix
from ..search_spaces.schema import SearchSpace
from .cost_model import CostModel
from .cut_bounds import Bounds, splits_of
from .milp_input import Split

MOST_BATCHES = 4
COARSE, AGAIN, FULL = range(3)
"""How a cut was bounded: at the prices of its time, at those of cuts solved since, at its own."""


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
    """No plan of this count is faster than the best known one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceBound:
    """A lower bound on the predicted period of every plan in the declared space."""

    bound_us: float
    best_us: float
    """Shortest predicted period of the race."""
    binds: str
    """Which lanes the bound's price lies on, and the cut that has it."""
    counts: tuple[CountBound, ...]
    num_cuts: int
    num_full: int
    """Cuts whose nano-ops were looked at one by one; the others were above the bound already."""
    seconds: float

    @property
    def gap(self) -> float:
        """1 - bound / best."""
        return max(0.0, 1 - self.bound_us / self.best_us)

    def against(self, best_us: float) -> SpaceBound:
        """The same bound beside a plan that was found later."""
        counts = tuple(replace(c, is_dominated=c.bound_us >= best_us) for c in self.counts)
        return replace(self, bound_us=min(self.bound_us, best_us), best_us=best_us, counts=counts)


def space_bound(
    graph: OpGraph,
    cost_model: CostModel,
    space: SearchSpace,
    mix: RowMix,
    *,
    best_us: float,
    is_powered: bool,
    most_batches: int = MOST_BATCHES,
    most_full: int = 120,
) -> SpaceBound:
    """Bound every plan of the declared space.

    Args:
        graph: of one rank.
        cost_model: durations and slowdowns.
        space: granularity, shares, row orders.
        mix: rows of the dense batch.
        best_us: shortest predicted period known.
        is_powered: predictions are joined with the power limit.
        most_batches: largest number of nano-batches; fewer make the bound one of a smaller space.
        most_full: cuts to look at nano-op by nano-op; with fewer than needed the bound is valid
            but looser.
    """
    began = time.perf_counter()
    bounds = Bounds(graph, cost_model, space, mix, is_powered)
    queue: list[tuple[float, int, int, Split]] = []
    for count in range(1, most_batches + 1):
        for split in splits_of(space, mix, count):
            is_full = count <= 2  # cheap, and their prices serve the others
            us = bounds.cut_us(split, is_full, best_us)
            queue.append((us, FULL if is_full else COARSE, len(queue), split))
    num_cuts, num_full = len(queue), sum(level == FULL for _, level, _, _ in queue)
    heapq.heapify(queue)
    lowest: dict[int, tuple[float, Split]] = {}
    while queue:
        us, level, number, split = heapq.heappop(queue)
        if len(split.sizes) in lowest:
            continue
        if level == FULL or us >= best_us or num_full >= most_full:
            lowest[len(split.sizes)] = us, split
            continue
        level += 1
        num_full += level == FULL
        again_us = bounds.cut_us(split, level == FULL, best_us)
        heapq.heappush(queue, (max(us, again_us), level, number, split))
    counts = tuple(
        CountBound(
            num_nano_batches=count,
            bound_us=us,
            sizes=split.sizes,
            row_order=split.row_order,
            is_dominated=us >= best_us,
        )
        for count, (us, split) in sorted(lowest.items())
    )
    bound_us, split = min(lowest.values(), key=lambda found: found[0])
    return SpaceBound(
        bound_us=min(bound_us, best_us),
        best_us=best_us,
        binds=bounds.binds(split),
        counts=counts,
        num_cuts=num_cuts,
        num_full=num_full,
        seconds=time.perf_counter() - began,
    )
