"""The configuration LP of two nano-batches that keeps the order of each: flows over their progress.

`configuration_lp.py` leaves out when a nano-op may start, so that the collectives of a nano-batch
hide wholly behind GEMMs of the other one. Here a state says which ops of its layer each of the
two nano-batches has done. While some ops run side by side, the states move from one corner of a
cube to the opposite one, an axis for each of them. A schedule is a way through these cubes, and
goes once around each nano-batch's layer a layer.

    minimise P                              period of an iteration
    P >= L sum_c x_c + beyond               x_c: time in configuration c at one place, L layers
    P >= L sum_c J_c x_c + joules beyond    as time that the cap asks for
    what flows into a state flows out       for every state
    one round a layer                       for each nano-batch

In the dual every state has a potential, linear within each simplex of a cube (one for each order of
its axes), which no configuration may climb faster than time and joules cost. Any potential is a
valid bound, so that columns may be generated as in `configuration_lp.py`, of which this is the same
LP with more rows: potentials that are sums of one for each nano-batch give that one's value.

Left out are shares that stay the same while an op runs, and waits of one nano-batch for the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..runtime.op_graph import OpGraph
from .configuration_lp import THREADS, Rates
from .configuration_problem import Cell, Indices, Problem
from .highs_banner import silence_banner

MAX_ROUNDS = 60
COLUMNS_A_GROUP, COLUMNS_A_ROUND = 6, 400
TOLERANCE = 2e-4
"""As in the configuration LP."""
NO_TURN = -1
ROOT = frozenset[int]()


class Step(NamedTuple):
    """An op of a nano-batch begins in one state and ends in another."""

    op: int
    before: int
    after: int
    is_last: bool
    """It ends the layer: the state after it is the first one again."""


class Move(NamedTuple):
    """An op's axis of a simplex, by states of both nano-batches."""

    lane: int
    before: int
    after: int
    turn: int
    """Nano-batch whose layer ends with it, or `NO_TURN`."""


@dataclass(frozen=True, slots=True)
class Group:
    """Configurations of the same nano-ops, and where they may be."""

    columns: Indices
    moves: NDArray[np.intp]
    """[simplex, axis, field of `Move`]."""


class Column(NamedTuple):
    """A configuration in one simplex."""

    group: int
    simplex: int
    number: int
    """Of the configuration in the problem."""
    pays: bool
    """The norm on the compute lane does not move on: it pays what it owes."""


def ring(graph: OpGraph, index: dict[str, int], has_work: Sequence[bool]) -> tuple[Step, ...]:
    """The steps of a nano-batch around its layer, in every form.

    Args:
        graph: of one rank.
        index: numbers of ops by name, those of alternatives included.
        has_work: by op; those without have no steps.
    """
    states: dict[frozenset[int], int] = {}
    steps = dict[Step, None]()
    for form in (graph, *(graph.in_form(chain.form) for chain in graph.alternatives)):
        needs: dict[int, frozenset[int]] = {}
        for op in form.layer:
            found = set[int]()
            for on in op.dependencies:
                if on.layer_distance == 0:
                    before = index[on.op]
                    found |= {before} if has_work[before] else needs[before]
            needs[index[op.name]] = frozenset(found)
        ops = [index[op.name] for op in form.layer if has_work[index[op.name]]]
        every = frozenset(ops)
        open_states, seen = [ROOT], {ROOT}
        while open_states:
            done = open_states.pop()
            for op in ops:
                if op in done or not needs[op] <= done:
                    continue
                after = done | {op}
                is_last = after == every
                numbers = [
                    states.setdefault(s, len(states)) for s in (done, ROOT if is_last else after)
                ]
                steps[Step(op, numbers[0], numbers[1], is_last)] = None
                if not is_last and after not in seen:
                    seen.add(after)
                    open_states.append(after)
    return tuple(steps)


