"""A lower bound on the period of every order of some nano-ops: the configuration LP.

A configuration is a set of nano-ops that may run at the same instant, each with its share and
kernel: at most one of each lane, on shares that fit on the GPU together, none of which waits for
another one. In it each runs at the rate 1 / (time alone x its slowdown beside the others). Time and
joules are minimised together, as both belong to the choice of shares and kernels, for clocks x of
a range (`Cell`). A configuration may run at either end of it, with joules that are a little less,
so that no clock in between is better: what it earns (below) is a sum over ops of
v x - m J x^(1 + e) while their time follows the clock, which is above its chord by e (1 + e) / 8 x
(width of the range)^2 of its second term at most. Ops whose time follows the clock in a part of
the range have their rate at the upper end; those whose time follows no clock, joules of the lower.

    minimise P                                   period of an iteration, in us
    P >= L sum_c x_c + time beyond the layers    x_c: time spent in configuration c, in us a layer
    P >= (L sum_c J_c x_c + joules beyond) / watts that the cap leaves for them
    sum_c rate_ic x_c >= 1                       every nano-op i is done once a layer
                      >= z_f                     for those of form f, where sum_f z_f = 1

Any schedule spends its time in configurations, so none is shorter. What the LP leaves out: when a
nano-op may start (order within a layer beyond "never beside"), that it keeps its share and runs in
one go, and some synchronisation. A collective without SMs makes the norm behind it longer; that is
a linear term of the norm's row.

There are up to a million configurations, so columns are generated: prices v_i of a few columns,
then the configuration that earns most at these prices, among those whose options would earn enough
if nothing slowed them. Prices v >= 0 and any price m >= 0 of the
joules give a valid bound: with M the most that a configuration earns per us, sum_i rate_ic (v_i -
m J_ic),

    P >= (L sum_i v_i + M x time beyond + m x time of joules beyond) / (M + m)

so that stopping early, or having no LP solver at all, costs tightness and never truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .configuration_problem import NOTHING, Array, Cell, Indices, Lane, Problem, Singles
from .highs_banner import silence_banner

MAX_ROUNDS = 40
"""Of column generation; a round is one LP and one pricing."""
COLUMNS_A_ROUND = 60
TOLERANCE = 1e-4
"""Relative distance between the LP's value and the bound at which generation stops."""
THREADS = 2
"""As many as the structure MILP has: HiGHS refuses to run with another number in one process."""
END = 1 << 40
"""Between the numbers of a configuration's columns at both ends of a cell."""
ROUNDING = 1e-5
"""Far above that of sums in single precision."""


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
    taken: tuple[int, ...] = ()
    """Numbers of the configurations that the LP spends time in."""


