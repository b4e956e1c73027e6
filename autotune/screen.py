"""Bounds of many cuts at little cost: prices of solved cuts, tried on those that were not.

Any prices give a valid bound (`configuration_lp.py`), and those of a similar cut a good one. A
record keeps, of a solved cut, each nano-op's price over what its cheapest call costs alone at the
same prices of time and joules; for another cut the ratio is read off at its rows.

The most that a configuration earns is found over places (op, share, and variant where neighbours
feel it) instead of over calls: the best call of each place on the compute lane of one nano-batch,
beside the best of each other place of any nano-batch, of another one where the two ops wait for
each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest

import numpy as np
from numpy.typing import NDArray

from ..runtime.op_graph import RowMix
from .configuration_lp import Array, Bound, Cell
from .configurations import Call, Configurations

Singles = NDArray[np.float32]
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
    alone_us: Array
    stretch: Array
    joules: Array
    rows: float


class Screen:
    """Places of all ops, how fast they run together, and the records."""

    def __init__(self, configurations: Configurations, rows: Sequence[RowMix]) -> None:
        """`rows`: everything that a nano-batch of any cut may hold."""
        self.made = configurations
        self.records: list[Record] = []
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
        ops = [np.array([p.op for p in lane], dtype=np.intp) for lane in places]
        self._apart = [np.zeros((len(places[0]) + 1, len(lane) + 1), dtype=bool) for lane in places]
        for lane in (1, 2):
            self._apart[lane][:-1, :-1] = configurations.waits[ops[0]][:, ops[lane]]
        self._rates: dict[float, tuple[Singles, Singles, Singles]] = {}
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
        """The best bound that the nearest records prove for a cut."""

        def distance(record: Record) -> tuple[float, float]:
            other = (record.num_batches != len(rows)) + 0.5 * (record.row_order != row_order)
            return abs(record.clock - cell.high) + 0.02 * other, -record.clock

        best = 0.0
        for record in nsmallest(RECORDS_TRIED, self.records, key=distance):
            best = max(best, self._try(rows, cell, record))
            if best >= enough_us:
                break
        return best

    def _try(self, rows: Sequence[RowMix], cell: Cell, record: Record) -> float:
        worth = [np.full((len(rows), len(s)), NEVER) for s in self._stretch]
        for lane in worth:
            lane[:, -1] = 0.0
        prices, most = dict[tuple[int, int], float](), 0.0
        for batch, mix in enumerate(rows):
            for index, lane in enumerate(self.made.lane):
                table = self._table(index, mix)
                if table is None:
                    continue
                least = self._least(table, cell, record.time_price, record.joule_price)
                known = record.ratios.get(index)
                ratio = float(np.interp(table.rows, *known)) if known else 1.0
                price = prices[batch, index] = ratio * least
                joules = table.joules * (cell.us_per_joule * record.joule_price)
                factor = 1.0
                if not self.made.is_memory[index]:
                    factor = np.maximum(1.0, table.stretch / cell.high)
                alone_us = table.alone_us * np.maximum(1.0, table.stretch / cell.high)
                most = max(most, float(((price - joules) / alone_us).max()))
                np.maximum.at(
                    worth[lane][batch], table.place, (price - joules) / (table.us * factor)
                )
        total = self.made.total(prices, len(rows))
        most = max(most, self._most(worth, cell.high))
        return cell.joined_us(total, most, record.joule_price)

    def _most(self, worth: Sequence[Array], clock: float) -> float:
        """What configurations earn at most.

        The compute lane's nano-batch is looked at one by one. So is the memory lane's where there
        is a network lane and few nano-batches; of more, those two lanes may hold the same one.
        """
        count, most = len(worth[0]), 1e-12
        rates = self._rates_at(clock)
        is_split = len(self.made.places[2]) > 0 and count <= FEW
        for batch in range(count):
            first = rates[0] * worth[0][batch][:, None, None].astype(np.float32)
            for second in range(count) if is_split else (None,):
                here = range(count) if second is None else (second,)
                memory = self._of(worth[1], 1, here, batch)
                others = [n for n in range(count) if n != second]
                network = self._of(worth[2], 2, others, batch)
                earned = first + rates[1] * memory[:, :, None].astype(np.float32)
                earned += rates[2] * network[:, None, :].astype(np.float32)
                most = max(most, float(earned.max()))
        return most

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

    def _rates_at(self, clock: float) -> tuple[Singles, Singles, Singles]:
        """Rates over the time alone (of memory-bound ops at the highest clock) of all places."""
        if clock not in self._rates:
            if len(self._rates) >= CELLS_KEPT:
                self._rates.pop(next(iter(self._rates)))
            found: list[Singles] = []
            for lane, slow in enumerate(self._together.slowdowns):
                view = [1, 1, 1]
                view[lane] = len(self._stretch[lane])
                factor = np.maximum(1.0, self._stretch[lane] / clock)
                hidden = self._hidden[lane] & (factor > 1.0)
                longer = np.where(
                    hidden.reshape(view), np.maximum(factor.reshape(view), slow), slow
                )
                rate = self._together.can / longer
                index: list[slice | int] = [slice(None)] * 3
                index[lane] = rate.shape[lane] - 1
                rate[tuple(index)] = 0.0
                found.append(rate.astype(np.float32))
            self._rates[clock] = found[0], found[1], found[2]
        return self._rates[clock]

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
                alone_us=np.array([call.us - call.sync_us for call in calls]),
                stretch=np.array([call.stretch for call in calls]),
                joules=np.array([call.joules for call in calls]),
                rows=key[1],
            )
        return self._tables[key]

    def _least(self, table: _Table, cell: Cell, time_price: float, joule_price: float) -> float:
        """What the cheapest call costs alone."""
        us = table.alone_us * np.maximum(1.0, table.stretch / cell.high)
        return float((time_price * us + joule_price * cell.us_per_joule * table.joules).min())