class ProgressLp:
    """The LP of one cut of two nano-batches, in any cell of clocks."""

    def __init__(self, graph: OpGraph, index: dict[str, int], problem: Problem) -> None:
        """`problem`: of the configuration LP; its nodes are numbered nano-batch x ops + op."""
        self.problem, self._num_ops = problem, len(index)
        work = problem.has_work.reshape(-1, self._num_ops)
        rings = [ring(graph, index, list(row)) for row in work]
        self._after = [{(s.op, s.before): s for s in steps} for steps in rings]
        self.sizes = [1 + max(s.before for s in steps) for steps in rings]
        self.num_states = int(np.prod(self.sizes))
        self._node = [
            lane.node[place]
            for lane, place in zip(problem.lanes, problem.together.places, strict=True)
        ]
        self.groups = tuple(self._groups())
        norms = sorted({one.norm for one in problem.longer})
        self.debt = {norm: row for row, norm in enumerate(norms)}
        self.longer = {one.option: (self.debt[one.norm], one.part) for one in problem.longer}
        self.owing = [self._owing(group) for group in self.groups]
        """By group, the row of the norm that may pay there; -1 without."""
        self.taken: tuple[tuple[Column, float], ...] = ()
        """Those that the last LP used, and for how long, in us."""

    def _owing(self, group: Group) -> int:
        return self.debt.get(int(self._node[0][group.columns[0]]), -1)

    def _groups(self) -> Iterator[Group]:
        key = np.zeros(self.problem.together.size, dtype=np.intp)
        for node in self._node:
            key = key * (len(self.problem.has_work) + 1) + node + 1
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        for columns in np.split(order, starts[1:]):
            nodes = [int(node[columns[0]]) for node in self._node]
            running = [(lane, *divmod(n, self._num_ops)) for lane, n in enumerate(nodes) if n >= 0]
            moves = list(self._simplices(running))
            if moves:
                yield Group(columns, np.array(moves, dtype=np.intp))

    def _simplices(self, running: Sequence[tuple[int, int, int]]) -> Iterator[list[Move]]:
        """Of every cube in which these (lane, nano-batch, op) run, for every order of its axes."""
        held = [[op for _, batch, op in running if batch == b] for b in range(len(self.sizes))]
        states = [
            [s for s in range(size) if all((op, s) in after for op in ops)]
            for size, ops, after in zip(self.sizes, held, self._after, strict=True)
        ]
        for state in product(*states):
            simplices = [self._simplex(state, order) for order in permutations(running)]
            if all(simplices):
                yield from simplices

    def _simplex(self, state: Sequence[int], order: Sequence[tuple[int, int, int]]) -> list[Move]:
        """Nothing where an op may not run after another one of them."""
        here, moves = list(state), list[Move]()
        for lane, batch, op in order:
            step = self._after[batch].get((op, here[batch]))
            if step is None:
                return []
            before = self._number(here)
            here[batch] = step.after
            turn = batch if step.is_last else NO_TURN
            moves.append(Move(lane, before, self._number(here), turn))
        return moves

    def _number(self, state: Sequence[int]) -> int:
        return state[0] * self.sizes[1] + state[1]

    def bound_us(
        self,
        cell: Cell,
        without: frozenset[tuple[int, int]] = frozenset(),
        shares: Sequence[Indices] = (),
        enough_us: float = float("inf"),
    ) -> float:
        """The best bound of the LP in one cell; 0 where there is no solver.

        Args:
            cell: clocks.
            without: (node, share) that may not be taken.
            shares: of the options by lane, where some may not be taken.
            enough_us: a bound that is not improved further.
        """
        program = _Program(self, Rates(self.problem, cell), self._allowed(without, shares))
        if not program.is_available:
            return 0.0
        best = 0.0
        for _ in range(MAX_ROUNDS):
            if not program.is_solved():
                break
            us, has_more = program.price()
            best = max(best, us)
            if us >= enough_us or not has_more:
                break
        self.taken = program.taken() or self.taken
        return best

    def _allowed(
        self, without: frozenset[tuple[int, int]], shares: Sequence[Indices]
    ) -> NDArray[np.bool_]:
        allowed = np.ones(self.problem.together.size, dtype=bool)
        if without:
            for lane, place, held in zip(
                self.problem.lanes, self.problem.together.places, shares, strict=True
            ):
                pairs = zip(lane.node, held, strict=True)
                may = np.array([(int(n), int(s)) not in without for n, s in pairs])
                allowed &= may[place]
        return allowed


