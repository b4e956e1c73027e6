"""GEMMs of neighbouring nano-batches joined into one: their weights are read once instead of twice.

At the power cap a layer takes its joules over the free watts, and weights that a second nano-batch
reads again are joules. A joined GEMM costs order: it waits for the rows of both nano-batches, so
that what hid behind one of them (a collective, attention) may show. Which of both weighs more the
simulator tells; the declared space of the search, and so its bound, has no joined GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..runtime.op_graph import GEMM_KINDS, OpGraph
from ..runtime.plan import NanoOp, Schedule
from ..runtime.schedule import period_edges

LEAST_GAIN = 0.001
"""Part of the period that a join must gain to be kept."""
MOST_JOINS = 4


def joins(schedule: Schedule, graph: OpGraph) -> Iterator[Schedule]:
    """Schedules in which two nano-ops of one GEMM are one, in every order and variant that may be.

    The joined one takes the place of the later of both, and what needs it follows; or that of the
    earlier one, and what it needs goes before. They may still be illegal: shares, other orders.
    """
    for first, last in _neighbours(schedule, graph):
        early, late = schedule.nano_ops[first], schedule.nano_ops[last]
        tokens = (min(early.tokens[0], late.tokens[0]), max(early.tokens[1], late.tokens[1]))
        share = max(early.num_sms, late.num_sms)
        for variant in dict.fromkeys((early.variant, late.variant)):
            joined = replace(late, tokens=tokens, num_sms=share, variant=variant)
            for order in _orders(schedule, graph, first, last, joined):
                yield replace(schedule, nano_ops=order)


def _neighbours(schedule: Schedule, graph: OpGraph) -> Iterator[tuple[int, int]]:
    """Positions of two nano-ops of one GEMM whose rows meet, the earlier first.

    Those that an `after` names, or that have one, are left out: ids change with a join.
    """
    named = {name.rpartition(".")[0] for nano_op in schedule.nano_ops for name in nano_op.after}
    for first, early in enumerate(schedule.nano_ops):
        if graph.op(early.op).kind not in GEMM_KINDS or early.op in named or early.after:
            continue
        for last in range(first + 1, len(schedule.nano_ops)):
            late = schedule.nano_ops[last]
            is_alike = (late.op, late.stage, late.lane) == (early.op, early.stage, early.lane)
            meets = early.tokens[1] == late.tokens[0] or late.tokens[1] == early.tokens[0]
            if is_alike and meets and not late.after:
                yield first, last


def _orders(
    schedule: Schedule, graph: OpGraph, first: int, last: int, joined: NanoOp
) -> Iterator[tuple[NanoOp, ...]]:
    nano_ops = schedule.nano_ops
    followers: dict[int, set[int]] = {}
    for before, after, periods in period_edges(schedule, graph):
        if periods == 0:
            followers.setdefault(before, set()).add(after)
    between = range(first + 1, last)
    behind = _reached(followers, {first})
    if last in behind:
        return
    needed = [here for here in between if last in _reached(followers, {here})]
    following = [here for here in between if here in behind]
    head, tail = nano_ops[:first], nano_ops[last + 1 :]
    stay = [nano_ops[here] for here in between if here not in following]
    yield (*head, *stay, joined, *(nano_ops[here] for here in following), *tail)
    stay = [nano_ops[here] for here in between if here not in needed]
    yield (*head, *(nano_ops[here] for here in needed), joined, *stay, *tail)


def _reached(followers: dict[int, set[int]], starts: set[int]) -> set[int]:
    """What comes behind some nano-ops within a period."""
    found, open_ends = set[int](), list(starts)
    while open_ends:
        for after in followers.get(open_ends.pop(), ()):
            if after not in found:
                found.add(after)
                open_ends.append(after)
    return found


def joined_gemms(
    schedule: Schedule, graph: OpGraph, period_us: Callable[[Schedule], float | None]
) -> Schedule | None:
    """The schedule with the joins that shorten it, one after the other; None where none does.

    Args:
        schedule: to begin with.
        graph: of one rank.
        period_us: predicted period; None for what may not run.
    """
    best_us = period_us(schedule)
    assert best_us is not None, "the schedule itself may run"
    found: Schedule | None = None
    for _ in range(MOST_JOINS):
        told = [
            (us, join)
            for join in joins(found or schedule, graph)
            if (us := period_us(join)) is not None
        ]
        if not told:
            break
        us, best = min(told, key=lambda item: item[0])
        if us > (1 - LEAST_GAIN) * best_us:
            break
        best_us, found = us, replace(best, name=f"{schedule.name}_joined")
    return found
