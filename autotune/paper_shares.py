"""Stage II of the paper on a given structure: which share each nano-op gets, by hill climbing.

A move gives one group of nano-ops another share and takes what is too much from the groups that
can run beside it; it is kept when the simulated period falls. Groups are nano-ops of one lane and
one range that follow each other, such as norm -> KQV -> rotary. What can run at once depends on
structure alone, so it is worked out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from ..runtime.legality import share_conflicts
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Schedule
from ..runtime.schedule import concurrent_pairs
from .cost_model import CostModel
from .simulator import predict

MAX_PASSES = 8


def climb(schedule: Schedule, graph: OpGraph, cost_model: CostModel, mix: RowMix) -> Schedule:
    """The schedule with shares that no single move improves; never slower than the given one.

    Args:
        schedule: structure and first shares.
        graph: of one rank.
        cost_model: its hardware's granularity must be 1, and places on the GPU must not matter.
        mix: rows of the dense batch.
    """
    groups, total = _groups(schedule), cost_model.hardware.num_sms
    pairs = concurrent_pairs(schedule, graph)
    best_us = predict(schedule, graph, cost_model, mix).period_us
    for _ in range(MAX_PASSES):
        before_us = best_us
        for group, share in product(groups, range(1, total)):
            if schedule.nano_ops[group[0]].num_sms == share:
                continue
            moved = _moved(schedule, group, share, groups, pairs, total)
            if moved is None:
                continue
            us = predict(moved, graph, cost_model, mix).period_us
            if us < best_us * (1 - 1e-6):
                schedule, best_us = moved, us
        if best_us == before_us:
            break
    return schedule


def _groups(schedule: Schedule) -> list[tuple[int, ...]]:
    """Positions of nano-ops that share a lane and a range and follow each other."""
    groups: list[tuple[int, ...]] = []
    for index, nano_op in enumerate(schedule.nano_ops):
        last = schedule.nano_ops[groups[-1][-1]] if groups else None
        if last and (last.lane, last.tokens) == (nano_op.lane, nano_op.tokens):
            groups[-1] = (*groups[-1], index)
        else:
            groups.append((index,))
    return groups


def _moved(
    schedule: Schedule,
    group: Sequence[int],
    share: int,
    groups: Sequence[Sequence[int]],
    pairs: set[tuple[int, int]],
    total: int,
) -> Schedule | None:
    """The group at this share and those beside it lowered to fit; None where they cannot."""
    shares = [nano_op.num_sms for nano_op in schedule.nano_ops]
    for index in group:
        shares[index] = share
    for other in groups:
        is_beside = any((min(a, b), max(a, b)) in pairs for a, b in product(group, other))
        if other != group and is_beside:
            for index in other:
                shares[index] = min(shares[index], total - share)
    moved = replace(
        schedule,
        nano_ops=tuple(
            replace(nano_op, num_sms=num_sms)
            for nano_op, num_sms in zip(schedule.nano_ops, shares, strict=True)
        ),
    )
    return None if share_conflicts(moved, pairs, total) else moved