class _Program:
    """The LP over the columns known so far, in HiGHS.

    Rows: time, joules, states, rounds of both nano-batches, and what norms owe to collectives that
    left them a sum: a norm pays that where it could move on.
    """

    def __init__(self, lp: ProgressLp, rates: Rates, allowed: NDArray[np.bool_]) -> None:
        self.is_available = True
        try:
            import highspy
        except ImportError:
            self.is_available = False
            return
        silence_banner()
        self.lp, self.cell = lp, rates.cell
        self.rates, self.joules = np.array(rates.rates, dtype=np.float64), rates.joules
        self.allowed = np.tile(allowed, rates.num_ends)
        self.columns = [
            np.concatenate([g.columns + k * len(allowed) for k in range(rates.num_ends)])
            for g in lp.groups
        ]
        self.columns = [columns[self.allowed[columns]] for columns in self.columns]
        self.owed = np.zeros(len(self.joules))
        self.owed_row = np.zeros(len(self.joules), dtype=np.intp)
        for option, (row, part) in lp.longer.items():
            mine = rates.places[2] == option
            self.owed[mine] = part * self.rates[2, mine]
            self.owed_row[mine] = row
        self.rounds = 2 + lp.num_states
        self.debts = self.rounds + len(lp.sizes)
        self.known: dict[Column, None] = {}
        self.highs: Any = highspy.Highs()
        self.highs.setOptionValue("output_flag", False)
        self.highs.setOptionValue("threads", THREADS)
        many = highspy.kHighsInf
        for least in (self.cell.beyond_us, self.cell.beyond_cap_us):
            self.highs.addRow(least, many, 0, [], [])
        for _ in range(lp.num_states):
            self.highs.addRow(0.0, 0.0, 0, [], [])
        for _ in lp.sizes:
            self.highs.addRow(1.0, many, 0, [], [])
        for _ in lp.debt:
            self.highs.addRow(0.0, many, 0, [], [])
        self._add_column(1.0, {0: 1.0, 1: 1.0})
        for column in (*self._first(), *(column for column, _ in lp.taken)):
            self._add(column)

    def _first(self) -> Iterator[Column]:
        """Of each nano-op alone, at each place, the cheapest in time, in joules, and in both."""
        for number, group in enumerate(self.lp.groups):
            columns = self.columns[number]
            if group.moves.shape[1] != 1 or not len(columns):
                continue
            rate = self.rates[group.moves[0, 0, 0], columns]
            for part in (1.0, 0.5, 0.0):
                best = int(columns[((part + (1 - part) * self.joules[columns]) / rate).argmin()])
                for simplex in range(len(group.moves)):
                    yield Column(number, simplex, best, pays=False)
                    if self.lp.owing[number] >= 0:
                        yield Column(number, simplex, best, pays=True)

    def _add_column(self, cost: float, values: dict[int, float]) -> None:
        rows = np.array(list(values), np.int32)
        numbers = np.array(list(values.values()), np.float64)
        self.highs.addCol(cost, 0.0, 1e30, len(rows), rows, numbers)

    def _may(self, column: Column) -> bool:
        return column.number < len(self.allowed) and bool(self.allowed[column.number])

    def _add(self, column: Column) -> bool:
        """Says whether it is new."""
        if column in self.known or not self._may(column):
            return False
        self.known[column] = None
        number, layers = column.number, float(self.cell.num_layers)
        values = {0: -layers, 1: -layers * float(self.joules[number])}
        changes: list[tuple[int, float]] = []
        for lane, before, after, turn in self.lp.groups[column.group].moves[column.simplex]:
            rate = float(self.rates[lane, number])
            if column.pays and lane == 0:
                changes.append((self.debts + self.lp.owing[column.group], rate))
                continue
            changes += [(2 + int(after), rate), (2 + int(before), -rate)]
            if turn != NO_TURN:
                changes.append((self.rounds + int(turn), rate))
        if self.owed[number]:
            changes.append((self.debts + int(self.owed_row[number]), -float(self.owed[number])))
        for row, value in changes:
            values[row] = values.get(row, 0.0) + value
        self._add_column(0.0, values)
        return True

    def is_solved(self) -> bool:
        """Solve the LP over the columns known so far."""
        import highspy

        self.highs.run()
        return self.highs.getModelStatus() == highspy.HighsModelStatus.kOptimal

    def price(self) -> tuple[float, bool]:
        """The bound that the LP's prices prove, and whether columns were found that improve it."""
        duals = np.array(self.highs.getSolution().row_dual, dtype=np.float64)
        layers = self.cell.num_layers
        time_price, joule_price = max(0.0, float(duals[0])), max(0.0, float(duals[1]))
        potential = duals[2 : self.rounds] / layers
        rounds = np.maximum(duals[self.rounds : self.debts], 0.0) / layers
        debts = np.maximum(duals[self.debts :], 0.0) / layers
        turns = np.append(rounds, 0.0)  # the last one for `NO_TURN`
        most, found = time_price, list[tuple[float, Column]]()
        for number, group in enumerate(self.lp.groups):
            columns = self.columns[number]
            if not len(columns):
                continue
            lane, before, after, turn = (group.moves[:, :, k] for k in range(4))
            climbed = potential[after] - potential[before] + turns[turn]
            gain = np.zeros((len(group.moves), 3))
            np.put_along_axis(gain, lane, climbed, 1)
            owing, pays = self.lp.owing[number], np.zeros(len(gain), dtype=bool)
            if owing >= 0:
                pays = debts[owing] > gain[:, 0]
                gain[:, 0] = np.maximum(gain[:, 0], debts[owing])
            beside = joule_price * self.joules[columns]
            if len(debts):
                beside = beside + self.owed[columns] * debts[self.owed_row[columns]]
            earned = gain @ self.rates[:, columns] - beside
            at = earned.argmax(axis=1)
            best = earned[np.arange(len(at)), at]
            most = max(most, float(best.max()))
            if best.max() <= time_price + TOLERANCE / 4:
                continue
            chosen = np.argsort(-best, kind="stable")[:COLUMNS_A_GROUP]
            found += [
                (float(best[k]), Column(number, int(k), int(columns[at[k]]), pays=bool(pays[k])))
                for k in chosen
                if best[k] > time_price + TOLERANCE / 4
            ]
        us = self.cell.joined_us(float(rounds.sum()), most, joule_price)
        if most <= time_price + TOLERANCE:
            return us, False
        found.sort(key=lambda pair: -pair[0])
        new = [self._add(column) for _, column in found[:COLUMNS_A_ROUND]]
        return us, any(new)

    def taken(self) -> tuple[tuple[Column, float], ...]:
        """The columns that take time."""
        spent = self.highs.getSolution().col_value[1:]
        pairs = zip(self.known, spent, strict=True)
        return tuple((column, float(us)) for column, us in pairs if us > 1e-9)
