"""A lower bound on the period of every order of some nano-ops: the configuration LP.

A configuration is a set of nano-ops that may run at the same instant, each with its share and
kernel: at most one of each lane, on shares that fit on the GPU together, none of which waits for
another one. In it each runs at the rate 1 / (time alone x its slowdown beside the others). Time and
joules are minimised together, as both belong to the choice of shares and kernels, for clocks x of
a small range (`Cell`): times at its upper end, joules at its lower one.

    minimise P                                   period of an iteration, in us
    P >= L sum_c x_c + time beyond the layers    x_c: time spent in configuration c, in us a layer
    P >= (L sum_c J_c x_c + joules beyond) / watts that the cap leaves for them
    sum_c rate_ic x_c >= 1                       every nano-op i is done once a layer
                      >= z_f                     for those of form f, where sum_f z_f = 1

Any schedule spends its time in configurations, so none is shorter. What the LP leaves out: when a
nano-op may start (order within a layer beyond "never beside"), that it keeps its share and runs in
one go, and most synchronisation. A collective without SMs makes the norm behind it longer; that is
a linear term of the norm's row.

There are up to a million configurations, so columns are generated: prices v_i of a few columns,
then the configuration that earns most at these prices. Prices v >= 0 and any price m >= 0 of the
joules give a valid bound: with M the most that a configuration earns per us, sum_i rate_ic (v_i -
m J_ic),

    P >= (L sum_i v_i + M x time beyond + m x time of joules beyond) / (M + m)

so that stopping early, or having no LP solver at all, costs tightness and never truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .highs_banner import silence_banner

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

MAX_ROUNDS = 40
"""Of column generation; a round is one LP and one pricing."""
COLUMNS_A_ROUND = 60
TOLERANCE = 1e-4
"""Relative distance between the LP's value and the bound at which generation stops."""
THREADS = 2
"""As many as the structure MILP has: HiGHS refuses to run with another number in one process."""
NOTHING = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Clocks x in a range, as parts of the highest; and what is beyond the layers at them."""

    high: float
    low: float
    num_layers: int
    beyond_us: float
    """Time, at the upper end."""
    us_per_joule: float
    """Time that the cap asks for a dynamic joule (at the highest clock), at the lower end; 0
    without a cap."""
    beyond_cap_us: float
    """Joules, as time."""

    def joined_us(self, layer: float, time_price: float, joule_price: float) -> float:
        """The bound that prices prove, of which those of the nano-ops add up to `layer`."""
        both = time_price + joule_price
        if both <= 0:
            return 0.0
        beyond = time_price * self.beyond_us + joule_price * self.beyond_cap_us
        return (self.num_layers * layer + beyond) / both


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The options of one lane: a nano-op on a share in a variant. The last one is "nothing"."""

    node: Indices
    """`NOTHING` for nothing."""
    us: Array
    """Time at the highest clock, with nothing slowing it."""
    alone_us: Array
    """Time where nothing else runs: a schedule in one lane may need no synchronisation."""
    stretch: Array
    """Clock below which it is longer in proportion."""
    joules: Array
    """Dynamic, at the highest clock."""
    is_hidden: NDArray[np.bool_]
    """Memory-bound: of what the clock and the neighbours cost it, the larger counts."""

    def lengths(self, clock: float) -> tuple[Array, Array]:
        """(time alone at the highest clock, factor at this one)."""
        return self.us, np.maximum(1.0, self.stretch / clock)


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """What may run together, and how fast: arrays over triples of options [c, m, n]."""

    can: NDArray[np.bool_]
    slowdowns: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
    """Product of the pairwise slowdowns of the option of each lane beside the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Longer:
    """A collective without SMs makes the norm behind it longer."""

    option: int
    """Of the third lane."""
    norm: int
    """Node."""
    part: float
    """Of the norm's time alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """Chains of nodes of which exactly one is done."""

    chains: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The LP of one cut."""

    lanes: tuple[Lane, Lane, Lane]
    together: Together
    has_work: NDArray[np.bool_]
    """By node."""
    forms: tuple[Forms, ...] = ()
    longer: tuple[Longer, ...] = ()

    def total(self, prices: Array) -> float:
        """What nodes that must be done earn at least; of forms the cheapest."""
        optional = [node for forms in self.forms for chain in forms.chains for node in chain]
        whole = float(prices[self.has_work].sum() - prices[optional].sum())
        chosen = sum(
            min(float(prices[list(chain)].sum()) for chain in forms.chains) for forms in self.forms
        )
        return whole + chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What was proved, and the prices that prove it."""

    us: float
    """Of an iteration."""
    time_price: float
    joule_price: float
    """Of joules as time; the two add up to 1."""
    prices: Array
    """By node, in us."""
    used: tuple[Array, Array, Array]
    """By lane and option: part of its nano-op that the LP does with it; zeros without a solver."""