class Rates:
    """Rates of all options in all configurations at both ends of a cell, in single precision.

    Their rounding, 1e-7, is a thousandth of `TOLERANCE`.
    """

    def __init__(self, problem: Problem, cell: Cell) -> None:
        self.problem, self.cell = problem, cell
        together = problem.together
        ends = (cell.low, cell.high) if cell.low < cell.high else (cell.high,)
        self.num_ends = len(ends)
        self.places: list[Indices] = [np.tile(place, len(ends)) for place in together.places]
        """By lane, the option of each column."""
        self.numbers = np.concatenate(
            [together.numbers + END * number for number in range(len(ends))]
        )
        """Of columns, for another problem of the same cut; rising."""
        is_busy = [
            place < len(lane.node) - 1
            for place, lane in zip(together.places, problem.lanes, strict=True)
        ]
        is_alone = np.sum(is_busy, axis=0) == 1
        self.rates: list[Singles] = []
        self._quickest: list[Array] = []
        for number, options in enumerate(problem.lanes):
            place, slow = together.places[number], together.slowdowns[number]
            at_ends: list[Singles] = []
            for clock in ends:
                factor = options.factor_in(clock, cell)
                hidden = options.is_hidden & (factor > 1.0)
                least = np.where(hidden, factor, 0.0).astype(np.float32)
                times = (options.us * np.where(hidden, 1.0, factor)).astype(np.float32)
                taken = np.maximum(slow, least[place]) * times[place]
                taken += options.sync_us.astype(np.float32)[place]
                alone = (options.us * factor + options.alone_sync_us).astype(np.float32)
                taken = np.where(is_alone, alone[place], taken)
                at_ends.append(np.where(is_busy[number], 1.0 / taken, np.float32(0.0)))
            self.rates.append(np.concatenate(at_ends))
            self._quickest.append(options.alone_us(cell.high))
        self.joules = np.zeros(len(self.numbers))
        """What the cap asks for each column's joules, us per us."""
        for lane, options in enumerate(problem.lanes):
            at_ends_us = [options.joules * us for us in cell.us_per_joule[: len(ends)]]
            worth = np.concatenate([us[together.places[lane]] for us in at_ends_us])
            self.joules += self.rates[lane] * worth
        self._least = [lane.joules * cell.us_per_joule[0] for lane in problem.lanes]

    def earnings(
        self, prices: Array, joule_price: float, least: float = -np.inf
    ) -> tuple[Indices, Singles]:
        """Configurations that may earn more than `least` per us, and what each earns."""
        worths: list[Singles] = []
        together = self.problem.together
        most = np.zeros(together.size, dtype=np.float32)
        for lane, options in enumerate(self.problem.lanes):
            worth = np.where(options.node >= 0, prices[options.node], 0.0)
            for one in self.problem.longer if lane == 2 else ():
                worth[one.option] -= one.part * prices[one.norm]
            best = np.maximum(worth - joule_price * self._least[lane], 0.0) / self._quickest[lane]
            most += best.astype(np.float32)[together.places[lane]]
            worths.append(worth.astype(np.float32))
        likely = np.flatnonzero(most > least * (1 - ROUNDING) if least > 0 else most > -np.inf)
        chosen = np.concatenate([likely + end * together.size for end in range(self.num_ends)])
        earned = (-joule_price * self.joules[chosen]).astype(np.float32)
        for lane, worth in enumerate(worths):
            earned += self.rates[lane][chosen] * worth[self.places[lane][chosen]]
        return chosen, earned


def solve(
    problem: Problem,
    cell: Cell,
    enough_us: float = float("inf"),
    likely: Sequence[int] = (),
) -> Bound:
    """The best bound of the LP in one cell.

    Args:
        problem: of a cut.
        cell: clocks.
        enough_us: a bound that is not improved further.
        likely: numbers of configurations to begin with, those that a similar problem used.
    """
    rates = Rates(problem, cell)
    master = _Master(problem, rates, likely)
    if not master.is_available:
        return _alone(problem, rates)
    best, nothing = None, tuple(np.zeros(len(lane.node)) for lane in problem.lanes)
    for _ in range(MAX_ROUNDS):
        if not master.is_solved():
            break
        time_price, joule_price, prices = master.prices()
        chosen, earned = rates.earnings(prices, joule_price, time_price)
        most = max(float(earned.max(initial=0.0)), time_price, 1e-12)  # others earn less
        us = cell.joined_us(problem.total(prices), most, joule_price)
        if best is None or us > best.us:
            best = Bound(
                us=us,
                time_price=most,
                joule_price=joule_price,
                prices=prices,
                used=nothing,  # pyright: ignore[reportArgumentType]
            )
        if us >= enough_us or most <= time_price + TOLERANCE:
            break
        if not master.add_best(chosen, earned, time_price):
            break
    if best is None:
        return _alone(problem, rates)
    return Bound(
        us=best.us,
        time_price=best.time_price,
        joule_price=best.joule_price,
        prices=best.prices,
        used=master.used(),
        taken=master.taken(),
    )


