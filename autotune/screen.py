"""Bounds of many cuts at little cost: prices of solved cuts, tried on those that were not.

Any prices give a valid bound (`configuration_lp.py`), and those of a similar cut a good one. A
record keeps, of a solved cut, each nano-op's price over what its cheapest call costs alone at the
same prices of time and joules; for another cut the ratio is read off at its rows.

That is for the lanes beside compute. What compute may earn beside them, so that no configuration
earns more than the price of time, follows: of each nano-op the least over its configurations. They
are looked at by places (op, share, and variant where neighbours feel it) instead of calls: each
place on the compute lane of one nano-batch, beside the best of each other place of any nano-batch,
of another one where the two ops wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest

import numpy as np
from numpy.typing import NDArray

from ..runtime.op_graph import RowMix
from .configuration_lp import Bound
from .configuration_problem import Array, Cell, Singles
from .configurations import Call, Configurations
from .power_model import LEAST_CLOCK

CELLS_KEPT = 24
RECORDS_TRIED = 2
FEW = 2
NEVER = -1e9
"""Worth of what has no rows: never chosen, and no infinity times 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Prices of a solved cut."""

    clock: float
    num_batches: int
    row_order: str
    time_price: float
    joule_price: float
    ratios: dict[int, tuple[Array, Array]]
    """By op: rows, and price over what the cheapest call costs there."""


@dataclass(frozen=True, slots=True)
class _Table:
    """The calls of one op on some rows."""

    place: NDArray[np.intp]
    us: Array
    sync_us: Array
    alone_sync_us: Array
    stretch: Array
    joules: Array
    rows: float

    def factor(self, clock: float, cell: Cell) -> Array:
        return _factor(self.stretch, clock, cell)

    def alone_us(self, clock: float) -> Array:
        return self.us * np.maximum(1.0, self.stretch / clock) + self.alone_sync_us


class Screen:
    """Places of all ops, how fast they run together, and the records."""

    def __init__(self, configurations: Configurations, rows: Sequence[RowMix]) -> None:
        """`rows`: everything that a nano-batch of any cut may hold."""
        self.made = configurations
        self.records: list[Record] = []
        self._wins: dict[int, int] = {}
        """How often each record proved most."""
        num_ops = len(configurations.ops)
        calls = [configurations.calls(index, mix) for mix in rows for index in range(num_ops)]
        places, rank = configurations.places, configurations.rank
        stretch = [np.full(len(lane) + 1, np.inf) for lane in places]
        for some in calls:
            for call in some:
                lane = configurations.lane[call.place.op]
                at = rank[lane][call.place]
                stretch[lane][at] = min(stretch[lane][at], call.stretch)
        self._stretch = [np.where(np.isfinite(s), s, 0.0) for s in stretch]
        self._hidden = [
            np.array([*(configurations.is_memory[p.op] for p in lane), False]) for lane in places
        ]
        self._together = configurations.together([np.arange(len(s)) for s in stretch], None)
        first, second, third = self._together.places
        self._held, self._starts = np.unique(first, return_index=True)
        """Places of compute in order, nothing last, and where their configurations begin."""
        self._beside = (
            first * len(stretch[1]) + second,
            first * len(stretch[2]) + third,
        )
        ops = [np.array([p.op for p in lane], dtype=np.intp) for lane in places]
        self._apart = [np.zeros((len(places[0]) + 1, len(lane) + 1), dtype=bool) for lane in places]
        for lane in (1, 2):
            self._apart[lane][:-1, :-1] = configurations.waits[ops[0]][:, ops[lane]]
        self._rates: dict[
            tuple[float, float, float], tuple[tuple[Singles, ...], tuple[float, ...]]
        ] = {}
        self._tables: dict[tuple[int, float], _Table] = {}

    def keep(self, rows: Sequence[RowMix], row_order: str, cell: Cell, bound: Bound) -> None:
        """Remember the prices of a solved cut."""
        num_ops = len(self.made.ops)
        found: dict[int, dict[float, float]] = {}
        for batch, mix in enumerate(rows):
            for index in range(num_ops):
                table = self._table(index, mix)
                if table is None:
                    continue
                least = self._least(table, cell, bound.time_price, bound.joule_price)
                price = float(bound.prices[batch * num_ops + index])
                found.setdefault(index, {})[table.rows] = price / least if least > 0 else 1.0
        both = bound.time_price + bound.joule_price
        self.records.append(
            Record(
                clock=cell.high,
                num_batches=len(rows),
                row_order=row_order,
                time_price=bound.time_price / both,
                joule_price=bound.joule_price / both,
                ratios={
                    index: (np.array(sorted(of)), np.array([of[r] for r in sorted(of)]))
                    for index, of in found.items()
                },
            )
        )

    def bound_us(
        self, rows: Sequence[RowMix], row_order: str, cell: Cell, enough_us: float = float("inf")
    ) -> float:
        """The best bound that the nearest records prove for a cut, and those that proved most."""

        def distance(number: int) -> tuple[float, float]:
            record = self.records[number]
            other = (record.num_batches != len(rows)) + 0.5 * (record.row_order != row_order)
            return abs(record.clock - cell.high) + 0.02 * other, -record.clock

        near = nsmallest(RECORDS_TRIED, range(len(self.records)), key=distance)
        proven = nlargest(RECORDS_TRIED, self._wins, key=lambda record: self._wins[record])
        best, winner = 0.0, None
        for record in dict.fromkeys([*proven, *near]):
            us = self._try(rows, cell, self.records[record])
            if us > best:
                best, winner = us, record
            if best >= enough_us:
                break
        if winner is not None:
            self._wins[winner] = self._wins.get(winner, 0) + 1
        return best

    def _try(self, rows: Sequence[RowMix], cell: Cell, record: Record) -> float:
        ends = ((cell.low, cell.us_per_joule[0]), (cell.high, cell.us_per_joule[1]))
        if cell.low >= cell.high:
            ends = ends[1:]
        prices, most = dict[tuple[int, int], float](), 0.0
        tables: list[tuple[int, int, _Table, float]] = []
        for batch, mix in enumerate(rows):
            for index in range(len(self.made.lane)):
                table = self._table(index, mix)
                if table is None:
                    continue
                least = self._least(table, cell, record.time_price, record.joule_price)
                known = record.ratios.get(index)
                ratio = float(np.interp(table.rows, *known)) if known else 1.0
                prices[batch, index] = ratio * least
                tables.append((batch, index, table, ratio * least))
        is_rest = cell.low <= LEAST_CLOCK  # of which joules say nothing
        joule_price = 0.0 if is_rest else record.joule_price
        time_price = 1.0 - joule_price
        for batch, index, _, _ in tables:
            if self.made.lane[index] == 0:
                prices[batch, index] = np.inf
        for clock, us_per_joule in ends:
            rates, slowest = self._rates_at(clock, cell)
            worth = [np.full((len(rows), len(s)), NEVER) for s in self._stretch]
            for lane in worth:
                lane[:, -1] = 0.0
            for batch, index, table, price in tables:
                lane = self.made.lane[index]
                if lane == 0:
                    continue
                earned = price - table.joules * (us_per_joule * joule_price)
                factor = table.factor(clock, cell)
                alone_us = table.us * factor + table.alone_sync_us
                most = max(most, float((earned / alone_us).max()))
                us = table.us * (1.0 if self.made.is_memory[index] else factor)
                us = us + table.sync_us / slowest[lane]
                np.maximum.at(worth[lane][batch], table.place, earned / us)
            beside, idle = self._beside_compute(worth, rates, time_price)
            most = max(most, idle)
            for batch, index, table, _ in tables:
                if self.made.lane[index] == 0:
                    factor = table.factor(clock, cell)
                    us = table.us * factor + table.sync_us / slowest[0]
                    least = beside[batch][table.place] * us
                    least = least + table.joules * (us_per_joule * joule_price)
                    price = max(0.0, float(least.min()))
                    prices[batch, index] = min(prices[batch, index], price)
        total = self.made.total(prices, len(rows))
        return cell.joined_us(total, max(most, time_price), joule_price)

    def _beside_compute(
        self, worth: Sequence[Array], rates: Sequence[Singles], time_price: float
    ) -> tuple[list[Array], float]:
        """What compute may earn, and the most that configurations without it earn.

        By nano-batch and compute place, the least over its configurations of what the others leave
        of the price of time, for each unit of time alone. The compute lane's nano-batch is looked
        at one by one. So is the memory lane's where there is a network lane and few nano-batches;
        of more, those two lanes may hold the same one.
        """
        count, idle = len(worth[0]), 0.0
        is_split = len(self.made.places[2]) > 0 and count <= FEW
        found: list[Array] = []
        for batch in range(count):
            left = np.full(len(self._stretch[0]), np.inf)
            for second in range(count) if is_split else (None,):
                here = range(count) if second is None else (second,)
                memory = self._of(worth[1], 1, here, batch).astype(np.float32)
                others = [n for n in range(count) if n != second]
                network = self._of(worth[2], 2, others, batch).astype(np.float32)
                earned = rates[1] * memory.ravel()[self._beside[0]]
                earned += rates[2] * network.ravel()[self._beside[1]]
                idle = max(idle, float(earned[self._starts[-1] :].max(initial=0.0)))
                share = (time_price - earned) / np.maximum(rates[0], np.float32(1e-6))
                least = np.minimum.reduceat(share, self._starts)
                left[self._held] = np.minimum(left[self._held], least)
            found.append(left)
        return found, idle

    def _of(self, worth: Array, lane: int, batches: Sequence[int], compute: int) -> Array:
        """[compute place, place]: most of these nano-batches.

        Of another one than the compute lane's, where the two ops wait for each other.
        """

        def most(held: list[int]) -> Array:
            best = worth[held].max(axis=0) if held else np.full(worth.shape[1], NEVER)
            best[-1] = 0.0
            return best

        others = most([n for n in batches if n != compute])
        return np.where(self._apart[lane], others, most(list(batches)))

    def _rates_at(self, clock: float, cell: Cell) -> tuple[tuple[Singles, ...], tuple[float, ...]]:
        """Rates over the time alone (of memory-bound ops at the highest clock) of all places.

        And, by lane, the largest slowdown there is.
        """
        key = clock, cell.low, cell.high
        if key not in self._rates:
            if len(self._rates) >= CELLS_KEPT:
                self._rates.pop(next(iter(self._rates)))
            found: list[Singles] = []
            places, slowdowns = self._together.places, self._together.slowdowns
            for lane, (place, slow) in enumerate(zip(places, slowdowns, strict=True)):
                factor = _factor(self._stretch[lane], clock, cell).astype(np.float32)
                hidden = self._hidden[lane] & (factor > 1.0)
                least = np.where(hidden, factor, np.float32(0.0))[place]
                is_busy = place < len(self._stretch[lane]) - 1
                found.append(np.where(is_busy, 1.0 / np.maximum(slow, least), np.float32(0.0)))
            least = tuple(float(rate.min(where=rate > 0, initial=1.0)) for rate in found)
            self._rates[key] = tuple(found), tuple(1 / one for one in least)
        return self._rates[key]

    def _table(self, index: int, rows: RowMix) -> _Table | None:
        key = index, self.made.ops[index].rows(rows)
        if key not in self._tables:
            calls: Sequence[Call] = self.made.calls(index, rows)
            if not calls:
                return None
            rank = self.made.rank[self.made.lane[index]]
            self._tables[key] = _Table(
                place=np.array([rank[call.place] for call in calls], dtype=np.intp),
                us=np.array([call.us for call in calls]),
                sync_us=np.array([call.sync_us for call in calls]),
                alone_sync_us=np.array([self.made.alone_sync_us(call) for call in calls]),
                stretch=np.array([call.stretch for call in calls]),
                joules=np.array([call.joules for call in calls]),
                rows=key[1],
            )
        return self._tables[key]

    def _least(self, table: _Table, cell: Cell, time_price: float, joule_price: float) -> float:
        """What the cheapest call costs alone."""
        us = table.alone_us(cell.high)
        joules = table.joules * cell.us_per_joule[0]
        return float((time_price * us + joule_price * joules).min())


def _factor(stretch: Array, clock: float, cell: Cell) -> Array:
    """How much longer at an end of a cell; at the upper one if it follows the clock in a part."""
    is_part = (stretch > cell.low) & (stretch < cell.high)
    return np.maximum(1.0, stretch / np.where(is_part, cell.high, clock))
