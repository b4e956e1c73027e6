"""The price of one period of a schedule in its steady state, fast: what a local search asks.

A node is a macro op of a nano-batch. A `Period` says what a schedule leaves open: cut, forms, the
order of the nodes, a share for each. Each nano-batch goes around the layer once a period, so that
its nodes stand in the order as a rotation of the layer, and where they wrap around they belong to
another layer: stages follow from the order.

Rules are those of the simulator: waits of data, turns within each lane, turns of nodes that do not
fit on the GPU together, the start that waits for another stream, rates beside what runs. Attention
and collectives take turns, as partitions of all three lanes seldom find places; how the pattern
fills and drains is left out. Found periods are written down and simulated whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..runtime.op_graph import Op, OpGraph, OutputForm, RowMix
from ..runtime.plan import Schedule
from .cost_model import CostModel
from .milp_input import Split
from .patterns import (
    COMPUTE,
    MEMORY,
    NETWORK,
    Placed,
    batch_mix,
    build_schedule,
    macro_ops,
    split_batches,
)
from .power_model import Price
from .simulator import SYNC_US

LANES = COMPUTE, MEMORY, NETWORK
PERIODS = 7
"""Simulated to find the pace: that of the last two."""
NO_WORK_US = 1e-7
Wait = tuple[int, int, int]
"""(before, after, periods between)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """What a schedule leaves open beside kernels."""

    split: Split
    forms: tuple[OutputForm, ...]
    """By nano-batch."""
    order: tuple[int, ...]
    """Nodes: nano-batch x macro ops + macro op."""
    shares: tuple[int, ...]
    """By node."""


class Layer(NamedTuple):
    """A layer in the steady state."""

    us: tuple[float, ...]
    """At each clock."""
    joules: float
    """Dynamic, at the highest clock; 0 without a power model."""


class Call(NamedTuple):
    """One op of a node on a share."""

    op: Op
    variant: str
    us: tuple[float, ...]
    """Alone, at each clock."""
    hidden: tuple[float, ...]
    """Slowdown that costs nothing, as the clock has cost it already; 1 for most."""
    joules: float


