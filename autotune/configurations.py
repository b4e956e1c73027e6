"""Which nano-ops of a cut may run at the same instant, on which shares, in which kernels, how fast.

The options and slowdowns of the configuration LP (`configuration_lp.py`) of a graph and cost model.
A kernel counts only where it can matter: of one nano-op on one share those that no other beats in
time at every clock and in joules, nor, where memory binds, in what it and its neighbours suffer.

Collectives have a lane of their own, so that they wait for another stream, and so does what follows
them; or all of them take turns with compute. So does attention on all SMs; on fewer it waits for
another stream, at least where something runs beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..runtime.op_graph import Op, OpGraph, RowMix
from ..runtime.plan import Lane as PlanLane
from .configuration_problem import (
    NOTHING,
    Array,
    Forms,
    Indices,
    Lane,
    Longer,
    Problem,
    Singles,
    Together,
)
from .copy_transport import norm_behind, summing
from .cost_model import CostModel
from .patterns import COMPUTE, MEMORY, NETWORK, lane_of
from .power_model import PowerModel
from .simulator import SYNC_US

LANES = COMPUTE, MEMORY, NETWORK


class Place(NamedTuple):
    """What the slowdown of a kernel depends on."""

    op: int
    num_sms: int
    variant: str
    """Empty where it does not matter."""


class Call(NamedTuple):
    """A nano-op on a share, in a variant."""

    place: Place
    us: float
    stretch: float
    joules: float
    sync_us: float
    """That it always has, attention only where something runs beside it."""


class Configurations:
    """Options of cuts, with times and slowdowns looked up once."""

    def __init__(
        self,
        graph: OpGraph,
        cost_model: CostModel,
        shares: Mapping[str, Sequence[int]],
        power: PowerModel | None,
        is_sm_free: bool,
        collectives: PlanLane = NETWORK,
    ) -> None:
        """`collectives`: the lane that all of them take."""
        self.graph, self.cost_model, self.shares, self.power = graph, cost_model, shares, power
        chains = [tuple(chain.ops) for chain in graph.alternatives]
        self.ops: tuple[Op, ...] = (*graph.layer, *(op for chain in chains for op in chain))
        self.own = [lane_of(op) for op in self.ops]
        self.lane = [LANES.index(collectives if own == NETWORK else own) for own in self.own]
        self.is_memory = [op.resource == "memory" for op in self.ops]
        self.index = {op.name: index for index, op in enumerate(self.ops)}
        self._forms = [
            (tuple(self.index[n] for n in one.replaces), tuple(self.index[o.name] for o in ops))
            for one, ops in zip(graph.alternatives, chains, strict=True)
        ]
        self._apart = apart_ops(graph, self.index)
        self._syncs = behind_network(graph, self.index) if collectives == NETWORK else set[int]()
        self._syncs |= {i for i, lane in enumerate(self.lane) if LANES[lane] == NETWORK}
        self._is_sm_free = is_sm_free
        self._calls: dict[tuple[int, float, float], tuple[Call, ...]] = {}
        self._slow: dict[tuple[Place, Place], float] = {}
        self._longer: dict[tuple[int, float], float] = {}

    def calls(self, index: int, rows: RowMix) -> tuple[Call, ...]:
        """Every call of an op on these rows that may be worth it; none without rows."""
        op = self.ops[index]
        key = index, op.rows(rows), op.context(rows)
        if key not in self._calls:
            self._calls[key] = tuple(self._look_up(index, rows)) if key[1] > 0 else ()
        return self._calls[key]

    def _look_up(self, index: int, rows: RowMix) -> list[Call]:
        op, lane, found = self.ops[index], self.own[index], list[Call]()
        num_sms = self.cost_model.hardware.num_sms
        for share in self.shares[lane]:
            here: list[Call] = []
            for name in self.cost_model.variants(op, share):
                us = self.cost_model.estimate(op, rows, share, name).us
                if us <= 0:  # the paper's model has ops that take no time: nothing to bound
                    return []
                stretch = joules = 0.0
                if self.power is not None:
                    load = self.power.load(op, rows, share, name, us)
                    stretch, joules = load.stretch_from, load.joules
                is_apart = lane == MEMORY and 0 < share < num_sms
                sync_us = SYNC_US if is_apart or index in self._syncs else 0.0
                place = Place(index, share, name if self.is_memory[index] else "")
                here.append(Call(place, us, stretch, joules, sync_us))
            found += [c for c in here if not any(self._beats(other, c) for other in here)]
        return found

    def alone_sync_us(self, call: Call) -> float:
        """Synchronisation that a call has even with nothing beside it."""
        return call.sync_us if call.place.op in self._syncs else 0.0

    def _beats(self, one: Call, other: Call) -> bool:
        """Whether the other call, on the same share, need not be looked at."""
        if one is other:
            return False
        mine = one.us, one.us * one.stretch, one.joules
        theirs = other.us, other.us * other.stretch, other.joules
        if not all(a <= b for a, b in zip(mine, theirs, strict=True)):
            return False
        if one.place == other.place:
            return mine != theirs
        lane = self.lane[one.place.op]
        a, b = self.rank[lane][one.place], self.rank[lane][other.place]
        return all(
            bool((self.slowdowns[lane, k][a] <= self.slowdowns[lane, k][b]).all())
            and bool((self.slowdowns[k, lane][:, a] <= self.slowdowns[k, lane][:, b]).all())
            for k in range(3)
            if k != lane
        ) and (mine != theirs or a < b)

    def least_joules(self, rows: Sequence[RowMix]) -> float:
        """Least dynamic joules of a layer at the highest clock."""
        return sum(self._least_joules(mix) for mix in rows)

    def _least_joules(self, rows: RowMix) -> float:
        least = [
            min((call.joules for call in self.calls(index, rows)), default=0.0)
            for index in range(len(self.ops))
        ]
        total = sum(least[: len(self.graph.layer)])
        for replaced, chain in self._forms:
            total -= max(0.0, sum(least[i] for i in replaced) - sum(least[i] for i in chain))
        return total

    def problem(self, rows: Sequence[RowMix]) -> Problem:
        """The LP of a cut with these nano-batches."""
        num_ops = len(self.ops)
        found: list[list[tuple[int, Call]]] = [[], [], []]
        for batch, mix in enumerate(rows):
            for index in range(num_ops):
                node = batch * num_ops + index
                found[self.lane[index]] += [(node, call) for call in self.calls(index, mix)]
        first, second, third = lanes = tuple(self._lane(options) for options in found)
        ranks = [
            np.array([*(self.rank[k][call.place] for _, call in lane), len(self.places[k])])
            for k, lane in enumerate(found)
        ]
        has_work = np.array(
            [bool(self.calls(i, mix)) for mix in rows for i in range(num_ops)], dtype=bool
        )
        forms = tuple(
            Forms(chains=tuple(tuple(batch * num_ops + i for i in chain) for chain in one))
            for batch in range(len(rows))
            for one in self._forms
        )
        return Problem(
            lanes=(first, second, third),
            together=self.together(ranks, [lane.node for lane in lanes]),
            has_work=has_work,
            forms=forms,
            longer=tuple(self._longer_norms(rows, found[2])),
        )

    def total(self, prices: Mapping[tuple[int, int], float], num_batches: int) -> float:
        """What (nano-batch, op) must earn at least; of forms the cheapest."""
        total = sum(prices.values())
        for batch in range(num_batches):
            for chains in self._forms:
                parts = [sum(prices.get((batch, i), 0.0) for i in chain) for chain in chains]
                total -= sum(parts) - min(parts)
        return total

    def _lane(self, options: Sequence[tuple[int, Call]]) -> Lane:
        def column(values: Sequence[float], nothing: float) -> Array:
            return np.array([*values, nothing], dtype=np.float64)

        hidden = [self.is_memory[call.place.op] for _, call in options]
        return Lane(
            node=np.array([*(node for node, _ in options), NOTHING], dtype=np.intp),
            us=column([call.us for _, call in options], 1.0),
            sync_us=column([call.sync_us for _, call in options], 0.0),
            alone_sync_us=column([self.alone_sync_us(call) for _, call in options], 0.0),
            stretch=column([call.stretch for _, call in options], 0.0),
            joules=column([call.joules for _, call in options], 0.0),
            is_hidden=np.array([*hidden, False], dtype=bool),
        )

    @cached_property
    def places(self) -> tuple[tuple[Place, ...], ...]:
        """All places of each lane."""
        found: list[list[Place]] = [[], [], []]
        for index, op in enumerate(self.ops):
            lane = self.lane[index]
            for share in self.shares[self.own[index]]:
                names = self.cost_model.variants(op, share)
                kept = names if self.is_memory[index] else ("",)[: len(names)]
                found[lane] += [Place(index, share, name) for name in kept]
        return tuple(tuple(lane) for lane in found)

    @cached_property
    def rank(self) -> tuple[dict[Place, int], ...]:
        """Position of each place in its lane; "nothing" is behind the last one."""
        return tuple({place: i for i, place in enumerate(lane)} for lane in self.places)

    @cached_property
    def slowdowns(self) -> dict[tuple[int, int], Array]:
        """(lane, other lane) -> slowdown of each place beside each other one, nothing last."""
        found: dict[tuple[int, int], Array] = {}
        num_sms = self.cost_model.hardware.num_sms
        for a, b in permutations(range(3), 2):
            table = np.ones((len(self.places[a]) + 1, len(self.places[b]) + 1))
            for i, one in enumerate(self.places[a]):
                for j, other in enumerate(self.places[b]):
                    if one.num_sms + other.num_sms <= num_sms:
                        table[i, j] = self._slowdown(one, other)
            found[a, b] = table
        return found

    @cached_property
    def waits(self) -> NDArray[np.bool_]:
        """[op, op]: on the same rows one always waits for the other."""
        waits = np.zeros((len(self.ops), len(self.ops)), dtype=bool)
        for i, j in self._apart:
            waits[i, j] = True
        return waits

    def together(self, ranks: Sequence[Indices], nodes: Sequence[Indices] | None) -> Together:
        """What may run together, of options at these places.

        Args:
            ranks: by lane, the place of each option, nothing last.
            nodes: by lane, the node of each option; None where they are of any nano-batch.
        """
        total = self.cost_model.hardware.num_sms
        shares = [
            np.array([*(place.num_sms for place in places), 0])[rank]
            for places, rank in zip(self.places, ranks, strict=True)
        ]
        can = {
            (a, b): shares[a][:, None] + shares[b][None, :] <= total
            for a, b in combinations(range(3), 2)
        }
        if nodes is not None:
            for a, b in can:
                can[a, b] &= self._may_meet(nodes[a], nodes[b])
        found: list[tuple[Indices, Indices, Indices]] = []
        for n, share in enumerate(shares[2]):  # few
            first, second = np.flatnonzero(can[0, 2][:, n]), np.flatnonzero(can[1, 2][:, n])
            fits = shares[0][first][:, None] + shares[1][second][None, :] + share <= total
            c, m = np.nonzero(can[0, 1][np.ix_(first, second)] & fits)
            found.append((first[c], second[m], np.full(len(c), n, dtype=np.intp)))
        c, m, n = (np.concatenate([part[k] for part in found]) for k in range(3))
        is_busy = (c < len(shares[0]) - 1) | (m < len(shares[1]) - 1) | (n < len(shares[2]) - 1)
        order = np.flatnonzero(is_busy)[np.argsort(c[is_busy], kind="stable")]
        places = c[order], m[order], n[order]
        slow: list[Singles] = []
        for lane, (a, b) in enumerate(((1, 2), (0, 2), (0, 1))):
            here = ranks[lane][places[lane]]
            beside = [self.slowdowns[lane, k][here, ranks[k][places[k]]] for k in (a, b)]
            slow.append((beside[0] * beside[1]).astype(np.float32))
        return Together(
            places=places,
            slowdowns=(slow[0], slow[1], slow[2]),
            numbers=np.arange(len(order), dtype=np.intp),
        )

    def _may_meet(self, first: Indices, second: Indices) -> NDArray[np.bool_]:
        """Nodes of different nano-batches may, and those of one that do not wait."""
        num_ops = len(self.ops)
        same = first[:, None] // num_ops == second[None, :] // num_ops
        apart = same & self.waits[first % num_ops][:, second % num_ops]
        apart[first == NOTHING, :] = False
        apart[:, second == NOTHING] = False
        return ~apart

    def _slowdown(self, a: Place, b: Place) -> float:
        if (a, b) not in self._slow:
            self._slow[a, b] = self.cost_model.slowdown(
                self.ops[a.op], a.num_sms, self.ops[b.op], b.num_sms, a.variant, b.variant
            )
        return self._slow[a, b]

    def _longer_norms(
        self, rows: Sequence[RowMix], options: Sequence[tuple[int, Call]]
    ) -> list[Longer]:
        found: list[Longer] = []
        for option, (node, call) in enumerate(options):  # of the network lane
            op = self.ops[call.place.op]
            if call.place.num_sms or op.kind != "all_reduce" or not self._is_sm_free:
                continue
            norm = norm_behind(op, self.graph)
            batch = node // len(self.ops)
            part = self._part(norm, rows[batch])
            at = batch * len(self.ops) + self.index[norm.name]
            found.append(Longer(option=option, norm=at, part=part))
        return found

    def _part(self, norm: Op, rows: RowMix) -> float:
        """Part by which a norm takes longer at least when it adds what the peers sent."""
        key = self.index[norm.name], norm.rows(rows)
        if key not in self._longer:
            longer, costs = summing(norm, self.graph.tp_degree), self.cost_model
            parts = [
                costs.estimate(longer, rows, share, name).us
                / costs.estimate(norm, rows, share, name).us
                for share in self.shares[COMPUTE]
                for name in costs.variants(norm, share)
            ]
            self._longer[key] = max(0.0, min(parts) - 1)
        return self._longer[key]


def apart_ops(graph: OpGraph, index: Mapping[str, int]) -> set[tuple[int, int]]:
    """Pairs of ops of which one always waits for the other, on the same rows, in any layer.

    Ops of two forms are apart too: rows take one of them.
    """
    graphs = [graph, *(graph.in_form(chain.form) for chain in graph.alternatives)]
    free: set[tuple[int, int]] = set()
    for one in graphs:
        place = {op.name: i for i, op in enumerate(one.layer)}
        count = len(one.layer)
        far = np.full((count, count), np.inf)
        np.fill_diagonal(far, 0.0)
        for i, op in enumerate(one.layer):
            for on in op.dependencies:
                before = place[on.op]
                far[before, i] = min(far[before, i], on.layer_distance)
        for k in range(count):
            far = np.minimum(far, far[:, k : k + 1] + far[k : k + 1, :])
        names = [index[op.name] for op in one.layer]
        free |= {
            (names[i], names[j])
            for i in range(count)
            for j in range(count)
            if far[i, j] + far[j, i] > 1
        }
    return {(i, j) for i in range(len(index)) for j in range(len(index))} - free


def behind_network(graph: OpGraph, index: Mapping[str, int]) -> set[int]:
    """Ops that wait for a collective in every form that they are of."""
    graphs = [graph, *(graph.in_form(chain.form) for chain in graph.alternatives)]
    always = dict[int, bool]()
    for one in graphs:
        network = {op.name for op in one.layer if lane_of(op) == NETWORK}
        for op in one.layer:
            is_behind = any(on.op in network for on in op.dependencies)
            always[index[op.name]] = always.get(index[op.name], True) and is_behind
    return {op for op, is_behind in always.items() if is_behind}


assert LANES.index(MEMORY) == 1
