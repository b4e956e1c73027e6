"""The structure of a schedule on a batch of another size or mix, with the cheapest kernels there.

Order, lanes, stages and shares stay; boundaries of token ranges move in proportion, to the nearest
step. What could then run at once on too many SMs is put in order again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..runtime.legality import serialize_conflicts
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import NanoOp, Schedule, Timing
from ..runtime.schedule import IllegalScheduleError, row_mix
from ..search_spaces.schema import RowOrder, SearchSpace
from .cost_model import CostModel
from .patterns import split_batches, total_tokens


def granularity(rows: RowMix, space: SearchSpace) -> int:
    """Boundaries are multiples of this: the space's step, or the half of small batches."""
    step, tokens = space.token_granularity, total_tokens(rows)
    return step if 2 * step <= tokens else max(1, tokens // 2)


def resized(
    schedule: Schedule,
    rows: RowMix,
    graph: OpGraph,
    cost_model: CostModel,
    *,
    order: RowOrder,
    step: int,
    shares: Mapping[str, int],
    shift: int = 0,
    name: str = "overlapped",
) -> Schedule:
    """Make a schedule for other rows after the structure of one.

    Args:
        schedule: of any size.
        rows: the batch that the result is to hold.
        graph: of one tensor-parallel rank.
        cost_model: chooses the kernels.
        order: of decode and prefill rows.
        step: inner boundaries are multiples of this.
        shares: new SMs by lane, for nano-ops that hold a part of the SMs.
        shift: rows by which all inner boundaries move.
        name: of the result.

    Raises:
        IllegalScheduleError: a nano-batch vanishes, or the shares cannot be put in order.
    """
    place = _boundaries(schedule, rows, step, shift)
    ends = [place[batch.tokens[1]] for batch in schedule.nano_batches]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    batches = split_batches(sizes, order, rows)
    moved = replace(schedule, name=name, nano_batches=batches, nano_ops=())
    contexts = rows.decode_context_tokens, rows.prefill_context_tokens
    num_sms, price = cost_model.hardware.num_sms, cost_model.price(graph, rows)

    def renewed(nano_op: NanoOp) -> NanoOp:
        tokens = place[nano_op.tokens[0]], place[nano_op.tokens[1]]
        share = nano_op.num_sms
        if 0 < share < num_sms:
            share = shares.get(nano_op.lane, share)
        own_rows = row_mix(moved, tokens, *contexts)
        op = graph.op(nano_op.op)
        variant, _, _ = cost_model.cheapest(op, own_rows, (share,), price)
        return replace(nano_op, tokens=tokens, num_sms=share, variant=variant, after=())

    moved = replace(moved, nano_ops=tuple(map(renewed, schedule.nano_ops)))
    return serialize_conflicts(moved, graph, num_sms, cost_model.hardware.sm_granularity)


def _boundaries(schedule: Schedule, rows: RowMix, step: int, shift: int) -> dict[int, int]:
    """Where each boundary of the schedule goes."""
    total, old = total_tokens(rows), schedule.dense_batch_tokens
    inner = {row for nano_op in schedule.nano_ops for row in nano_op.tokens}
    inner |= {batch.tokens[1] for batch in schedule.nano_batches}
    inner -= {0, old}
    place = {row: round(row * total / old / step) * step + shift for row in inner}
    place |= {0: 0, old: total}
    ascending = [place[row] for row in sorted(place)]
    if ascending != sorted(set(ascending)):
        raise IllegalScheduleError(
            f"{total} rows are too few for the {len(inner) + 1} parts of this structure in steps "
            f"of {step}"
        )
    return place


def row_order_of(schedule: Schedule) -> RowOrder:
    """`decodes_first` when no decode row comes behind a prefill row."""
    is_behind = False
    for batch in schedule.nano_batches:
        if is_behind and batch.decode_tokens:
            return "interleaved"
        is_behind = is_behind or batch.decode_tokens < batch.num_tokens
    return "decodes_first"


def shortened(timing: Timing) -> Timing:
    """A timing with as many digits as people read: 0.1 us, 1 mJ, 0.1 W."""
    return replace(
        timing,
        period_us=round(timing.period_us, 1),
        p10_us=round(timing.p10_us, 1),
        p90_us=round(timing.p90_us, 1),
        joules=round(timing.joules, 3),
        watts=round(timing.watts, 1),
        sm_clock_mhz=round(timing.sm_clock_mhz),
        turn_spread=round(timing.turn_spread, 4),
    )
