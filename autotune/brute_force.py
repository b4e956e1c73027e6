"""The shortest period of a small instance by looking at everything: the oracle of the MILP.

Tried are all splits, all shares of all nodes, all issue orders of one period, all stages, and all
ways to keep apart what does not fit on the GPU together. Each choice leaves a system of waits

    start_j + height T >= start_i + time_i

whose least period T is the largest ratio (times / heights) of a cycle. No solver is involved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from random import Random

from .milp_input import Edge, Instance

MAX_STAGE = 2
PRECISION = 1e-7
"""Relative, of a period."""


@dataclass(frozen=True, slots=True)
class Wait:
    """`after` starts no earlier than `height` periods before the end of `before`."""

    before: int
    after: int
    height: int


def shortest_period_us(instance: Instance) -> float:
    """Least period over everything, in us; infinite when nothing is legal."""
    best = float("inf")
    structures = list(_structures(instance))
    for split in range(instance.num_splits):
        for shares in product(*instance.shares):
            times = _times(instance, split, shares)
            floor_us = max(instance.floor_us[split], _busiest_lane_us(instance, times))
            if floor_us >= best:
                continue
            for apart in _separations(instance, shares):
                for order, stages in structures:
                    waits = _waits(instance, order, stages, apart)
                    if is_feasible(waits, times, best * (1 - PRECISION)):
                        best = max(floor_us, least_period_us(waits, times, best))
                if floor_us >= best:
                    break
    return best


def _times(instance: Instance, split: int, shares: Sequence[int]) -> list[float]:
    times = [instance.duration_us[i, split, share] for i, share in enumerate(shares)]
    for (i, j, g), us in instance.sum_us.items():
        if g == split and shares[j] == 0:
            times[i] += us
    return times


def _busiest_lane_us(instance: Instance, times: Sequence[float]) -> float:
    lanes: dict[str, float] = {}
    for lane, us in zip(instance.lanes, times, strict=True):
        lanes[lane] = lanes.get(lane, 0.0) + us
    return max(lanes.values())


def _structures(instance: Instance) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(position of each node in the issue order, stage of each node), as far as edges allow."""
    count = len(instance.lanes)
    for rest in permutations(range(1, count)):
        position = [0] * count
        for place, node in enumerate(rest, 1):
            position[node] = place
        for stages in product(range(MAX_STAGE + 1), repeat=count):
            if min(stages) == 0 and all(
                (height := edge.layer_distance + stages[edge.after] - stages[edge.before]) > 0
                or (height == 0 and position[edge.before] < position[edge.after])
                for edge in instance.edges
            ):
                yield tuple(position), stages


def _separations(instance: Instance, shares: Sequence[int]) -> Iterator[set[tuple[int, int]]]:
    """Ways to keep apart pairs: of one lane, too large together, or one of a triple too large."""
    nodes, lanes, total = range(len(shares)), instance.lanes, instance.num_sms
    must = {
        (i, j)
        for i, j in combinations(nodes, 2)
        if lanes[i] == lanes[j] or shares[i] + shares[j] > total
    }
    triples = [
        pairs
        for i, j, k in combinations(nodes, 3)
        for pairs in [((i, j), (i, k), (j, k))]
        if shares[i] + shares[j] + shares[k] > total and not must.intersection(pairs)
    ]
    for chosen in product(*triples):
        yield must.union(chosen)


def _waits(
    instance: Instance, position: Sequence[int], stages: Sequence[int], apart: set[tuple[int, int]]
) -> list[Wait]:
    waits = [
        Wait(e.before, e.after, e.layer_distance + stages[e.after] - stages[e.before])
        for e in instance.edges
    ]
    for i, j in apart:
        first, second = (i, j) if position[i] < position[j] else (j, i)
        waits += [Wait(first, second, 0), Wait(second, first, 1)]
    return waits


def is_feasible(waits: Sequence[Wait], times: Sequence[float], period_us: float) -> bool:
    """Whether a period of this length keeps all waits: no cycle is longer (Bellman-Ford)."""
    if period_us == float("inf"):
        return True
    start = [0.0] * len(times)
    for _ in range(len(times) + 1):
        moved = False
        for wait in waits:
            earliest = start[wait.before] + times[wait.before] - wait.height * period_us
            if earliest > start[wait.after] + 1e-9:
                start[wait.after] = earliest
                moved = True
        if not moved:
            return True
    return False


def least_period_us(
    waits: Sequence[Wait], times: Sequence[float], known_us: float = float("inf")
) -> float:
    """The least feasible period, by halving; of some that are known to be feasible, if any."""
    low, high = 0.0, min(known_us, sum(times) + 1e-9)
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_feasible(waits, times, middle) else (middle, high)
    return high


LAYERS: tuple[tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]], ...] = (
    (("compute", "memory"), ((0, 1, 0), (1, 0, 1))),
    (("compute", "network"), ((0, 1, 0), (1, 0, 1))),
    (("compute", "memory", "compute"), ((0, 1, 0), (1, 2, 0), (2, 0, 1))),
    (
        ("compute", "memory", "compute", "compute"),
        ((0, 1, 0), (0, 2, 0), (1, 3, 0), (2, 3, 0), (3, 0, 1)),
    ),
    (
        ("compute", "memory", "network", "compute"),
        ((0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 0, 1), (2, 0, 1), (3, 0, 1)),
    ),
    (("compute", "memory", "network"), ((0, 1, 0), (0, 2, 0), (1, 0, 1), (2, 0, 1))),
)
"""Lanes of a layer's macro ops, and (before, after, layer distance) of each wait."""
NUM_SMS = 132
SIDE_SHARES, COMPUTE_SHARES = (16, 32, 64), (68, 100, 116)


def random_instance(seed: int) -> Instance:
    """A layer of two macro ops on two nano-batches, or of more on one; up to two splits."""
    rng = Random(seed)
    lanes, waits = rng.choice(LAYERS)
    count = len(lanes)
    num_batches = 2 if count == 2 else 1
    num_splits = rng.choice((1, 2))
    nodes = range(count * num_batches)
    offered = [
        tuple(sorted({NUM_SMS, rng.choice(COMPUTE_SHARES if lane == "compute" else SIDE_SHARES)}))
        if count == 2 or rng.random() < 0.5
        else (rng.choice(COMPUTE_SHARES if lane == "compute" else SIDE_SHARES),)
        for lane in lanes
    ]
    duration_us: dict[tuple[int, int, int], float] = {}
    for node, split in product(nodes, range(num_splits)):
        us = rng.uniform(1.0, 20.0)
        is_empty = split == 1 and node >= count and rng.random() < 0.3
        for share in offered[node % count]:
            slower = 1 + rng.random() * (NUM_SMS / share - 1)
            duration_us[node, split, share] = 0.0 if is_empty else us * slower
    edges = [
        Edge(before=first + before, after=first + after, layer_distance=distance)
        for first in range(0, count * num_batches, count)
        for before, after, distance in waits
    ]
    return Instance(
        num_sms=NUM_SMS,
        lanes=lanes * num_batches,
        shares=tuple(offered) * num_batches,
        edges=tuple(edges),
        num_splits=num_splits,
        duration_us=duration_us,
        floor_us=(0.0,) * num_splits,
    )
