"""Bounds of one cut of the dense batch: what its layers take at least at a clock, and its joules.

Used by `certificate.py`, which says what they prove.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, product

import numpy as np

from ..runtime.op_graph import Op, OpGraph, RowMix
from ..search_spaces.schema import SearchSpace
from .configuration_lp import Array, Lanes, Longer, Option, Work, layer_bound, price_bound
from .configurations import LANES, apart_ops, make_lanes
from .copy_transport import norm_behind, summing
from .cost_model import CostModel
from .milp_input import Split
from .patterns import (
    COMPUTE,
    MEMORY,
    NETWORK,
    batch_mix,
    has_sm_free,
    lane_of,
    legal_shares,
    split_batches,
    total_tokens,
)
from .simulator import SYNC_US

NEVER_US = float("inf")
CLOCK_STEP, CLOCK_TRIES = 0.002, 4
"""Clocks at which a bound is tried, as parts of the highest; and how many of them."""


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


class _Calls:
    """One op on some rows: every variant on every share of its lane, as arrays [share, variant]."""

    def __init__(self, us: Array, stretch: Array, joules: float) -> None:
        self.us, self.stretch, self.least_joules = us, stretch, joules
        self._at: dict[float, Array] = {}

    def at(self, clock: float) -> Array:
        """Time alone of the fastest variant on each share; infinite where there is no work."""
        if clock not in self._at:
            us = (self.us * np.maximum(1.0, self.stretch / clock)).min(axis=1)
            self._at[clock] = np.where(us > 0, us, NEVER_US)
        return self._at[clock]


class Bounds:
    """Bounds of cuts, with times and slowdowns looked up once."""

    def __init__(
        self,
        graph: OpGraph,
        cost_model: CostModel,
        space: SearchSpace,
        mix: RowMix,
        is_powered: bool,
    ) -> None:
        self.graph, self.cost_model, self.mix = graph, cost_model, mix
        self.power = cost_model.power if is_powered else None
        is_free = has_sm_free(graph, cost_model)
        self.shares = {lane: space_shares(lane, cost_model, space, is_free) for lane in LANES}
        self.overhead_us = cost_model.iteration_overhead_us(graph, mix)
        self.overhead = cost_model.overhead_loads(graph, mix) if self.power else ()
        self._calls: dict[tuple[int, float, float], _Calls] = {}
        self._lanes: dict[int, Lanes] = {}
        self._apart = apart_ops(graph)
        self._norms = self._norms_behind() if is_free else {}
        self._known_prices: dict[tuple[int, str, int], dict[float, list[float]]] = {}
        """(op, row order, nano-batches up to 3) -> rows -> prices of cuts that were solved."""
        self._rates: dict[int, list[float]] = {}
        """By op: prices over least times alone, likewise."""

    # -- what each op takes --------------------------------------------------------------------

    def _mixes(self, split: Split) -> list[RowMix]:
        batches = split_batches(split.sizes, split.row_order, self.mix)
        return [batch_mix(batch, self.mix) for batch in batches]

    def _calls_of(self, index: int, rows: RowMix) -> _Calls:
        op = self.graph.layer[index]
        key = index, op.rows(rows), op.context(rows)
        if key not in self._calls:
            self._calls[key] = self._look_up(op, rows)
        return self._calls[key]

    def _look_up(self, op: Op, rows: RowMix) -> _Calls:
        shares = self.shares[lane_of(op)]
        if op.rows(rows) <= 0:
            return _Calls(np.full((len(shares), 1), NEVER_US), np.zeros((len(shares), 1)), 0.0)
        names = [self.cost_model.variants(op, share) for share in shares]
        us = np.full((len(shares), max(map(len, names))), NEVER_US)
        stretch, joules = np.zeros_like(us), [NEVER_US]
        for place, share in enumerate(shares):
            for number, name in enumerate(names[place]):
                us[place, number] = self.cost_model.estimate(op, rows, share, name).us
                if self.power is not None:
                    load = self.power.load(op, rows, share, name, us[place, number])
                    stretch[place, number] = load.stretch_from
                    joules.append(load.joules)
        return _Calls(us, stretch, min(joules) if self.power else 0.0)

    def _times_of(self, index: int, rows: RowMix, clock: float) -> Array:
        """Time of an op alone on each share of its lane; infinite without rows."""
        return self._calls_of(index, rows).at(clock)

    def _norms_behind(self) -> dict[int, tuple[int, Op]]:
        place = {op.name: index for index, op in enumerate(self.graph.layer)}
        return {
            index: (place[norm_behind(op, self.graph).name], norm_behind(op, self.graph))
            for index, op in enumerate(self.graph.layer)
            if lane_of(op) == NETWORK
        }

    def _longer(self, norm: Op, rows: RowMix) -> float:
        """Part by which a norm takes longer at least when it adds what the peers sent."""
        longer = summing(norm, self.graph.tp_degree)
        parts = [
            self.cost_model.best(longer, rows, share)[1].us
            / self.cost_model.best(norm, rows, share)[1].us
            for share in self.shares[COMPUTE]
        ]
        return max(0.0, min(parts) - 1)

    # -- clocks --------------------------------------------------------------------------------

    def least_joules(self, split: Split) -> float:
        """Least dynamic joules of an iteration at the highest clock; 0 without a power model."""
        layer = sum(
            self._calls_of(index, rows).least_joules
            for rows in self._mixes(split)
            for index in range(len(self.graph.layer))
        )
        return layer * self.graph.num_layers + sum(load.joules for load in self.overhead)

    def power_us(self, joules: float, clock: float) -> float:
        """Time that so many joules need under the cap at a clock."""
        if self.power is None:
            return 0.0
        return 1e6 * self.power.joules_at(joules, clock) / self.power.headroom_w

    def clock_for(self, joules: float, us: float) -> float:
        """Clock at which the joules need this time, on a grid; 1 where they never do."""
        if self.power is None or self.power_us(joules, 1.0) <= us:
            return 1.0
        clock = (us / self.power_us(joules, 1.0)) ** (1 / self.power.exponent)
        return max(CLOCK_STEP, round(clock / CLOCK_STEP) * CLOCK_STEP)

    def iteration_us(self, layer_us: float, clock: float) -> float:
        """A whole iteration of such layers."""
        beyond = sum(load.us_at(clock) for load in self.overhead) or self.overhead_us
        return layer_us * self.graph.num_layers + beyond

    # -- bounds of one cut ---------------------------------------------------------------------

    def _work(self, split: Split, clock: float) -> tuple[Lanes, Work]:
        """The LP of a cut.

        Of more than two nano-batches any nano-ops may meet, so that it need not be known which
        nano-batch one is of.
        """
        mixes, num_ops = self._mixes(split), len(self.graph.layer)
        is_any = len(mixes) > 2
        lanes = self._lanes_of(0 if is_any else len(mixes))
        times = [[self._alone(index, rows, clock) for index in range(num_ops)] for rows in mixes]
        meant = range(len(mixes)) if is_any else range(1)
        us = tuple(
            np.array([self._gather(options, times[k:]) for k in meant]) for options in lanes.options
        )
        longer: list[Longer] = []
        for place, option in enumerate(lanes.options[2]):
            if option is not None and option.num_sms == 0:
                norm, op = self._norms[option.op]
                batch = option.node // num_ops
                parts = tuple(self._longer(op, mixes[batch + k]) for k in meant)
                longer.append(Longer(option=place, norm=batch * num_ops + norm, parts=parts))
        num_nodes = num_ops * len(mixes)
        return lanes, Work(num_nodes=num_nodes, us=us, stride=num_ops, longer=tuple(longer))

    def _prices_of(self, split: Split) -> Array:
        """Prices of the nano-ops, between those of cuts that were solved; rows before any was."""
        mixes, layer = self._mixes(split), self.graph.layer
        prices = np.zeros((len(mixes), len(layer)))
        for index, op in enumerate(layer):
            rows = [op.rows(mix) for mix in mixes]
            known = self._known_prices.get((index, split.row_order, min(3, len(mixes))))
            known = known or self._known_prices.get((index, split.row_order, 2))
            if known is None:
                prices[:, index] = rows
            else:
                at = sorted(known)
                told = [0.0, *(float(np.mean(known[r])) for r in at)]
                prices[:, index] = np.interp(rows, [0.0, *at], told)
        return prices.reshape(-1)

    def coarse_us(self, split: Split, clock: float) -> float:
        """A layer's bound at prices of cuts that were solved, or by one lane's work alone."""
        lanes, work = self._work(split, clock)
        mixes, layer = self._mixes(split), self.graph.layer
        alone = np.array(
            [[self._alone(i, rows, clock).min() for i in range(len(layer))] for rows in mixes]
        )
        alone = np.where(np.isfinite(alone), alone, 0.0)
        rates = [float(np.mean(self._rates.get(i, [1.0]))) for i in range(len(layer))]
        rated: Array = alone * np.array(rates, dtype=np.float64)
        of_lane = np.array([lane_of(op) for op in layer])
        tried = [self._prices_of(split), rated.reshape(-1)]
        tried += [(alone * (of_lane == lane)).reshape(-1) for lane in LANES]
        return max(price_bound(lanes, work, prices) for prices in tried if prices.sum() > 0)

    def full_us(self, split: Split, clock: float, enough_us: float = NEVER_US) -> float:
        """A layer's bound at its own prices, which are kept for other cuts."""
        lanes, work = self._work(split, clock)
        found = layer_bound(lanes, work, self._prices_of(split), enough_us)
        priced = found.prices.reshape(len(split.sizes), len(self.graph.layer))
        for mix, prices in zip(self._mixes(split), priced, strict=True):
            for index, op in enumerate(self.graph.layer):
                key = index, split.row_order, min(3, len(split.sizes))
                known = self._known_prices.setdefault(key, {})
                known.setdefault(op.rows(mix), []).append(float(prices[index]))
                least = float(self._alone(index, mix, clock).min())
                if np.isfinite(least):
                    self._rates.setdefault(index, []).append(float(prices[index]) / least)
        return found.us

    def single_us(self, split: Split, clock: float) -> float:
        """A layer's bound of one nano-batch: nearly all ops wait for each other.

        Two that do not (decode and prefill attention) keep their shares, and run beside each other
        for as long as that gains; of a pair, that is exact.
        """
        rows, layer = self._mixes(split)[0], self.graph.layer
        num_ops = len(layer)
        pairs = [(i, j) for i, j in combinations(range(num_ops), 2) if (i, j) not in self._apart]
        if len(pairs) > 1:
            return self.full_us(split, clock)
        least = np.array([self._alone(i, rows, clock).min() for i in range(num_ops)])
        least[~np.isfinite(least)] = 0.0
        total = float(least.sum())
        for index, (norm, op) in self._norms.items():
            times = self._alone(index, rows, clock)
            added = self._longer(op, rows) * float(least[norm])
            free = np.array(self.shares[NETWORK]) == 0
            total += float((times + added * free).min()) - float(least[index])
        gain = max((self._gain(i, j, rows, clock) for i, j in pairs), default=0.0)
        return total - gain

    def _gain(self, i: int, j: int, rows: RowMix, clock: float) -> float:
        """How much shorter two ops are beside each other than one after the other at best."""
        layer, cost_model = self.graph.layer, self.cost_model
        first, second = self._alone(i, rows, clock), self._alone(j, rows, clock)
        alone = float(first.min() + second.min())
        best = 0.0
        if not np.isfinite(alone):
            return best
        if lane_of(layer[i]) == MEMORY:  # beside others it has a stream of its own
            first = first + SYNC_US * self._is_part(MEMORY)
        for (a, us_a), (b, us_b) in product(
            zip(self.shares[lane_of(layer[i])], first, strict=True),
            zip(self.shares[lane_of(layer[j])], second, strict=True),
        ):
            if a + b <= cost_model.hardware.num_sms:
                slow_a = cost_model.slowdown(layer[i], a, layer[j], b)
                slow_b = cost_model.slowdown(layer[j], b, layer[i], a)
                beside = min(us_a * slow_a, us_b * slow_b)
                saved = beside * max(0.0, 1 / slow_a + 1 / slow_b - 1)
                best = max(best, alone - float(us_a + us_b - saved))
        return best

    def cut_us(self, split: Split, is_full: bool, enough_us: float = NEVER_US) -> float:
        """An iteration's bound for one cut.

        At some clock x, the lesser of what layers take at x and what the least joules at x need.
        Plans at lower clocks take longer than the first, those at higher ones need more than the
        second, so that any x will do; a few are tried.

        Args:
            split: the cut.
            is_full: look at every nano-op by itself.
            enough_us: a bound of so much is not improved further.
        """
        joules, best, clock, tried = self.least_joules(split), 0.0, 1.0, set[float]()
        while clock not in tried and len(tried) < CLOCK_TRIES:
            tried.add(clock)
            layer = self._layer_us(split, clock, is_full)
            us, cap_us = self.iteration_us(layer, clock), self.power_us(joules, clock)
            best = max(best, us if clock == 1.0 else min(us, cap_us))
            if best >= enough_us or cap_us <= us:
                break
            clock = self.clock_for(joules, us if len(tried) == 1 else (us + cap_us) / 2)
        return best

    def binds(self, split: Split) -> str:
        """What the bound of a cut is made of, in words."""
        lanes, work = self._work(split, 1.0)
        found = layer_bound(lanes, work, self._prices_of(split), NEVER_US)
        priced = found.prices.reshape(len(split.sizes), -1).sum(axis=0)
        parts = [
            (float(priced[[lane_of(op) == lane for op in self.graph.layer]].sum()), lane)
            for lane in LANES
        ]
        total = sum(part for part, _ in parts)
        text = ", ".join(f"{lane} {100 * part / total:.0f} %" for part, lane in parts if part)
        return f"{text} of its price, cut {'+'.join(map(str, split.sizes))}"

    def _layer_us(self, split: Split, clock: float, is_full: bool) -> float:
        if len(split.sizes) == 1:
            return self.single_us(split, clock)
        return self.full_us(split, clock) if is_full else self.coarse_us(split, clock)

    def _alone(self, index: int, rows: RowMix, clock: float) -> Array:
        """Time on each share, with the start that waits for another stream where it always does.

        Collectives on a part of the SMs have a stream of their own, and wait for others.
        """
        times = self._times_of(index, rows, clock)
        if lane_of(self.graph.layer[index]) != NETWORK:
            return times
        return times + SYNC_US * self._is_part(NETWORK)

    def _is_part(self, lane: str) -> Array:
        """1 for shares of a lane that are a part of the SMs, 0 for all and for none."""
        shares = np.array(self.shares[lane])
        return ((shares > 0) & (shares < self.cost_model.hardware.num_sms)).astype(np.float64)

    def _gather(self, options: Sequence[Option | None], times: Sequence[Sequence[Array]]) -> Array:
        num_ops = len(self.graph.layer)
        place = {lane: {s: i for i, s in enumerate(shares)} for lane, shares in self.shares.items()}
        lanes = [place[lane_of(op)] for op in self.graph.layer]
        return np.array(
            [
                NEVER_US
                if option is None
                else times[option.node // num_ops][option.op][lanes[option.op][option.num_sms]]
                for option in options
            ]
        )

    def _lanes_of(self, num_batches: int) -> Lanes:
        """Options and rates; for 0 nano-batches ops as a whole, which may all meet."""
        if num_batches not in self._lanes:
            self._lanes[num_batches] = make_lanes(
                self.graph, self.cost_model, self.shares, num_batches
            )
        return self._lanes[num_batches]
