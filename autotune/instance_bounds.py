"""What the numbers of a structure MILP say before it is solved: distances, limits of its period."""

from __future__ import annotations

from collections.abc import Iterable

from .milp_input import Instance


def path_distances(instance: Instance) -> list[list[float]]:
    """Least layer distance of any path of dependencies between two nodes."""
    nodes = range(len(instance.lanes))
    distance = [[0.0 if i == j else float("inf") for j in nodes] for i in nodes]
    for edge in instance.edges:
        known = distance[edge.before][edge.after]
        distance[edge.before][edge.after] = min(known, edge.layer_distance)
    for k in nodes:
        for i in nodes:
            for j in nodes:
                distance[i][j] = min(distance[i][j], distance[i][k] + distance[k][j])
    return distance


def sequential_us(instance: Instance, split: int) -> float:
    """All nodes one after the other in form 0, each on its fastest share."""
    return sum(
        min(instance.duration_us[i, split, a] for a in shares)
        for i, shares in enumerate(instance.shares)
    )


def _least_sum(instance: Instance, split: int, nodes: Iterable[int], by_area: bool) -> float:
    """Least time, or SM-time over all SMs, of some nodes; each nano-batch in its better form."""
    batch_of = {i: b for b, held in enumerate(instance.nodes_of_forms) for i in held}
    sums, total = [[0.0, 0.0] for _ in instance.nodes_of_forms], 0.0
    for i in nodes:
        leasts: list[float] = []
        for times in (instance.duration_us, instance.form_us):
            costs = (
                times[i, split, a] * (a / instance.num_sms if by_area else 1.0)
                for a in instance.shares[i]
                if (i, split, a) in times
            )
            leasts.append(min(costs, default=float("inf")))
        if i not in batch_of:
            total += leasts[0]
        else:
            sums[batch_of[i]] = [a + b for a, b in zip(sums[batch_of[i]], leasts, strict=True)]
    return total + sum(map(min, sums))


def least_us(instance: Instance, split: int) -> float:
    """A period that no choice of this split can beat."""
    nodes = range(len(instance.lanes))
    lanes = [[i for i in nodes if instance.lanes[i] == lane] for lane in set(instance.lanes)]
    return max(
        _least_sum(instance, split, nodes, by_area=True),
        instance.floor_us[split],
        *(_least_sum(instance, split, lane, by_area=False) for lane in lanes),
    )
