"""What the structure MILP chooses from: splits, shares, and the time of each macro op for each.

The candidates are coarser than what is legal, for the solver's sake: at most `MAX_FIRST_SIZES`
places for the boundary of two nano-batches, a few compositions for three and more; on the compute
lane only shares of at least half of the GPU, beside it at most half, and the whole GPU anywhere.
The refinement looks between them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from ..runtime.op_graph import GEMM_KINDS, Op, OpGraph, OutputForm, RowMix
from ..runtime.plan import NanoBatch
from ..search_spaces.schema import HardwareSpec, RowOrder, SearchSpace
from .bounds import power_floor_us
from .copy_transport import norm_behind
from .cost_model import CostModel
from .patterns import (
    COMPUTE,
    NETWORK,
    MacroOp,
    batch_mix,
    has_sm_free,
    lane_of,
    legal_shares,
    macro_ops,
    split_batches,
)
from .simulator import SYNC_US

MAX_FIRST_SIZES = 7
MAX_SHARES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One way to cut the dense batch: sizes (0 for an unused nano-batch) and row order."""

    sizes: tuple[int, ...]
    row_order: RowOrder

    @property
    def num_nano_batches(self) -> int:
        """Nano-batches that hold rows."""
        return sum(size > 0 for size in self.sizes)

    def decode_tokens(self, mix: RowMix) -> list[int]:
        """Decode rows of each nano-batch that holds rows."""
        return [b.decode_tokens for b in split_batches(self.sizes, self.row_order, mix)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Node `after` of layer l waits for node `before` of layer l - `layer_distance`."""

    before: int
    after: int
    layer_distance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """The numbers of one MILP. A node is a macro op of a nano-batch."""

    num_sms: int
    lanes: tuple[str, ...]
    """Lane of each node."""
    shares: tuple[tuple[int, ...], ...]
    """Shares that each node may take."""
    edges: tuple[Edge, ...]
    num_splits: int
    duration_us: dict[tuple[int, int, int], float]
    """(node, split, share) -> us; 0 when the node has no rows, or nothing to do in form 0."""
    floor_us: tuple[float, ...]
    """Least period of each split that the power cap allows."""
    sum_us: dict[tuple[int, int, int], float] = field(
        default_factory=dict[tuple[int, int, int], float]
    )
    """(node, collective's node, split) -> us that the node takes longer when the collective takes
    no SMs and leaves the sum to it."""
    nodes_of_forms: tuple[tuple[int, ...], ...] = ()
    """By nano-batch that may take form 1 instead of 0: nodes that take another time in it."""
    form_us: dict[tuple[int, int, int], float] = field(
        default_factory=dict[tuple[int, int, int], float]
    )
    """`duration_us` in form 1, of those nodes; shares that a node lacks in it are left out."""
    idle_nodes: frozenset[int] = frozenset()
    """Nodes that have nothing to do in form 0."""


def split_candidates(space: SearchSpace, mix: RowMix, least_batches: int = 1) -> tuple[Split, ...]:
    """Splits offered to the MILP, up to `max_nano_batches` nano-batches."""
    total, step, most = round(mix.tokens), space.token_granularity, space.max_nano_batches
    compositions = [(total,)] if least_batches <= 1 else []
    if most >= 2:
        compositions += [(first, total - first) for first in _first_sizes(total, step)]
    for count in range(3, most + 1):
        compositions += _compositions(total, step, count)
    splits: list[Split] = []
    for sizes in compositions:
        padded = sizes + (0,) * (most - len(sizes))
        orders = space.row_orders[:1] if len(sizes) == 1 else space.row_orders
        for order in orders:
            is_mirror = order == "interleaved" and sizes[0] > sizes[-1]
            if len(sizes) != 2 or not is_mirror:
                splits.append(Split(sizes=padded, row_order=order))
    return tuple(splits)


def _first_sizes(total: int, step: int) -> list[int]:
    firsts = list(range(step, total, step)) or [total // 2]
    if len(firsts) <= MAX_FIRST_SIZES:
        return firsts
    picked = {firsts[round((k + 1) * len(firsts) / (MAX_FIRST_SIZES + 1)) - 1] for k in range(7)}
    return sorted(picked)


def _compositions(total: int, step: int, count: int) -> list[tuple[int, ...]]:
    """Equal parts, and those with one part twice as large."""
    found: list[tuple[int, ...]] = []
    for weights in [(1,) * count] + [
        tuple(2 if part == large else 1 for part in range(count)) for large in range(count)
    ]:
        ends = [round(total * sum(weights[:k]) / sum(weights) / step) for k in range(count + 1)]
        sizes = tuple((high - low) * step for low, high in pairwise(ends))
        if min(sizes) > 0 and sum(sizes) == total and sizes not in found:
            found.append(sizes)
    return found


def lane_shares(
    lane: str,
    hardware: HardwareSpec,
    space: SearchSpace,
    wanted: Collection[int] = (),
    is_sm_free: bool = False,
) -> tuple[int, ...]:
    """Shares offered: the largest for compute, the smallest beside it, those wanted, all SMs.

    For collectives also none where they can do without.

    Compute has as many as the lanes beside it, so that complements stay complements.
    """
    legal = legal_shares(lane, hardware, space)
    kept = legal[-MAX_SHARES:] if lane == COMPUTE else legal[:MAX_SHARES]
    free = {0} if lane == NETWORK and is_sm_free else set[int]()
    return tuple(sorted({*free, *kept, *wanted, hardware.num_sms}))


def build_instance(
    graph: OpGraph,
    cost_model: CostModel,
    space: SearchSpace,
    mix: RowMix,
    splits: Sequence[Split],
    wanted: Mapping[str, Collection[int]],
) -> Instance:
    """Look up every duration that the MILP may need.

    Args:
        graph: of one rank.
        cost_model: durations and slowdowns.
        space: shares.
        mix: rows of the dense batch.
        splits: candidates.
        wanted: further shares by lane, e.g. those of the schedule that the solver starts from.
    """
    macros, num_sms = macro_ops(graph), cost_model.hardware.num_sms
    num_batches = len(splits[0].sizes)
    hardware = cost_model.hardware
    is_free = has_sm_free(graph, cost_model)
    shares = {
        m.lane: lane_shares(m.lane, hardware, space, wanted.get(m.lane, ()), is_free)
        for m in macros
    }
    duration_us: dict[tuple[int, int, int], float] = {}
    form_us: dict[tuple[int, int, int], float] = {}
    sum_us: dict[tuple[int, int, int], float] = {}
    sums = _sums(macros, graph) if is_free else {}
    formed = [index for index, macro in enumerate(macros) if macro.others]
    assert len(graph.alternatives) <= 1, "the model has two forms at most"
    floors_us: list[float] = []
    for split_index, split in enumerate(splits):
        held = split_batches(split.sizes, split.row_order, mix)
        floors_us.append(_power_floor_us(held, graph, cost_model, mix))
        batches = iter(held)
        for batch_index, size in enumerate(split.sizes):
            batch = next(batches) if size else None
            for macro_index, macro in enumerate(macros):
                node = batch_index * len(macros) + macro_index
                for share in shares[macro.lane]:
                    key = node, split_index, share
                    own = _macro_us(macro, macro.ops, batch, mix, share, cost_model, graph)
                    assert own is not None, "every share of the list has a variant"
                    duration_us[key] = own
                    for _, ops in macro.others:
                        us = _macro_us(macro, ops, batch, mix, share, cost_model, graph)
                        form_us |= {} if us is None else {key: us}
            for collective, (macro_index, norm) in sums.items():
                first = batch_index * len(macros)
                key = first + macro_index, first + collective, split_index
                rows = batch_mix(batch, mix) if batch else None
                sum_us[key] = cost_model.sum_us(norm, graph.tp_degree, rows) if rows else 0.0
    return Instance(
        num_sms=num_sms,
        lanes=tuple(macro.lane for macro in macros) * num_batches,
        shares=tuple(shares[macro.lane] for macro in macros) * num_batches,
        edges=tuple(_edges(macros, num_batches)),
        num_splits=len(splits),
        duration_us=duration_us,
        floor_us=tuple(floors_us),
        sum_us=sum_us,
        nodes_of_forms=tuple(
            tuple(batch * len(macros) + index for index in formed) for batch in range(num_batches)
        )
        if formed
        else (),
        form_us=form_us,
        idle_nodes=frozenset(
            batch * len(macros) + index
            for batch in range(num_batches)
            for index in formed
            if not macros[index].ops
        ),
    )


def _sums(macros: Sequence[MacroOp], graph: OpGraph) -> dict[int, tuple[int, Op]]:
    """Collective -> (macro op with the norm behind it, the norm)."""
    home = {op.name: index for index, macro in enumerate(macros) for op in macro.ops}
    found: dict[int, tuple[int, Op]] = {}
    for index, macro in enumerate(macros):
        if macro.ops and macro.ops[-1].kind == "all_reduce":
            norm = norm_behind(macro.ops[-1], graph)
            found[index] = home[norm.name], norm
    return found


def _edges(macros: Sequence[MacroOp], num_batches: int) -> list[Edge]:
    edges: list[Edge] = []
    for batch in range(num_batches):
        for macro_index, macro in enumerate(macros):
            for need in macro.needs:
                first = 0 if need.reach == "prefix" else batch
                edges += [
                    Edge(
                        before=producer * len(macros) + need.macro,
                        after=batch * len(macros) + macro_index,
                        layer_distance=need.layer_distance,
                    )
                    for producer in range(first, batch + 1)
                ]
    return edges


def _power_floor_us(
    batches: Sequence[NanoBatch], graph: OpGraph, cost_model: CostModel, mix: RowMix
) -> float:
    """What the power cap allows for one layer; 0 where that is not known from measurements."""
    energy, num_sms = cost_model.energy, cost_model.hardware.num_sms
    if energy is None or cost_model.profile is None:
        return 0.0
    joules = 0.0
    for batch in batches:
        rows = batch_mix(batch, mix)
        joules += min(
            sum(
                max(0.0, cost.joules - energy.static_w * cost.us * 1e-6)
                for op in graph.in_form(form).layer
                for cost in (cost_model.best(op, rows, num_sms)[1],)
            )
            for form in graph.forms
        )
    return power_floor_us(joules, cost_model.hardware, energy)


def _macro_us(
    macro: MacroOp,
    ops: Sequence[Op],
    batch: NanoBatch | None,
    mix: RowMix,
    share: int,
    cost_model: CostModel,
    graph: OpGraph,
) -> float | None:
    """Solo times of the variants that a schedule takes, mean slowdown beside other lanes, one sync.

    None where one of the ops has no variant on that share.
    """
    if any(not cost_model.variants(op, share) for op in ops):
        return None
    if batch is None:
        return 0.0
    rows, total_us, price = batch_mix(batch, mix), 0.0, cost_model.price(graph, mix)
    for op in ops:
        variant, _, _ = cost_model.cheapest(op, rows, (share,), price)
        us = cost_model.estimate(op, rows, share, variant).us
        total_us += us * mean_slowdown(op, share, variant, cost_model, graph, mix)
    is_alone = share == cost_model.hardware.num_sms and macro.lane != NETWORK
    return total_us + (SYNC_US if total_us and not is_alone else 0.0)


def mean_slowdown(
    op: Op, share: int, variant: str, cost_model: CostModel, graph: OpGraph, mix: RowMix
) -> float:
    """Mean slowdown of an op beside a typical op of each other lane; 1 on the whole GPU."""
    rest, price = cost_model.hardware.num_sms - share, cost_model.price(graph, mix)
    if rest <= 0:
        return 1.0
    slowdowns = [
        cost_model.slowdown(
            op, share, other, rest, variant, cost_model.cheapest(other, mix, (rest,), price)[0]
        )
        for other in _typical_ops(graph)
        if lane_of(other) != lane_of(op) and cost_model.variants(other, rest)
    ]
    return sum(slowdowns) / len(slowdowns) if slowdowns else 1.0


@cache
def _typical_ops(graph: OpGraph) -> tuple[Op, ...]:
    """The heaviest GEMM, decode attention, and a collective where there is one."""
    gemms = [op for op in graph.layer if op.kind in GEMM_KINDS]
    heaviest = sorted(gemms, key=lambda op: op.weight_elements)[-1:]
    others = {op.kind: op for op in graph.layer if lane_of(op) != COMPUTE}
    return (*heaviest, *others.values())


def forms_of(graph: OpGraph, is_form_1: Sequence[bool]) -> tuple[OutputForm, ...]:
    """The forms of nano-batches by their names."""
    return tuple(graph.forms[int(is_other)] for is_other in is_form_1)
