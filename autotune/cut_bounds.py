"""Bounds of one cut of the dense batch over all clocks, shares, kernels, forms and orders.

A plan has one clock x. Its layers take at least as long as at a higher clock, and its joules are at
least those at a lower one, so that the clocks are divided into cells and each has a bound. Above
some clock the least joules alone are too many, below some clock the time alone is too long; what
lies between is looked at in small cells.

Used by `certificate.py`, which says what they prove.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Lane as PlanLane
from ..search_spaces.schema import SearchSpace
from .configuration_lp import Bound, solve
from .configuration_problem import NOTHING, Cell, Lane, Longer, Problem
from .configurations import LANES, Configurations
from .cost_model import CostModel
from .milp_input import Split
from .patterns import NETWORK, batch_mix, has_sm_free, legal_shares, split_batches, total_tokens
from .power_model import LEAST_CLOCK
from .progress_lp import ProgressLp
from .screen import Screen

CELL = 0.01
"""Steps of clocks."""
FINEST = 0.01
"""Clocks so close to each other are not told apart further: the bound would rise by 0.03 %."""
COARSE = 8
"""Steps looked at together at first; those with low bounds are divided later."""
WIDEST = 16
"""Steps looked at together where the bound is far above what is asked for."""


def space_shares(lane: str, cost_model: CostModel, space: SearchSpace, is_free: bool) -> list[int]:
    """Every share that the declared space has for ops of a lane."""
    hardware = cost_model.hardware
    total = hardware.num_sms
    if lane == NETWORK:
        return sorted({*legal_shares(NETWORK, hardware, space, is_free), total})
    sides = {s for one in LANES for s in legal_shares(one, hardware, space)}
    return sorted(sides | {total - s for s in sides} | {total})


def cuts(total: int, step: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut `total` rows into `count` parts at multiples of `step`."""
    for ends in combinations(range(step, total, step), count - 1):
        edges = (0, *ends, total)
        yield tuple(high - low for low, high in pairwise(edges))


