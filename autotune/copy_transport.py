"""What a transport that takes no SMs moves, and the sum that it leaves to the norm behind it.

`copy_engine` sends this rank's rows to each of the N - 1 peers and adds nothing. The next norm
adds, so that it reads N - 1 more rows for each of its own: 4 passes over the rows become 4 + N - 1.
Profiles hold the norm without them. Every price of a norm (simulator, MILP, energy) takes its op
from here, so that bytes, joules and, in proportion to the bytes, time are those of the longer one.
"""

from __future__ import annotations

from dataclasses import replace

from ..runtime.op_graph import Op, OpGraph
from ..runtime.op_shapes import shape_numbers
from ..runtime.plan import SM_FREE_VARIANTS, NanoOp, Schedule
from ..runtime.schedule import intersects


def as_sent(op: Op, variant: str) -> Op:
    """The op as its variant moves it: copies send whole rows to every peer."""
    if op.kind != "all_reduce" or variant not in SM_FREE_VARIANTS:
        return op
    hidden, ranks = shape_numbers(op.shape)
    return replace(
        op,
        row_elements=2 * (ranks - 1) * hidden,
        link_elements_per_row=float((ranks - 1) * hidden),
    )


def summing(norm: Op, num_ranks: int) -> Op:
    """The norm that also reads the rows of all peers and adds them."""
    hidden, *_ = shape_numbers(norm.shape)
    return replace(norm, row_elements=norm.row_elements + (num_ranks - 1) * hidden)


def norm_behind(all_reduce: Op, graph: OpGraph) -> Op:
    """The norm of this or the next layer that reads what an all-reduce gives."""
    return next(
        op
        for op in graph.layer
        if op.kind == "norm" and any(on.op == all_reduce.name for on in op.dependencies)
    )


def ops_as_run(schedule: Schedule, graph: OpGraph) -> tuple[Op, ...]:
    """The op of each nano-op, in issue order, as the variants of the schedule make it."""
    free = [
        n
        for n in schedule.nano_ops
        if n.variant in SM_FREE_VARIANTS and graph.op(n.op).kind == "all_reduce"
    ]
    return tuple(_as_run(nano_op, graph, free) for nano_op in schedule.nano_ops)


def _as_run(nano_op: NanoOp, graph: OpGraph, free: list[NanoOp]) -> Op:
    op = graph.op(nano_op.op)
    if op.kind == "norm":
        producers = {dependency.op for dependency in op.dependencies}
        if any(n.op in producers and intersects(n.tokens, nano_op.tokens) for n in free):
            return summing(op, graph.tp_degree)
    return as_sent(op, nano_op.variant)