def _alone(problem: Problem, rates: Rates) -> Bound:
    """Without a solver: every nano-op at what it takes alone at least."""
    prices = np.where(problem.has_work, np.inf, 0.0)
    for options in problem.lanes:
        lengths = options.alone_us(rates.cell.high)
        for node, length in zip(options.node, lengths, strict=True):
            if node != NOTHING:
                prices[node] = min(prices[node], length)
    prices[~np.isfinite(prices)] = 0.0
    most = max(float(rates.earnings(prices, 0.0)[1].max(initial=0.0)), 1e-12)
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

    def __init__(self, problem: Problem, rates: Rates, likely: Sequence[int]) -> None:
        self.is_available = True
        try:
            import highspy
        except ImportError:  # the first prices alone are a bound too
            self.is_available = False
            return
        silence_banner()
        self.problem, self.rates, cell = problem, rates, rates.cell
        self._columns: list[int] = []
        self._known: set[int] = set()
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
        numbers = rates.numbers
        at = np.searchsorted(numbers, np.array(likely, dtype=np.intp))
        at = at[at < len(numbers)]
        known = [int(c) for c in at[np.isin(numbers[at], likely)]]
        for column in (*self._first_columns(), *known):
            self._add(column)

    def _first_columns(self) -> list[int]:
        """The cheapest options of each node, alone."""
        places, lanes = self.rates.places, self.problem.lanes
        ends = [len(lane.node) - 1 for lane in lanes]
        is_idle = [place == end for place, end in zip(places, ends, strict=True)]
        found: list[int] = []
        for lane, options in enumerate(lanes):
            others = [is_idle[k] for k in range(3) if k != lane]
            alone = np.flatnonzero(others[0] & others[1])
            cheap = _cheapest(options, self.rates.cell)
            found += [int(c) for c in alone[np.isin(places[lane][alone], cheap)]]
        return found

    def _add_column(self, cost: float, values: dict[int, float]) -> None:
        rows = np.array(list(values), np.int32)
        numbers = np.array(list(values.values()), np.float64)
        self._highs.addCol(cost, 0.0, 1e30, len(rows), rows, numbers)

    def _add(self, column: int) -> bool:
        """A configuration; says whether it is new."""
        if column in self._known:
            return False
        values = dict[int, float]()
        for lane, options in enumerate(self.problem.lanes):
            rate = float(self.rates.rates[lane][column])
            if rate <= 0:
                continue
            option = int(self.rates.places[lane][column])
            row = 2 + int(options.node[option])
            values[row] = values.get(row, 0.0) + rate
            for one in self.problem.longer if lane == 2 else ():
                if one.option == option:
                    row = 2 + one.norm
                    values[row] = values.get(row, 0.0) - one.part * rate
        layers = self.rates.cell.num_layers
        self._known.add(column)
        self._columns.append(column)
        joules = layers * float(self.rates.joules[column])
        self._add_column(0.0, {0: -float(layers), 1: -joules} | values)
        return True

    def add_best(self, columns: Indices, earned: Singles, least: float) -> bool:
        """Of each option of the first lane the best one above `least`; False when all are known."""
        option = self.rates.places[0][columns]
        most = np.full(len(self.problem.lanes[0].node), least, dtype=np.float32)
        np.maximum.at(most, option, earned)
        best = np.flatnonzero((earned >= most[option]) & (earned > least))
        best = best[np.argsort(-earned[best], kind="stable")][:COLUMNS_A_ROUND]
        new = [self._add(int(column)) for column in columns[best]]
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

    def taken(self) -> tuple[int, ...]:
        """Numbers of the configurations that take time."""
        spent = np.array(self._highs.getSolution().col_value)[self._first :]
        numbers = self.rates.numbers
        return tuple(
            int(numbers[column])
            for column, us in zip(self._columns, spent, strict=True)
            if us > 1e-9
        )

    def used(self) -> tuple[Array, Array, Array]:
        """By lane and option, what part of its nano-op it does."""
        spent = np.array(self._highs.getSolution().col_value)[self._first :]
        used = tuple(np.zeros(len(lane.node)) for lane in self.problem.lanes)
        for column, us in zip(self._columns, spent, strict=True):
            if us > 1e-9:
                for lane, places in enumerate(self.rates.places):
                    used[lane][places[column]] += us * float(self.rates.rates[lane][column])
        return used  # pyright: ignore[reportReturnType]


def _cheapest(options: Lane, cell: Cell) -> list[int]:
    """Of each node the options that cost least alone, in time, in joules, and in both."""
    time, joules = options.alone_us(cell.high), options.joules * cell.us_per_joule[0]
    found: set[int] = set()
    for node in np.unique(options.node[options.node != NOTHING]):
        mine = np.flatnonzero(options.node == node)
        for part in (1.0, 0.7, 0.3, 0.0):
            cost = part * time[mine] + (1 - part) * joules[mine]
            found.add(int(mine[cost.argmin()]))
    return sorted(found)