def splits_of(space: SearchSpace, mix: RowMix, count: int) -> Iterator[Split]:
    """Every cut of this many nano-batches in every row order."""
    total, orders = total_tokens(mix), space.row_orders if count > 1 else space.row_orders[:1]
    sizes = list(cuts(total, space.token_granularity, count))
    if count == 2 and not sizes and total > 1:
        sizes = [(total // 2, total - total // 2)]
    for part in sizes:
        for order in orders:
            yield Split(sizes=part, row_order=order)


def rows_of(split: Split, mix: RowMix) -> tuple[RowMix, ...]:
    """What each nano-batch holds."""
    held = split_batches(split.sizes, split.row_order, mix)
    return tuple(batch_mix(batch, mix) for batch in held)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the space: a cut, a cell of clocks, and options that are left out."""

    split: Split
    cell: Cell
    without: tuple[frozenset[tuple[int, int]], ...] = ()
    """Sets of (node, share) that may not be taken."""

    @property
    def banned(self) -> frozenset[tuple[int, int]]:
        """All of them."""
        return frozenset[tuple[int, int]]().union(*self.without)


FAILURES, HELP = 3, 2e-4
"""LPs that keep orders are solved of a cut until so many in a row have raised its bound by less."""
MOST_KEPT = 10_000_000
"""Configurations of the problems that are kept for later, in all."""


class Bounds:
    """Bounds of cuts, with times and slowdowns looked up once."""

    def __init__(
        self,
        graph: OpGraph,
        cost_model: CostModel,
        space: SearchSpace,
        mix: RowMix,
        is_powered: bool,
        collectives: PlanLane = NETWORK,
    ) -> None:
        """`collectives`: the lane that all of them take."""
        self.graph, self.cost_model, self.mix = graph, cost_model, mix
        self.power = cost_model.power if is_powered else None
        is_free = has_sm_free(graph, cost_model)
        shares = {lane: space_shares(lane, cost_model, space, is_free) for lane in LANES}
        self.configurations = Configurations(
            graph, cost_model, shares, self.power, is_free, collectives
        )
        self._beyond_us = cost_model.iteration_overhead_us(graph, mix)
        self._beyond = cost_model.overhead_loads(graph, mix) if self.power else ()
        self._problems: dict[Split, Problem] = {}
        self._screen: Screen | None = None
        self._taken: dict[Split, tuple[int, ...]] = {}
        self._progress: dict[Split, ProgressLp] = {}
        self._failed: dict[Split, int] = {}
        self.ordered_size = 0
        """States times groups of the LPs that kept orders, in all."""

    def screen(self, splits: Sequence[Split]) -> Screen:
        """The screen of these cuts."""
        rows = {mix for split in splits for mix in rows_of(split, self.mix)}
        if self._screen is None:
            held = sorted(rows, key=lambda mix: (mix.tokens, mix.decode_tokens))
            self._screen = Screen(self.configurations, held)
        return self._screen

    # -- clocks --------------------------------------------------------------------------------

    def cell(self, high: float, low: float) -> Cell:
        """The cell of these clocks."""
        power, layers = self.power, self.graph.num_layers
        if power is None:
            return Cell(
                high=1.0,
                low=1.0,
                num_layers=layers,
                beyond_us=self._beyond_us,
                us_per_joule=(0.0, 0.0),
                beyond_cap_us=0.0,
            )
        watts, e = power.headroom_w, power.exponent
        chord = e * (1 + e) / 8 * (1 - low / high) ** 2 * (high / low) ** (1 + e)
        at_low, at_high = (
            1e6 * power.joules_at(1.0, clock) / watts * max(0.0, 1 - chord) for clock in (low, high)
        )
        return Cell(
            high=high,
            low=low,
            num_layers=layers,
            beyond_us=sum(load.us_at(high) for load in self._beyond),
            us_per_joule=(at_low, at_high),
            beyond_cap_us=at_low * sum(load.joules for load in self._beyond),
        )

    def least_cap_us(self, split: Split) -> float:
        """Time that the least joules of an iteration ask for at the highest clock."""
        cell = self.cell(1.0, 1.0)
        joules = self.configurations.least_joules(rows_of(split, self.mix))
        return cell.beyond_cap_us + cell.us_per_joule[0] * joules * self.graph.num_layers

    def highest_clock(self, split: Split, wanted_us: float) -> float:
        """Above it the least joules ask for so much time: a clock on the grid."""
        cap_us = self.least_cap_us(split)
        if self.power is None or cap_us <= wanted_us:
            return 1.0
        clock = (wanted_us / cap_us) ** (1 / self.power.exponent)
        step = int(np.floor(np.log(clock) / np.log(1 - CELL)))
        return float((1 - CELL) ** step)

    def cells(self, split: Split, wanted_us: float, screen: Screen) -> Iterator[tuple[Cell, float]]:
        """Wide cells that cover all clocks, each with a bound, perhaps below what is wanted."""
        rows, order = rows_of(split, self.mix), split.row_order
        high, width = self.highest_clock(split, wanted_us), COARSE
        if self.power is None:
            cell = self.cell(1.0, 1.0)
            yield cell, screen.bound_us(rows, order, cell)
            return
        while high > LEAST_CLOCK:
            # below: time alone, whatever the joules
            rest = self.cell(high, LEAST_CLOCK)
            us = screen.bound_us(rows, order, rest, wanted_us)
            if us >= wanted_us:
                yield rest, us
                return
            cell = self.cell(high, high * (1 - CELL) ** width)
            us = screen.bound_us(rows, order, cell, wanted_us * 1.03)
            yield cell, us
            high *= (1 - CELL) ** width
            if us > wanted_us * (1 + CELL * width):
                width = min(WIDEST, 2 * width)

    # -- LPs -----------------------------------------------------------------------------------

    def problem(self, split: Split) -> Problem:
        """The LP of a cut."""
        if split not in self._problems:
            while sum(p.together.size for p in self._problems.values()) > MOST_KEPT:
                self._problems.pop(next(iter(self._problems)))
            self._problems[split] = self.configurations.problem(rows_of(split, self.mix))
        return self._problems[split]

    def solve(self, part: Part, wanted_us: float) -> tuple[Bound, list[Part]]:
        """The LP's bound of a part, and its halves."""
        problem, shares = self.problem(part.split), self.shares_of(part.split)
        if part.without:
            banned = part.banned
            keep: list[NDArray[np.bool_]] = []
            for lane, held in zip(problem.lanes, shares, strict=True):
                keep.append(
                    np.array(
                        [
                            (int(node), int(share)) not in banned
                            for node, share in zip(lane.node, held, strict=True)
                        ]
                    )
                )
            problem = kept(problem, keep)
            shares = [held[mask] for held, mask in zip(shares, keep, strict=True)]
        found = solve(problem, part.cell, wanted_us, self._taken.get(part.split, ()))
        if found.taken:
            self._taken[part.split] = found.taken
        if self._screen is not None and not part.without:
            rows = rows_of(part.split, self.mix)
            self._screen.keep(rows, part.split.row_order, part.cell, found)
        failed = self._failed.get(part.split, 0)
        if found.us < wanted_us and len(part.split.sizes) == 2 and failed < FAILURES:
            ordered_us = self._ordered_us(part, wanted_us)
            has_helped = ordered_us > found.us * (1 + HELP)
            self._failed[part.split] = -FAILURES if has_helped else failed + 1
            found = replace(found, us=max(found.us, ordered_us))
        return found, self._halves(part, problem, shares, found)

    def _ordered_us(self, part: Part, wanted_us: float) -> float:
        """The bound of a part of two nano-batches with the order of the ops in each."""
        if part.split not in self._progress:
            self._progress[part.split] = ProgressLp(
                self.graph, self.configurations.index, self.problem(part.split)
            )
        lp = self._progress[part.split]
        self.ordered_size += lp.num_states * len(lp.groups)
        return lp.bound_us(part.cell, part.banned, self.shares_of(part.split), wanted_us)

    def shares_of(self, split: Split) -> list[NDArray[np.intp]]:
        """By lane, the share of each option."""
        rows = rows_of(split, self.mix)
        found: list[list[int]] = [[], [], []]
        for mix in rows:
            for index, lane in enumerate(self.configurations.lane):
                calls = self.configurations.calls(index, mix)
                found[lane] += [call.place.num_sms for call in calls]
        return [np.array([*lane, -1], dtype=np.intp) for lane in found]

    def _halves(
        self, part: Part, problem: Problem, shares: Sequence[NDArray[np.intp]], found: Bound
    ) -> list[Part]:
        """Halves of a wide cell; else small and large shares of the nano-op that mixes most."""
        if part.cell.high - part.cell.low > FINEST:
            return self.narrower(part)
        best: tuple[float, int, float, list[int]] | None = None
        for lane, held, used in zip(problem.lanes, shares, found.used, strict=True):
            for node in np.unique(lane.node[lane.node != NOTHING]):
                mine = lane.node == node
                options = sorted({int(s) for s in held[mine]})
                of_share = [float(used[mine & (held == s)].sum()) for s in options]
                whole = sum(of_share)
                if whole <= 0 or len(options) < 2:
                    continue
                mixed = (1 - max(of_share) / whole) * float(found.prices[node])
                mean = sum(s * u for s, u in zip(options, of_share, strict=True)) / whole
                if mixed > 1e-3 and (best is None or mixed > best[0]):
                    best = mixed, int(node), mean, options
        if best is None:
            return []
        _, node, mean, options = best
        small = frozenset((node, s) for s in options if s > mean)
        large = frozenset((node, s) for s in options if s <= mean)
        return [Part(part.split, part.cell, (*part.without, some)) for some in (small, large)]

    def is_wide(self, part: Part) -> bool:
        """Whether its clocks should be divided before an LP is solved."""
        return part.cell.high * (1 - CELL) ** (COARSE + 1) > part.cell.low

    def narrower(self, part: Part) -> list[Part]:
        """The halves of its cell of clocks."""
        cell, middle = part.cell, (part.cell.high * part.cell.low) ** 0.5
        cells = self.cell(cell.high, middle), self.cell(middle, cell.low)
        return [Part(part.split, one, part.without) for one in cells]

    def binds(self, split: Split, found: Bound) -> str:
        """What the bound of a cut is made of, in words."""
        num_ops = len(self.configurations.ops)
        priced = found.prices.reshape(-1, num_ops).sum(axis=0)
        lane = np.array(self.configurations.lane)
        parts = [(float(priced[lane == number].sum()), name) for number, name in enumerate(LANES)]
        total = sum(part for part, _ in parts) or 1.0
        text = ", ".join(f"{name} {100 * part / total:.0f} %" for part, name in parts if part)
        both = found.time_price + found.joule_price
        weight = f"time {100 * found.time_price / both:.0f} %, joules the rest"
        if self.power is None:
            weight = "time alone"
        return f"{weight}; {text} of its price, cut {'+'.join(map(str, split.sizes))}"


def kept(problem: Problem, keep: Sequence[NDArray[np.bool_]]) -> Problem:
    """The problem with some options only; "nothing" must be among them."""
    place = {int(old): new for new, old in enumerate(np.flatnonzero(keep[2]))}
    first, second, third = (
        Lane(
            node=lane.node[mask],
            us=lane.us[mask],
            sync_us=lane.sync_us[mask],
            alone_sync_us=lane.alone_sync_us[mask],
            stretch=lane.stretch[mask],
            joules=lane.joules[mask],
            is_hidden=lane.is_hidden[mask],
        )
        for lane, mask in zip(problem.lanes, keep, strict=True)
    )
    return Problem(
        lanes=(first, second, third),
        together=problem.together.kept(keep),
        has_work=problem.has_work,
        forms=problem.forms,
        longer=tuple(
            Longer(option=place[one.option], norm=one.norm, part=one.part)
            for one in problem.longer
            if one.option in place
        ),
    )