class Rates:
    """Rates of all options in all configurations, in one cell, in single precision.

    Their rounding, 1e-7, is a thousandth of `TOLERANCE`.
    """

    def __init__(self, problem: Problem, cell: Cell) -> None:
        self.problem, self.cell = problem, cell
        self.rates: list[NDArray[np.float32]] = []
        shape = problem.together.can.shape
        for lane, options in enumerate(problem.lanes):
            us, factor = options.lengths(cell.high)
            view = [1, 1, 1]
            view[lane] = shape[lane]
            slow = problem.together.slowdowns[lane]
            hidden = options.is_hidden & (options.stretch > cell.high)
            least = np.where(hidden, factor, 0.0).reshape(view).astype(np.float32)
            times = (us * np.where(hidden, 1.0, factor)).reshape(view).astype(np.float32)
            rate = np.maximum(slow, least)
            rate *= times
            np.divide(problem.together.can, rate, out=rate)
            index: list[slice | int] = [-1] * 3
            index[lane] = slice(None)
            alone = 1.0 / (options.alone_us * np.maximum(1.0, options.stretch / cell.high))
            rate[tuple(index)] = alone
            index = [slice(None)] * 3
            index[lane] = -1
            rate[tuple(index)] = 0.0
            self.rates.append(rate)
        self.joules = [lane.joules * cell.us_per_joule for lane in problem.lanes]

    def earnings(self, prices: Array, joule_price: float) -> NDArray[np.float32]:
        """Of each configuration, per us."""
        total, part = np.empty_like(self.rates[0]), np.empty_like(self.rates[0])
        for lane, options in enumerate(self.problem.lanes):
            view = [1, 1, 1]
            view[lane] = len(options.node)
            worth = np.where(options.node >= 0, prices[options.node], 0.0)
            worth = worth - joule_price * self.joules[lane]
            for one in self.problem.longer if lane == 2 else ():
                worth[one.option] -= one.part * prices[one.norm]
            out = part if lane else total
            np.multiply(self.rates[lane], worth.reshape(view).astype(np.float32), out=out)
            if lane:
                total += part
        return total


def solve(problem: Problem, cell: Cell, enough_us: float = float("inf")) -> Bound:
    """The best bound of the LP in one cell; a bound of `enough_us` is not improved further."""
    rates = Rates(problem, cell)
    master = _Master(problem, rates)
    if not master.is_available:
        return _alone(problem, rates)
    best, nothing = None, tuple(np.zeros(len(lane.node)) for lane in problem.lanes)
    for _ in range(MAX_ROUNDS):
        if not master.is_solved():
            break
        time_price, joule_price, prices = master.prices()
        earned = rates.earnings(prices, joule_price)
        most = max(float(earned.max()), 1e-12)
        us = cell.joined_us(problem.total(prices), most, joule_price)
        if best is None or us > best.us:
            best = Bound(
                us=us,
                time_price=most,
                joule_price=joule_price,
                prices=prices,
                used=nothing,  # pyright: ignore[reportArgumentType]
            )
        if us >= enough_us or most <= time_price + TOLERANCE or not master.add_best(earned):
            break
    if best is None:
        return _alone(problem, rates)
    return Bound(
        us=best.us,
        time_price=best.time_price,
        joule_price=best.joule_price,
        prices=best.prices,
        used=master.used(),
    )


def _alone(problem: Problem, rates: Rates) -> Bound:
    """Without a solver: every nano-op at what it takes alone at least."""
    prices = np.where(problem.has_work, np.inf, 0.0)
    for options in problem.lanes:
        lengths = options.alone_us * options.lengths(rates.cell.high)[1]
        for node, length in zip(options.node, lengths, strict=True):
            if node != NOTHING:
                prices[node] = min(prices[node], length)
    prices[~np.isfinite(prices)] = 0.0
    most = max(float(rates.earnings(prices, 0.0).max()), 1e-12)
    us = rates.cell.joined_us(problem.total(prices), most, 0.0)
    nothing = tuple(np.zeros(len(lane.node)) for lane in problem.lanes)
    return Bound(
        us=us,
        time_price=most,
        joule_price=0.0,
        prices=prices,
        used=nothing,  # pyright: ignore[reportArgumentType]
    )


