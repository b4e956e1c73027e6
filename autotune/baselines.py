"""Schedules that need no search: what every tuned plan is raced against.

sequential   one nano-batch, one lane, the best variant of each op on all SMs; where the power cap
             binds, on the share on which its joules and time cost least, the other SMs idle; a
             collective takes copy engines where that is faster, the longer norm behind included;
             the attention's output is joined in the form that is faster
nano_only    two nano-batches, one lane, each in the form that is faster: what splitting alone costs
equal_split  two equal nano-batches, the SMs halved between compute and the rest
ping_pong    the family around it: one nano-batch computes while the other one's attention and
             collectives run; the refinement moves within this family. With collectives that take
             no SMs it has two members more: attention alone gives up SMs, or nothing does and all
             computation, attention included, alternates on the whole GPU
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

from ..runtime.op_graph import Op, OpGraph, OutputForm, RowMix
from ..runtime.plan import Schedule
from ..search_spaces.schema import HardwareSpec, RowOrder, SearchSpace
from .copy_transport import norm_behind
from .cost_model import PRICE_ROUNDS, CostModel
from .patterns import (
    COMPUTE,
    MEMORY,
    NETWORK,
    Placed,
    batch_mix,
    build_schedule,
    legal_shares,
    macro_ops,
    split_batches,
    total_tokens,
)
from .periods import PERIODS
from .periods import PingPongOrder as PingPongOrder
from .power_model import FASTEST, Price
from .simulator import SYNC_US, Simulator, predict


@dataclass(frozen=True, slots=True, kw_only=True)
class PingPongChoice:
    """One member of the ping-pong family."""

    first_tokens: int
    """Rows of the first nano-batch."""
    row_order: RowOrder
    compute_sms: int
    memory_sms: int
    """All SMs: decode attention runs on the compute lane, beside collectives only."""
    network_sms: int
    """0: collectives take no SMs, so that the compute lane may have all of them."""
    order: PingPongOrder = "blocks"
    """`blocks`: a nano-batch computes from its output projection through the next layer's KQV in
    one go. `interleaved`: the two take turns after every collective or attention. `alternating`:
    after every collective, for decode attention on the compute lane."""
    variants: Mapping[str, str] = field(default_factory=dict[str, str])
    """Kernel variant by op name; the fastest where an op is not named."""
    forms: tuple[OutputForm, OutputForm] = ("all_reduce", "all_reduce")
    """How the two join the attention's output."""


def sequential(graph: OpGraph, cost_model: CostModel, mix: RowMix) -> Schedule:
    """Everything in a row, each op with the whole GPU to itself; the faster form."""
    return min(
        sequential_forms(graph, cost_model, mix).values(),
        key=lambda schedule: predict(schedule, graph, cost_model, mix).period_us,
    )


def sequential_forms(
    graph: OpGraph, cost_model: CostModel, mix: RowMix
) -> dict[OutputForm, Schedule]:
    """The best sequential schedule of each form."""
    sizes = (total_tokens(mix),)
    return {
        form: _one_lane("sequential", graph, cost_model, mix, sizes, "decodes_first", (form,))
        for form in graph.forms
    }


def nano_only(
    graph: OpGraph, cost_model: CostModel, mix: RowMix, row_order: RowOrder = "interleaved"
) -> Schedule:
    """Two equal nano-batches, still one after the other; the fastest forms."""
    sizes = _halves(total_tokens(mix))
    found = [
        _one_lane("nano_only", graph, cost_model, mix, sizes, row_order, forms)
        for forms in product(graph.forms, repeat=2)
    ]
    return min(found, key=lambda s: predict(s, graph, cost_model, mix).period_us)