class SteadyCut:
    """Prices of the periods of one cut, at some clocks."""

    def __init__(
        self,
        graph: OpGraph,
        cost_model: CostModel,
        mix: RowMix,
        split: Split,
        clocks: Sequence[float],
        price: Price,
    ) -> None:
        """`price` of a joule, by which kernels are chosen."""
        self.graph, self.cost_model, self.mix, self.split = graph, cost_model, mix, split
        self.clocks, self.price = tuple(clocks), price
        self.macros = macro_ops(graph)
        self.batches = split_batches(split.sizes, split.row_order, mix)
        self.num_nodes = len(self.macros) * len(self.batches)
        self.num_sms = cost_model.hardware.num_sms
        self.lane = [LANES.index(m.lane) for m in self.macros] * len(self.batches)
        self.waits = list(self._data_waits())
        self._rows = [batch_mix(batch, mix) for batch in self.batches]
        self._calls: dict[tuple[int, int, OutputForm], tuple[Call, ...]] = {}

    def _data_waits(self) -> Iterator[Wait]:
        """(before, after, layer distance) of nodes."""
        count = len(self.macros)
        for batch in range(len(self.batches)):
            for index, macro in enumerate(self.macros):
                for need in macro.needs:
                    for other in range(0 if need.reach == "prefix" else batch, batch + 1):
                        before = other * count + need.macro
                        yield before, batch * count + index, need.layer_distance

    def stages(self, order: Sequence[int]) -> list[int] | None:
        """Stage of each node, or None where a nano-batch wraps around more than once."""
        count, place = len(self.macros), [0] * self.num_nodes
        for position, node in enumerate(order):
            place[node] = position
        stages = [0] * self.num_nodes
        for batch in range(len(self.batches)):
            mine = [w for w in self.waits if w[1] // count == batch]
            for before, node, distance in mine:  # in sequential order of the later node
                if distance == 0 and before // count == batch:
                    late = stages[before] + (place[before] > place[node])
                    stages[node] = max(stages[node], late)
            ahead = 0
            for before, node, distance in mine:
                late = stages[before] - distance + (place[before] > place[node]) - stages[node]
                if before // count < batch:
                    ahead = max(ahead, late)
                elif distance and late > 0:
                    return None
            for node in range(batch * count, (batch + 1) * count):
                stages[node] += ahead
        least = min(stages)
        return [stage - least for stage in stages]

    def schedule(self, period: Period, name: str, price: Price | None = None) -> Schedule:
        """The period written down, with kernels of its price of a joule or of another one.

        Raises:
            IllegalScheduleError: its shares find no places.
        """
        stages, count = self.stages(period.order), len(self.macros)
        assert stages is not None
        placed = [
            Placed(
                macro=node % count,
                batch=node // count,
                stage=stages[node],
                num_sms=period.shares[node],
            )
            for node in period.order
        ]
        return build_schedule(
            name,
            self.cost_model,
            self.graph,
            self.mix,
            self.batches,
            placed,
            price=price or self.price,
            forms=period.forms,
        )

    def layer(self, period: Period) -> Layer | None:
        """What a layer costs; None where the order is illegal, or an op cannot go without SMs."""
        stages = self.stages(period.order)
        if stages is None:
            return None
        calls = {node: self.calls(node, period) for node in period.order}
        if any(found is None for found in calls.values()):
            return None
        found = {node: some for node, some in calls.items() if some}
        pattern = _Pattern(self, period, stages, found)
        joules = sum(call.joules for some in found.values() for call in some)
        paces = tuple(pattern.pace_us(number) for number in range(len(self.clocks)))
        return Layer(paces, joules)

    def calls(self, node: int, period: Period) -> tuple[Call, ...] | None:
        """The ops of a node; None where one has no variant on its share."""
        batch = node // len(self.macros)
        key = node, period.shares[node], period.forms[batch]
        if key not in self._calls:
            macro = self.macros[node % len(self.macros)]
            ops = macro.ops_of(period.forms[batch])
            if not all(self.cost_model.variants(op, key[1]) for op in ops):
                return None
            self._calls[key] = tuple(self._call(op, batch, key[1]) for op in ops)
        return self._calls[key]

    def _call(self, op: Op, batch: int, share: int) -> Call:
        rows, power = self._rows[batch], self.cost_model.power
        variant, _, _ = self.cost_model.cheapest(op, rows, (share,), self.price)
        us = self.cost_model.estimate(op, rows, share, variant).us
        if power is None:
            return Call(op, variant, (us,) * len(self.clocks), (1.0,) * len(self.clocks), 0.0)
        load = power.load(op, rows, share, variant, us)
        at = tuple(load.us_at(clock) if clock < 1.0 else us for clock in self.clocks)
        is_memory = us > 0 and op.resource == "memory"
        hidden = tuple(one / us if is_memory else 1.0 for one in at)
        return Call(op, variant, at, hidden, load.joules)


class _Pattern:
    """The waits of one period."""

    def __init__(
        self,
        cut: SteadyCut,
        period: Period,
        stages: Sequence[int],
        found: dict[int, tuple[Call, ...]],
    ) -> None:
        self._slowdown, num_sms = cut.cost_model.slowdown, cut.num_sms
        self.calls: list[Call] = []
        self.share: list[int] = []
        self.lane: list[int] = []
        head, tail = dict[int, int](), dict[int, int]()
        waits: set[Wait] = set()
        for node in period.order:
            if node not in found:
                continue
            calls, share = found[node], period.shares[node]
            is_whole = cut.lane[node] == 1 and share == num_sms  # then on the compute lane
            head[node], tail[node] = len(self.calls), len(self.calls) + len(calls) - 1
            self.calls += calls
            self.share += [share] * len(calls)
            self.lane += [0 if is_whole else cut.lane[node]] * len(calls)
            waits |= {(f, f + 1, 0) for f in range(head[node], tail[node])}
        for before, after, distance in cut.waits:
            if before in found and after in found:
                gap = distance + stages[after] - stages[before]
                waits.add((tail[before], head[after], gap))
        waits.update(self._turns(num_sms))
        count = len(self.calls)
        self.followers: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        self.is_late = [False] * count
        stream = [(a, s % num_sms) for a, s in zip(self.lane, self.share, strict=True)]
        self.waits = waits
        for before, after, periods in waits:
            self.followers[before].append((after, periods))
            self.is_late[after] |= stream[before] != stream[after]
        self._factors: dict[tuple[int, ...], tuple[float, ...]] = {}

    def _turns(self, num_sms: int) -> Iterator[Wait]:
        """Each call waits for the last one of its lane, and of others for what it cannot meet."""
        count, share, lane = len(self.calls), self.share, self.lane

        def clash(one: int, other: int) -> bool:
            are_sides = lane[one] > 0 and lane[other] > 0  # attention and collectives
            is_tight = are_sides or share[one] + share[other] > num_sms
            return is_tight and share[one] > 0 and share[other] > 0

        for here in range(count):
            before = here
            for back in range(1, count + 1):
                before = (here - back) % count
                if lane[before] == lane[here]:
                    yield before, here, int(before >= here)
                    break
            for other in {0, 1, 2} - {lane[here]}:
                for back in range(1, count):
                    there = (here - back) % count
                    if lane[there] != other or not clash(here, there):
                        continue
                    since = (here - before) % count or count
                    if not (since < back and clash(before, there)):  # else that one has waited
                        yield there, here, int(there >= here)
                    break

    def pace_us(self, number: int) -> float:
        """Time from one period to the next at a clock, of the last two."""
        count = len(self.calls)
        work = [
            call.us[number] + SYNC_US if late and call.us[number] else call.us[number]
            for call, late in zip(self.calls, self.is_late, strict=True)
        ]
        missing = [0] * (count * PERIODS)
        for _, after, periods in self.waits:
            for period in range(periods, PERIODS):
                missing[after + count * period] += 1
        ready = [here for here, waits in enumerate(missing) if not waits]
        running: dict[int, float] = {}
        now, begun = 0.0, [0.0] * PERIODS
        self._factors = {}
        while ready or running:
            while ready:
                here = ready.pop()
                period, call = divmod(here, count)
                if call == 0:
                    begun[period] = now
                if work[call] > 0:
                    running[here] = work[call]
                else:
                    self._end(here, missing, ready)
            if not running:
                break
            names = tuple(running)
            factors = self._slowdowns(tuple([name % count for name in names]), number)
            step = min([running[n] * k for n, k in zip(names, factors, strict=True)])
            now += step
            for name, factor in zip(names, factors, strict=True):
                running[name] -= step / factor
                if running[name] <= NO_WORK_US:
                    del running[name]
                    self._end(name, missing, ready)
        return (begun[-1] - begun[-3]) / 2

    def _end(self, here: int, missing: list[int], ready: list[int]) -> None:
        period, call = divmod(here, len(self.calls))
        for follower, periods in self.followers[call]:
            if period + periods < PERIODS:
                there = follower + len(self.calls) * (period + periods)
                missing[there] -= 1
                if not missing[there]:
                    ready.append(there)

    def _slowdowns(self, calls: tuple[int, ...], number: int) -> tuple[float, ...]:
        """Of each of some that run at once."""
        if calls not in self._factors:
            found: list[float] = []
            for here in calls:
                product, hidden = 1.0, self.calls[here].hidden[number]
                for there in calls:
                    if there != here:
                        product *= self._slowdown(
                            self.calls[here].op,
                            self.share[here],
                            self.calls[there].op,
                            self.share[there],
                            self.calls[here].variant,
                            self.calls[there].variant,
                        )
                found.append(max(1.0, product / hidden) if hidden > 1.0 else product)
            self._factors[calls] = tuple(found)
        return self._factors[calls]
