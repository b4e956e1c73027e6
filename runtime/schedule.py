"""From one period of a schedule to the nano-ops of a whole iteration, and whether it is legal.

`unroll` gives every instance (nano-op, layer) with the instances it waits for: data dependencies
(parents' token ranges intersect, and the prefix rule for straddling prefills), the order within its
lane, and the plan's own `after` edges. Executor, simulator and verifier all run this one list.

`check` refuses what must not run: unknown ops, ranges that do not tile the batch, orders that read
what is not written yet, and nano-ops that can run at once on more SMs than the GPU has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .op_graph import Dependency, OpGraph, RowMix
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


def _waits(consumer: NanoOp, dependency: Dependency, producer: NanoOp) -> bool:
    if dependency.reach == "prefix":
        return producer.tokens[0] < consumer.tokens[1]
    return intersects(consumer.tokens, producer.tokens)


def data_edges(schedule: Schedule, graph: OpGraph) -> Iterator[tuple[int, int, int]]:
    """Yield (producer index, consumer index, layer distance) for every data dependency."""
    for consumer_index, consumer in enumerate(schedule.nano_ops):
        for dependency in graph.op(consumer.op).dependencies:
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


def check(schedule: Schedule, graph: OpGraph, num_sms: int, sm_granularity: int) -> None:
    """Refuse a schedule that must not run.

    Raises:
        IllegalScheduleError: with the nano-op, the rule and the remedy.
    """
    _check_nano_batches(schedule)
    _check_coverage(schedule, graph)
    for name, nano_op in zip(schedule.ids, schedule.nano_ops, strict=True):
        _check_share(name, nano_op.num_sms, num_sms, sm_granularity)
    for group in share_conflicts(schedule, concurrent_pairs(schedule, graph), num_sms):
        shares = " and ".join(
            f"{schedule.ids[index]} on {schedule.nano_ops[index].num_sms} SMs" for index in group
        )
        raise IllegalScheduleError(
            f"{shares} can run at the same time, but the GPU has {num_sms}: lower a share, or "
            "order them with `after`"
        )


def share_conflicts(
    schedule: Schedule, pairs: set[tuple[int, int]], num_sms: int
) -> list[tuple[int, ...]]:
    """Pairs and triples of nano-ops that can all run at once on more SMs than the GPU has.

    Three lanes are the most a plan uses, so that triples suffice; a triple of which a pair is
    already too much is not listed again.
    """
    share = [nano_op.num_sms for nano_op in schedule.nano_ops]
    conflicts: list[tuple[int, ...]] = [
        (a, b) for a, b in sorted(pairs) if share[a] + share[b] > num_sms
    ]
    fitting = pairs - set(conflicts)
    for a, b in sorted(fitting):
        for c in range(b + 1, len(share)):
            together = (a, c) in fitting and (b, c) in fitting
            if together and share[a] + share[b] + share[c] > num_sms:
                conflicts.append((a, b, c))
    return conflicts


def _check_nano_batches(schedule: Schedule) -> None:
    expected = 0
    for batch in schedule.nano_batches:
        if batch.tokens[0] != expected:
            raise IllegalScheduleError(
                f"nano-batches must tile the dense batch, but one starts at row {batch.tokens[0]} "
                f"where {expected} was expected"
            )
        expected = batch.tokens[1]


def _check_coverage(schedule: Schedule, graph: OpGraph) -> None:
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in graph.op_names}
    for nano_op in schedule.nano_ops:
        if nano_op.op not in ranges:
            raise IllegalScheduleError(
                f"unknown op {nano_op.op!r}; this graph has {', '.join(graph.op_names)}"
            )
        ranges[nano_op.op].append(nano_op.tokens)
    total = schedule.dense_batch_tokens
    for op, spans in ranges.items():
        expected = 0
        for start, end in sorted(spans):
            if start != expected:
                what = "overlap" if start < expected else "miss rows"
                raise IllegalScheduleError(
                    f"token ranges of {op} {what}: [{start}, {end}) where row {expected} comes next"
                )
            expected = end
        if expected != total:
            rule = "end outside" if expected > total else "miss the end of"
            raise IllegalScheduleError(
                f"token ranges of {op} {rule} the dense batch: they end at {expected}, it has "
                f"{total} rows"
            )


def _check_share(name: str, share: int, num_sms: int, granularity: int) -> None:
    if share > num_sms:
        raise IllegalScheduleError(f"{name} asks for {share} SMs, but the GPU has {num_sms}")
    if share != num_sms and share % granularity and (num_sms - share) % granularity:
        raise IllegalScheduleError(
            f"{name} asks for {share} SMs; a share must be a multiple of {granularity}, the "
            f"complement of one, or all {num_sms}"
        )


def serialize_conflicts(schedule: Schedule, graph: OpGraph, num_sms: int) -> Schedule:
    """Add `after` edges, in issue order, until what can run at once fits on the GPU.

    Of three nano-ops that do not fit together, the two with the fewest SMs take turns.

    Raises:
        IllegalScheduleError: order alone cannot help, because the pattern is illegal in itself.
    """
    ids = schedule.ids
    while True:
        conflicts = share_conflicts(schedule, concurrent_pairs(schedule, graph), num_sms)
        if not conflicts:
            return schedule
        nano_ops = list(schedule.nano_ops)
        for group in conflicts:
            by_share = sorted(group, key=lambda index: (schedule.nano_ops[index].num_sms, index))
            a, b = sorted(by_share[:2])
            for before, after in ((a, b), (b, a)):
                if ids[before] not in nano_ops[after].after:
                    names = (*nano_ops[after].after, ids[before])
                    nano_ops[after] = replace(nano_ops[after], after=names)
        if tuple(nano_ops) == schedule.nano_ops:
            names = ", ".join(ids[index] for index in conflicts[0])
            raise IllegalScheduleError(f"no order keeps {names} apart; lower their shares")
        schedule = replace(schedule, nano_ops=tuple(nano_ops))


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