class _Master:
    """The LP over the columns known so far, in HiGHS."""

    def __init__(self, problem: Problem, rates: Rates) -> None:
        self.is_available = True
        try:
            import highspy
        except ImportError:  # the first prices alone are a bound too
            self.is_available = False
            return
        silence_banner()
        self.problem, self.rates, cell = problem, rates, rates.cell
        self._places: list[tuple[int, int, int]] = []
        self._known: set[tuple[int, int, int]] = set()
        self._highs: Any = highspy.Highs()
        self._highs.setOptionValue("output_flag", False)
        self._highs.setOptionValue("threads", THREADS)
        self._highs.addRow(cell.beyond_us, highspy.kHighsInf, 0, [], [])
        self._highs.addRow(cell.beyond_cap_us, highspy.kHighsInf, 0, [], [])
        optional = {n for forms in problem.forms for chain in forms.chains for n in chain}
        for node, has_work in enumerate(problem.has_work):
            least = float(has_work and node not in optional)
            self._highs.addRow(least, highspy.kHighsInf, 0, [], [])
        self._add_column(1.0, {0: 1.0, 1: 1.0})
        for number, forms in enumerate(problem.forms):
            self._highs.addRow(1.0, 1.0, 0, [], [])
            row = 2 + len(problem.has_work) + number
            for chain in forms.chains:
                self._add_column(0.0, {row: 1.0} | {2 + node: -1.0 for node in chain})
        self._first = 1 + sum(len(forms.chains) for forms in problem.forms)
        ends = [len(lane.node) - 1 for lane in problem.lanes]
        for lane, options in enumerate(problem.lanes):
            for option in _cheapest(options, cell):
                place = list(ends)
                place[lane] = option
                self._add((place[0], place[1], place[2]))

    def _add_column(self, cost: float, values: dict[int, float]) -> None:
        rows = np.array(list(values), np.int32)
        numbers = np.array(list(values.values()), np.float64)
        self._highs.addCol(cost, 0.0, 1e30, len(rows), rows, numbers)

    def _add(self, place: tuple[int, int, int]) -> bool:
        """A configuration; says whether it is new."""
        if place in self._known:
            return False
        values, joules = dict[int, float](), 0.0
        for lane, option in enumerate(place):
            rate = float(self.rates.rates[lane][place])
            if rate <= 0:
                continue
            node = int(self.problem.lanes[lane].node[option])
            values[2 + node] = rate
            joules += rate * float(self.rates.joules[lane][option])
            for one in self.problem.longer if lane == 2 else ():
                if one.option == option:
                    row = 2 + one.norm
                    values[row] = values.get(row, 0.0) - one.part * rate
        if not values:
            return False
        layers = self.rates.cell.num_layers
        self._known.add(place)
        self._places.append(place)
        self._add_column(0.0, {0: -float(layers), 1: -layers * joules} | values)
        return True

    def add_best(self, earned: NDArray[np.float32]) -> bool:
        """The best configuration of each option of the first lane; False when all are known."""
        flat = earned.reshape(earned.shape[0], -1)
        at = flat.argmax(axis=1)
        most = flat[np.arange(len(at)), at]
        depth = earned.shape[2]
        chosen = np.argsort(-most, kind="stable")[:COLUMNS_A_ROUND]
        new = [self._add((int(c), int(at[c]) // depth, int(at[c]) % depth)) for c in chosen]
        return any(new)

    def is_solved(self) -> bool:
        """Solve the LP over the columns known so far."""
        import highspy

        self._highs.run()
        return self._highs.getModelStatus() == highspy.HighsModelStatus.kOptimal

    def prices(self) -> tuple[float, float, Array]:
        """(of time, of joules, of the nodes a layer)."""
        duals = np.maximum(np.array(self._highs.getSolution().row_dual, dtype=np.float64), 0.0)
        nodes = duals[2 : 2 + len(self.problem.has_work)] / self.rates.cell.num_layers
        return float(duals[0]), float(duals[1]), nodes

    def used(self) -> tuple[Array, Array, Array]:
        """By lane and option, what part of its nano-op it does."""
        spent = np.array(self._highs.getSolution().col_value)[self._first :]
        used = tuple(np.zeros(len(lane.node)) for lane in self.problem.lanes)
        for place, us in zip(self._places, spent, strict=True):
            if us > 1e-9:
                for lane, option in enumerate(place):
                    used[lane][option] += us * float(self.rates.rates[lane][place])
        return used  # pyright: ignore[reportReturnType]


def _cheapest(options: Lane, cell: Cell) -> list[int]:
    """Of each node the options that cost least alone, in time, in joules, and in both."""
    us, factor = options.lengths(cell.high)
    time, joules = us * factor, options.joules * cell.us_per_joule
    found: set[int] = set()
    for node in np.unique(options.node[options.node != NOTHING]):
        mine = np.flatnonzero(options.node == node)
        for part in (1.0, 0.7, 0.3, 0.0):
            cost = part * time[mine] + (1 - part) * joules[mine]
            found.add(int(mine[cost.argmin()]))
    return sorted(found)
