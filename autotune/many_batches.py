"""Two to four nano-batches in round robins, each a block behind the one before.

A layer is a ring of three blocks: up to the attention, output projection, feed-forward. In slot s
of a period nano-batch b works on block s - b (with `lag` 1), so that its attention and collectives
run beside the blocks of the others; with `lag` 0 all work on the same block in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

from ..runtime.op_graph import OpGraph, OutputForm, RowMix
from ..runtime.plan import Schedule
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

MAX_SHARES = 3
"""Shares of a side lane that are tried: spread over those of the space."""


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


def round_robins(
    graph: OpGraph,
    cost_model: CostModel,
    space: SearchSpace,
    mix: RowMix,
    count: CountBound,
) -> Iterator[Schedule]:
    """The family over the even cut and the one with the best bound, and a coarse grid of shares.

    All nano-batches take one form, or the first another one than the rest.
    Those that find no places are left out.
    """
    even = even_sizes(count.num_nano_batches, total_tokens(mix), space.token_granularity)
    splits = [
        Split(sizes=sizes, row_order=order)
        for sizes in dict.fromkeys((count.sizes, even))
        for order in space.row_orders
        if min(sizes) > 0
    ]
    hardware, macros = cost_model.hardware, macro_ops(graph)
    is_free = has_sm_free(graph, cost_model)
    sides = _spread(legal_shares(MEMORY, hardware, space))
    links = _spread(legal_shares(NETWORK, hardware, space, is_free)) if graph.tp_degree > 1 else [0]
    pairs = list(product(graph.forms, repeat=2))
    for split, side, link, lag, (first, rest) in product(splits, sides, links, (0, 1), pairs):
        batches = split_batches(split.sizes, split.row_order, mix)
        forms: list[OutputForm] = [rest if batch else first for batch in range(len(batches))]
        shares = {
            MEMORY: side,
            NETWORK: link,
            COMPUTE: hardware.num_sms - max(side, link),
        }
        placed = [
            Placed(macro=macro, batch=batch, stage=stage, num_sms=shares[macros[macro].lane])
            for macro, batch, stage in round_robin(graph, len(batches), lag)
        ]
        name = f"overlapped_robin_{len(batches)}"
        try:
            yield build_schedule(name, cost_model, graph, mix, batches, placed, forms=forms)
        except IllegalScheduleError:
            continue


def _spread(shares: Sequence[int]) -> list[int]:
    """At most `MAX_SHARES`, from the smallest to the largest."""
    if len(shares) <= MAX_SHARES:
        return list(shares)
    last = len(shares) - 1
    return sorted({shares[round(k * last / (MAX_SHARES - 1))] for k in range(MAX_SHARES)})
