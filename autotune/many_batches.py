"""Two to four nano-batches in round robins, each a block behind the one before.

A layer is a ring of three blocks: up to the attention, output projection, feed-forward. In slot s
of a period nano-batch b works on block s - b (with `lag` 1), so that its attention and collectives
run beside the blocks of the others; with `lag` 0 all work on the same block in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

from ..runtime.legality import check
from ..runtime.op_graph import OpGraph, OutputForm, RowMix
from ..runtime.plan import Candidate, Schedule
from ..runtime.schedule import IllegalScheduleError
from ..search_spaces.schema import SearchSpace
from .certificate import CountBound
from .cost_model import CostModel
from .milp_input import Split
from .patterns import (
    COMPUTE,
    MEMORY,
    NETWORK,
    Placed,
    build_schedule,
    has_sm_free,
    legal_shares,
    macro_ops,
    split_batches,
    total_tokens,
)
from .periods import layer_phases
from .simulator import predict

MAX_SHARES = 3
"""Shares of a side lane that are tried: spread over those of the space."""
FORMED = 6
"""Best members that are tried in all forms of the attention's output."""


def even_sizes(count: int, total: int, step: int) -> tuple[int, ...]:
    """As even a cut as the granularity allows."""
    ends = [round(total * k / count / step) * step for k in range(count)] + [total]
    return tuple(high - low for low, high in pairwise(ends))


def round_robin(graph: OpGraph, num_batches: int, lag: int) -> list[tuple[int, int, int]]:
    """(macro op, nano-batch, stage) of one period, in issue order."""
    blocks = layer_blocks(graph)
    period: list[tuple[int, int, int]] = []
    for slot, batch in product(range(len(blocks)), range(num_batches)):
        stage, block = divmod(slot - lag * batch, len(blocks))
        period += [(macro, batch, -stage) for macro in blocks[block]]
    return period


def layer_blocks(graph: OpGraph) -> tuple[list[int], list[int], list[int]]:
    """Macro ops up to the attention, the output projection with its collective, the rest.

    The first has the gather of the heads, for rows that take that form.
    """
    head, gather, output, ffn = layer_phases(graph)
    return head + gather, output, ffn


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRobin:
    """One member of the family."""

    split: Split
    memory_sms: int
    network_sms: int
    lag: int
    forms: tuple[OutputForm, OutputForm]
    """Of the first nano-batch, and of all others."""


def round_robins(
    graph: OpGraph,
    cost_model: CostModel,
    space: SearchSpace,
    mix: RowMix,
    count: CountBound,
) -> list[Candidate]:
    """The family over the even cut and the one with the best bound, and a coarse grid of shares.

    In the layer's own form first; the best `FORMED` in the other forms too. Those that find no
    places are left out.
    """
    own = graph.forms[0], graph.forms[0]

    def predicted(members: Iterable[RoundRobin]) -> list[tuple[RoundRobin, Candidate]]:
        found: list[tuple[RoundRobin, Candidate]] = []
        for member in members:
            schedule = _schedule_of(member, graph, cost_model, mix)
            if schedule is not None:
                timing = predict(schedule, graph, cost_model, mix)
                found.append((member, Candidate(schedule=schedule, predicted=timing)))
        return sorted(found, key=lambda pair: pair[1].predicted.period_us)

    found = predicted(
        RoundRobin(split=split, memory_sms=side, network_sms=link, lag=lag, forms=own)
        for split, side, link, lag in _grid(graph, cost_model, space, mix, count)
    )
    others = list(product(graph.forms, repeat=2))[1:]
    best_few = product([member for member, _ in found[:FORMED]], others)
    found += predicted(replace(member, forms=forms) for member, forms in best_few)
    return [candidate for _, candidate in found]


def _grid(
    graph: OpGraph, cost_model: CostModel, space: SearchSpace, mix: RowMix, count: CountBound
) -> Iterator[tuple[Split, int, int, int]]:
    """Cut, memory share, network share and lag."""
    even = even_sizes(count.num_nano_batches, total_tokens(mix), space.token_granularity)
    splits = [
        Split(sizes=sizes, row_order=order)
        for sizes in dict.fromkeys((count.sizes, even))
        for order in space.row_orders
        if min(sizes) > 0
    ]
    hardware, is_free = cost_model.hardware, has_sm_free(graph, cost_model)
    sides = _spread(legal_shares(MEMORY, hardware, space))
    links = _spread(legal_shares(NETWORK, hardware, space, is_free)) if graph.tp_degree > 1 else [0]
    return product(splits, sides, links, (0, 1))


def _schedule_of(
    member: RoundRobin, graph: OpGraph, cost_model: CostModel, mix: RowMix
) -> Schedule | None:
    """None where its shares find no places, in any order."""
    hardware, macros = cost_model.hardware, macro_ops(graph)
    batches = split_batches(member.split.sizes, member.split.row_order, mix)
    shares = {
        MEMORY: member.memory_sms,
        NETWORK: member.network_sms,
        COMPUTE: hardware.num_sms - max(member.memory_sms, member.network_sms),
    }
    placed = [
        Placed(macro=macro, batch=batch, stage=stage, num_sms=shares[macros[macro].lane])
        for macro, batch, stage in round_robin(graph, len(batches), member.lag)
    ]
    name = f"overlapped_robin_{len(batches)}"
    forms: list[OutputForm] = [member.forms[min(batch, 1)] for batch in range(len(batches))]
    try:
        schedule = build_schedule(name, cost_model, graph, mix, batches, placed, forms=forms)
        check(schedule, graph, hardware.num_sms, hardware.sm_granularity)
    except IllegalScheduleError:
        return None
    return schedule


def _spread(shares: Sequence[int]) -> list[int]:
    """At most `MAX_SHARES`, from the smallest to the largest."""
    if len(shares) <= MAX_SHARES:
        return list(shares)
    last = len(shares) - 1
    return sorted({shares[round(k * last / (MAX_SHARES - 1))] for k in range(MAX_SHARES)})
