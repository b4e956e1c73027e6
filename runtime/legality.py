"""Which schedules may run: what is refused, and how conflicts over SMs are put in order.

Refused: unknown ops, ranges that do not tile the batch, orders that read what is not written yet,
shares the GPU cannot give, and nano-ops that can run at once on more SMs than there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .op_graph import OpGraph
from .partition_layout import SmSplit, layout
from .plan import Schedule
from .schedule import IllegalScheduleError, concurrent_pairs

Range = tuple[int, int]
"""Half-open, of rows."""
_FORMS = (
    "o_proj and attn_all_reduce, or attn_all_gather, o_proj_columns and o_all_gather in their place"
)
_ROUTED_KINDS = ("moe_router", "grouped_gemm_silu", "grouped_gemm", "moe_combine")


def check(schedule: Schedule, graph: OpGraph, num_sms: int, sm_granularity: int) -> None:
    """Refuse a schedule that must not run.

    Raises:
        IllegalScheduleError: with the nano-op, the rule and the remedy.
    """
    _check_nano_batches(schedule)
    _check_coverage(schedule, graph)
    _check_experts(schedule, graph)
    for name, nano_op in zip(schedule.ids, schedule.nano_ops, strict=True):
        _check_share(name, nano_op.num_sms, num_sms, sm_granularity)
    pairs = concurrent_pairs(schedule, graph)
    for group in share_conflicts(schedule, pairs, num_sms):
        shares = " and ".join(
            f"{schedule.ids[index]} on {schedule.nano_ops[index].num_sms} SMs" for index in group
        )
        raise IllegalScheduleError(
            f"{shares} can run at the same time, but the GPU has {num_sms}: lower a share, or "
            "order them with `after`"
        )
    layout(schedule, pairs, num_sms, SmSplit.expected(num_sms, sm_granularity))


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
    """Every op once for each row; of ops that may stand for others, one chain for each row."""
    ranges: dict[str, list[Range]] = {op.name: [] for op in graph.all_ops}
    for nano_op in schedule.nano_ops:
        if nano_op.op not in ranges:
            raise IllegalScheduleError(
                f"unknown op {nano_op.op!r}; this graph has {', '.join(ranges)}. A plan "
                "made for other ops, by another version say, cannot run: tune again"
            )
        ranges[nano_op.op].append(nano_op.tokens)
    total = schedule.dense_batch_tokens
    whole = {op: [(0, total)] for op in graph.op_names}
    for chain in graph.alternatives:
        first, *others = (op.name for op in chain.ops)
        taken = _joined(ranges[first])
        whole |= dict.fromkeys((first, *others), taken)
        whole |= dict.fromkeys(chain.replaces, _rest(taken, total))
    for op, wanted in whole.items():
        _check_tiles(op, sorted(ranges[op]), wanted, total)


def _check_tiles(op: str, spans: list[Range], wanted: list[Range], total: int) -> None:
    """The spans, in order, must tile these ranges."""
    is_part = wanted != [(0, total)]
    remedy = f"; rows take one form each, whole: {_FORMS}" if is_part else ""
    left, last = list(wanted), 0
    for start, end in spans:
        expected, stop = left[0] if left else (max(last, total), total)
        if start != expected and (left or start < last):
            what = "overlap" if start < expected else "miss rows"
            raise IllegalScheduleError(
                f"token ranges of {op} {what}: [{start}, {end}) where row {expected} comes next"
                f"{remedy}"
            )
        if end > stop or not left:
            raise IllegalScheduleError(
                f"token ranges of {op} end outside the dense batch: they end at {end}, it has "
                f"{total} rows"
                if end > total or not is_part
                else f"token ranges of {op} hold rows of another form: [{start}, {end}){remedy}"
            )
        left[:1] = [(end, stop)] if end < stop else []
        last = end
    if left:
        raise IllegalScheduleError(
            f"token ranges of {op} miss the end of the dense batch: they end at {last}, it has "
            f"{total} rows"
            if not is_part
            else f"token ranges of {op} miss the rows [{left[0][0]}, {left[0][1]}){remedy}"
        )


def _joined(spans: Iterable[Range]) -> list[Range]:
    """Ranges in order, those that touch as one."""
    joined: list[Range] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _rest(spans: list[Range], total: int) -> list[Range]:
    """What joined ranges leave of the dense batch."""
    ends = [0, *(row for span in spans for row in span), total]
    pairs = zip(ends[::2], ends[1::2], strict=True)
    return [(start, end) for start, end in pairs if start < end]


def _check_experts(schedule: Schedule, graph: OpGraph) -> None:
    """A router sorts the rows of its own range, so that what follows must be cut like it."""
    ranges = {
        op.name: sorted(n.tokens for n in schedule.nano_ops if n.op == op.name)
        for op in graph.layer
        if op.kind in _ROUTED_KINDS
    }
    for name, spans in ranges.items():
        if spans != ranges["router"]:
            raise IllegalScheduleError(
                f"{name} must be cut at the same rows as router, which sorts the rows of each of "
                f"its ranges by expert, but it has {spans} and router {ranges['router']}"
            )


def _check_share(name: str, share: int, num_sms: int, granularity: int) -> None:
    if share > num_sms:
        raise IllegalScheduleError(f"{name} asks for {share} SMs, but the GPU has {num_sms}")
    if share != num_sms and share % granularity and (num_sms - share) % granularity:
        raise IllegalScheduleError(
            f"{name} asks for {share} SMs; a share must be a multiple of {granularity}, the "
            f"complement of one, or all {num_sms}"
        )


def serialize_conflicts(
    schedule: Schedule, graph: OpGraph, num_sms: int, sm_granularity: int
) -> Schedule:
    """Add `after` edges, in issue order, until what can run at once fits on the GPU.

    Of three nano-ops that do not fit together, the two with the fewest SMs take turns; so do the
    two smallest lanes where three lanes never meet on too many SMs but find no fixed places.

    Raises:
        IllegalScheduleError: order alone cannot help, because the pattern is illegal in itself.
    """
    ids = schedule.ids
    while True:
        pairs = concurrent_pairs(schedule, graph)
        conflicts = share_conflicts(schedule, pairs, num_sms)
        if not conflicts:
            try:
                layout(schedule, pairs, num_sms, SmSplit.expected(num_sms, sm_granularity))
            except IllegalScheduleError:
                conflicts = _between_smallest_lanes(schedule, pairs)
            else:
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
            names = ", ".join(ids[index] for group in conflicts[:1] for index in group)
            raise IllegalScheduleError(
                f"no order keeps {names or 'its lanes'} apart; lower their shares"
            )
        schedule = replace(schedule, nano_ops=tuple(nano_ops))


def _between_smallest_lanes(
    schedule: Schedule, pairs: set[tuple[int, int]]
) -> list[tuple[int, ...]]:
    """Pairs that can run at once on the two lanes with the smallest largest share above 0."""
    largest: dict[str, int] = {}
    for nano_op in schedule.nano_ops:
        largest[nano_op.lane] = max(nano_op.num_sms, largest.get(nano_op.lane, 0))
    largest = {lane: share for lane, share in largest.items() if share}  # 0 needs no place
    smallest = set(sorted(largest, key=lambda lane: (largest[lane], lane))[:2])
    return [
        (a, b)
        for a, b in sorted(pairs)
        if {schedule.nano_ops[a].lane, schedule.nano_ops[b].lane} == smallest
    ]