def _one_lane(
    name: str,
    graph: OpGraph,
    cost_model: CostModel,
    mix: RowMix,
    sizes: tuple[int, ...],
    row_order: RowOrder,
    forms: tuple[OutputForm, ...],
) -> Schedule:
    """The fastest kernels, then those that the price of a joule favours, and so on; the best."""
    batches = split_batches(sizes, row_order, mix)
    price, found = FASTEST, list[tuple[float, Schedule]]()
    for _ in range(1 + PRICE_ROUNDS):
        placed = [
            Placed(
                macro=index,
                batch=batch,
                stage=0,
                num_sms=_share(ops, graph, cost_model, batch_mix(held, mix), price),
            )
            for index, macro in enumerate(macro_ops(graph))
            for batch, held in enumerate(batches)
            if (ops := macro.ops_of(forms[batch]))
        ]
        schedule = build_schedule(
            name,
            cost_model,
            graph,
            mix,
            batches,
            placed,
            single_lane=True,
            price=price,
            forms=forms,
        )
        found.append((predict(schedule, graph, cost_model, mix).period_us, schedule))
        before, price = price, Simulator(schedule, graph, cost_model, mix).price()
        if price == before:
            break
    return min(found, key=lambda pair: pair[0])[1]


def _share(
    ops: tuple[Op, ...], graph: OpGraph, cost_model: CostModel, rows: RowMix, price: Price
) -> int:
    """All SMs, none for some collectives, fewer where the joules saved are worth the time."""
    op, num_sms = ops[0], cost_model.hardware.num_sms
    if op.resource == "network" or price == FASTEST:
        return _whole_share(op, graph, cost_model, rows)

    def cost(share: int) -> float:
        sync_us = 0.0 if share == num_sms else 2 * SYNC_US  # to another stream and back
        costs = [cost_model.cheapest(op, rows, (share,), price)[2] for op in ops]
        return sum(costs) + sync_us

    heaviest = max(ops, key=lambda op: op.flops(rows))
    return min(reversed(cost_model.shares_of(heaviest)), key=cost)


def _whole_share(op: Op, graph: OpGraph, cost_model: CostModel, rows: RowMix) -> int:
    """All SMs, or 0 for a collective that is faster on none, the sum in its norm included."""
    num_sms = cost_model.hardware.num_sms
    if op.resource != "network" or not cost_model.variants(op, 0):
        return num_sms
    is_summed = op.kind == "all_reduce"  # a gather leaves nothing to the norm behind it
    norm = norm_behind(op, graph) if is_summed else None
    sum_us = cost_model.sum_us(norm, graph.tp_degree, rows) if norm else 0.0
    free_us = cost_model.best(op, rows, 0)[1].us + sum_us
    return 0 if free_us < cost_model.best(op, rows, num_sms)[1].us else num_sms


def whole_gpu_choice(
    first_tokens: int,
    row_order: RowOrder,
    num_sms: int,
    forms: tuple[OutputForm, OutputForm] = ("all_reduce", "all_reduce"),
) -> PingPongChoice:
    """Ping-pong that gives up no SMs: two nano-batches alternate on all, collectives take none."""
    return PingPongChoice(
        first_tokens=first_tokens,
        row_order=row_order,
        compute_sms=num_sms,
        memory_sms=num_sms,
        network_sms=0,
        order="alternating",
        forms=forms,
    )


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
    """Two nano-batches half a period apart: while one computes, the other one does the rest.

    Raises:
        IllegalScheduleError: the shares find no places, or a collective cannot go without SMs.
    """
    sizes = choice.first_tokens, total_tokens(mix) - choice.first_tokens
    batches = split_batches(sizes, choice.row_order, mix)
    shares = {
        COMPUTE: choice.compute_sms,
        MEMORY: choice.memory_sms,
        NETWORK: choice.network_sms,
    }
    macros = macro_ops(graph)
    period = PERIODS[choice.order](graph, choice.forms)
    placed = [
        Placed(macro=macro, batch=batch, stage=stage, num_sms=shares[macros[macro].lane])
        for macro, batch, stage in period
    ]
    return build_schedule(
        name, cost_model, graph, mix, batches, placed, choice.variants, forms=choice.forms
    )


def _halves(tokens: int, granularity: int = 1) -> tuple[int, int]:
    granularity = granularity if 2 * granularity <= tokens else 1
    first = max(granularity, round(tokens / 2 / granularity) * granularity)
    return first, tokens - first
