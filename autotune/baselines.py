"""Schedules that need no search: what every tuned plan is raced against.

sequential   one nano-batch, one lane, all SMs, the fastest variant of each op
nano_only    two nano-batches, one lane: what splitting alone costs
equal_split  two equal nano-batches, the SMs halved between compute and the rest
ping_pong    the family around it: one nano-batch computes while the other one's attention and
             collectives run; the refinement moves within this family
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Schedule
from ..search_spaces.schema import HardwareSpec, RowOrder, SearchSpace
from .cost_model import CostModel
from .patterns import (
    COMPUTE,
    MEMORY,
    NETWORK,
    Placed,
    build_schedule,
    legal_shares,
    macro_ops,
    split_batches,
    total_tokens,
)

PingPongOrder = Literal["blocks", "interleaved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PingPongChoice:
    """One member of the ping-pong family."""

    first_tokens: int
    """Rows of the first nano-batch."""
    row_order: RowOrder
    compute_sms: int
    memory_sms: int
    network_sms: int
    order: PingPongOrder = "blocks"
    """`blocks`: a nano-batch computes from its output projection through the next layer's KQV in
    one go. `interleaved`: the two take turns after every collective or attention."""
    variants: Mapping[str, str] = field(default_factory=dict[str, str])
    """Kernel variant by op name; the fastest where an op is not named."""


def sequential(graph: OpGraph, cost_model: CostModel, mix: RowMix) -> Schedule:
    """Everything in a row on the whole GPU."""
    return _one_lane("sequential", graph, cost_model, mix, (total_tokens(mix),), "decodes_first")


def nano_only(
    graph: OpGraph, cost_model: CostModel, mix: RowMix, row_order: RowOrder = "interleaved"
) -> Schedule:
    """Two equal nano-batches, still one after the other."""
    sizes = _halves(total_tokens(mix))
    return _one_lane("nano_only", graph, cost_model, mix, sizes, row_order)


def _one_lane(
    name: str,
    graph: OpGraph,
    cost_model: CostModel,
    mix: RowMix,
    sizes: tuple[int, ...],
    row_order: RowOrder,
) -> Schedule:
    batches = split_batches(sizes, row_order, mix)
    num_sms = cost_model.hardware.num_sms
    placed = [
        Placed(macro=macro, batch=batch, stage=0, num_sms=num_sms)
        for macro in range(len(macro_ops(graph)))
        for batch in range(len(batches))
    ]
    return build_schedule(name, cost_model, graph, mix, batches, placed, single_lane=True)


def equal_split(graph: OpGraph, cost_model: CostModel, mix: RowMix, space: SearchSpace) -> Schedule:
    """Two equal nano-batches and two equal parts of the GPU: no tuning at all."""
    choice = equal_split_choice(graph, mix, cost_model.hardware, space)
    return ping_pong(graph, cost_model, mix, choice, name="equal_split")


def equal_split_choice(
    graph: OpGraph, mix: RowMix, hardware: HardwareSpec, space: SearchSpace
) -> PingPongChoice:
    """The equal split as a member of the ping-pong family."""
    compute, memory, network = half_shares(hardware, space)
    return PingPongChoice(
        first_tokens=_halves(total_tokens(mix), space.token_granularity)[0],
        row_order="interleaved" if "interleaved" in space.row_orders else space.row_orders[0],
        compute_sms=compute,
        memory_sms=memory,
        network_sms=network,
        order="interleaved" if graph.tp_degree > 1 else "blocks",
    )


def half_shares(hardware: HardwareSpec, space: SearchSpace) -> tuple[int, int, int]:
    """Compute, memory and network shares closest to half and half."""
    memory = legal_shares(MEMORY, hardware, space)[-1]
    network = [s for s in legal_shares(NETWORK, hardware, space) if s <= memory]
    return hardware.num_sms - memory, memory, max(network, default=memory)


def ping_pong(
    graph: OpGraph,
    cost_model: CostModel,
    mix: RowMix,
    choice: PingPongChoice,
    name: str = "overlapped",
) -> Schedule:
    """Two nano-batches half a period apart: while one computes, the other one does the rest."""
    sizes = choice.first_tokens, total_tokens(mix) - choice.first_tokens
    batches = split_batches(sizes, choice.row_order, mix)
    shares = {
        COMPUTE: choice.compute_sms,
        MEMORY: choice.memory_sms,
        NETWORK: choice.network_sms,
    }
    macros = macro_ops(graph)
    period = _blocks(graph) if choice.order == "blocks" else _interleaved(graph)
    placed = [
        Placed(macro=macro, batch=batch, stage=stage, num_sms=shares[macros[macro].lane])
        for macro, batch, stage in period
    ]
    return build_schedule(name, cost_model, graph, mix, batches, placed, choice.variants)


def _halves(tokens: int, granularity: int = 1) -> tuple[int, int]:
    granularity = granularity if 2 * granularity <= tokens else 1
    first = max(granularity, round(tokens / 2 / granularity) * granularity)
    return first, tokens - first


def _phases(graph: OpGraph) -> tuple[list[int], list[int], list[int]]:
    """Macro ops up to the attention, the output projection's (and its collective), the rest."""
    macros = macro_ops(graph)
    attention = [
        index
        for index, macro in enumerate(macros)
        if macro.ops[0].kind in ("decode_attention", "prefill_attention")
    ]
    before, after = list(range(attention[0])), list(range(attention[-1] + 1, len(macros)))
    cut = 2 if len(after) > 1 and macros[after[1]].lane == NETWORK else 1
    return before + attention, after[:cut], after[cut:]


def _blocks(graph: OpGraph) -> list[tuple[int, int, int]]:
    """(macro, nano-batch, stage): A's tail, next KQV and attention; then the same of B.

    The attention of each is listed where it may start; it runs beside the other one's block,
    whose tail waits for its own attention, of the block before.
    """
    head, output, ffn = _phases(graph)
    period = [(index, 0, 1) for index in output + ffn] + [(index, 0, 0) for index in head]
    period += [(index, 1, 1) for index in output + ffn]
    return period + [(index, 1, 0) for index in head]


def _interleaved(graph: OpGraph) -> list[tuple[int, int, int]]:
    """(macro, nano-batch, stage): o A, kqv B, ffn A, o B, kqv A, ffn B.

    Behind each block its collective or attention runs, beside the next block of the other one.
    """
    head, output, ffn = _phases(graph)
    period = [(index, 0, 1) for index in output] + [(index, 1, 1) for index in head]
    period += [(index, 0, 1) for index in ffn] + [(index, 1, 1) for index in output]
    return period + [(index, 0, 0) for index in head] + [(index, 1, 1) for index in ffn]
