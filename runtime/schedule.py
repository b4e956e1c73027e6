"""From one period of a schedule to the nano-ops of a whole iteration.

`unroll` gives every instance (nano-op, layer) with the instances it waits for: data dependencies
(parents' token ranges intersect, and the prefix rule for straddling prefills), the order within its
lane, and the plan's own `after` edges. Executor, simulator and verifier all run this one list.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .op_graph import Dependency, OpGraph, OutputForm, RowMix
from .plan import NanoOp, Schedule


class IllegalScheduleError(ValueError):
    """A schedule breaks a rule; the message names the nano-ops and the rule."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One nano-op of one layer, at its place in issue order."""

    index: int
    """Position of the nano-op in `Schedule.nano_ops`."""
    layer: int
    waits_for: tuple[int, ...]
    """Positions, in the unrolled list, of the instances that must finish first."""


def row_mix(
    schedule: Schedule, tokens: tuple[int, int], decode_context: float, prefill_context: float
) -> RowMix:
    """What the rows `tokens` of this schedule's dense batch hold."""
    start, end = tokens
    decodes = sum(
        max(0, min(end, batch.tokens[0] + batch.decode_tokens) - max(start, batch.tokens[0]))
        for batch in schedule.nano_batches
    )
    return RowMix(
        decode_tokens=decodes,
        prefill_tokens=end - start - decodes,
        decode_context_tokens=decode_context,
        prefill_context_tokens=prefill_context,
    )


def intersects(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two half-open ranges share a row."""
    return a[0] < b[1] and b[0] < a[1]


def output_forms(schedule: Schedule, graph: OpGraph) -> tuple[tuple[OutputForm, ...], ...]:
    """By nano-batch, the forms in which the attention's output of its rows is joined.

    More than one where a form's range ends within the nano-batch.
    """
    first = {chain.ops[0].name: chain.form for chain in graph.alternatives}
    first |= {chain.replaces[0]: graph.forms[0] for chain in graph.alternatives}
    taken = [(first[n.op], n.tokens) for n in schedule.nano_ops if n.op in first]
    return tuple(
        tuple(
            form
            for form in graph.forms
            if any(form == other and intersects(batch.tokens, rows) for other, rows in taken)
        )
        or graph.forms[:1]
        for batch in schedule.nano_batches
    )


def has_o_columns(schedules: Iterable[Schedule]) -> bool:
    """Whether any of them needs the output projection split by columns."""
    return any(nano_op.op == "o_proj_columns" for s in schedules for nano_op in s.nano_ops)


def _waits(consumer: NanoOp, dependency: Dependency, producer: NanoOp) -> bool:
    if dependency.reach == "prefix":
        return producer.tokens[0] < consumer.tokens[1]
    return intersects(consumer.tokens, producer.tokens)


def data_edges(schedule: Schedule, graph: OpGraph) -> Iterator[tuple[int, int, int]]:
    """Yield (producer index, consumer index, layer distance) for every data dependency."""
    for consumer_index, consumer in enumerate(schedule.nano_ops):
        for dependency in graph.dependencies(graph.op(consumer.op)):
            for producer_index, producer in enumerate(schedule.nano_ops):
                if producer.op == dependency.op and _waits(consumer, dependency, producer):
                    yield producer_index, consumer_index, dependency.layer_distance


def period_edges(schedule: Schedule, graph: OpGraph) -> Iterator[tuple[int, int, int]]:
    """Yield (before index, after index, periods between) for every wait of the pattern.

    Data dependencies become period distances through the stages. The order within a lane is not
    listed here: in the first and last periods some nano-ops of a lane are left out, so `unroll`
    links the instances themselves.
    """
    for producer, consumer, distance in data_edges(schedule, graph):
        stages = schedule.nano_ops[consumer].stage - schedule.nano_ops[producer].stage
        yield producer, consumer, distance + stages
    position = {name: index for index, name in enumerate(schedule.ids)}
    for index, nano_op in enumerate(schedule.nano_ops):
        for name in nano_op.after:
            if name not in position:
                raise IllegalScheduleError(
                    f"`after` of {schedule.ids[index]} names {name!r}, which is not a nano-op of "
                    f"this schedule; known: {', '.join(schedule.ids)}"
                )
            yield position[name], index, 0 if position[name] < index else 1


def unroll(schedule: Schedule, graph: OpGraph, num_layers: int) -> list[Instance]:
    """All instances of `num_layers` layers in issue order, each with what it waits for.

    Raises:
        IllegalScheduleError: an instance would wait for one that is issued later.
    """
    edges: dict[int, list[tuple[int, int]]] = {}
    for before, after, periods in period_edges(schedule, graph):
        edges.setdefault(after, []).append((before, periods))
    position: dict[tuple[int, int], int] = {}  # (nano-op, period) -> place in the list
    order: list[tuple[int, int]] = []
    for period in range(num_layers + schedule.max_stage):
        for index, nano_op in enumerate(schedule.nano_ops):
            if 0 <= period - nano_op.stage < num_layers:
                position[index, period] = len(order)
                order.append((index, period))
    instances: list[Instance] = []
    last_of_lane: dict[str, int] = {}
    for here, (index, period) in enumerate(order):
        nano_op = schedule.nano_ops[index]
        waits = {last_of_lane[nano_op.lane]} if nano_op.lane in last_of_lane else set[int]()
        last_of_lane[nano_op.lane] = here
        for before, periods in edges.get(index, ()):
            there = position.get((before, period - periods))
            if there is None:
                continue
            if there >= here:
                raise IllegalScheduleError(
                    f"illegal order: {schedule.ids[index]} (stage {nano_op.stage}) needs "
                    f"{schedule.ids[before]} (stage {schedule.nano_ops[before].stage}), "
                    "which is issued later; move it behind, or raise its stage"
                )
            waits.add(there)
        instances.append(Instance(index, period - nano_op.stage, tuple(sorted(waits))))
    return instances


def concurrent_pairs(schedule: Schedule, graph: OpGraph) -> set[tuple[int, int]]:
    """Pairs of nano-ops (i < j) of which some instances can run at the same time.

    Two instances can when neither waits for the other, directly or through others. Looking at
    2 x max_stage + 3 layers covers every pair of stages in the steady state.
    """
    instances = unroll(schedule, graph, 2 * schedule.max_stage + 3)
    ancestors: list[int] = []  # bit mask over earlier instances
    pairs: set[tuple[int, int]] = set()
    for here, instance in enumerate(instances):
        mask = 0
        for there in instance.waits_for:
            mask |= ancestors[there] | (1 << there)
        ancestors.append(mask)
        for there in range(here):
            if not mask >> there & 1:
                a, b = instances[there].index, instance.index
                pairs.add((min(a, b), max(a, b)))
    return pairs


def random_legal_order(instances: list[Instance], seed: int) -> list[int]:
    """A random permutation of the instances that keeps every wait."""
    rng = random.Random(seed)
    missing = [len(instance.waits_for) for instance in instances]
    followers: list[list[int]] = [[] for _ in instances]
    for here, instance in enumerate(instances):
        for there in instance.waits_for:
            followers[there].append(here)
    ready = [here for here, count in enumerate(missing) if count == 0]
    order: list[int] = []
    while ready:
        here = ready.pop(rng.randrange(len(ready)))
        order.append(here)
        for follower in followers[here]:
            missing[follower] -= 1
            if missing[follower] == 0:
                ready.append(follower)
    return order
