"""Building blocks of schedules: nano-batches, macro ops, and a period written down in order.

A macro op is a chain of ops that nothing else touches in between, such as norm -> KQV -> rotary.
The search places macro ops; a schedule lists their ops. A macro op holds at most one GEMM:

    kqv | decode_attention | prefill_attention | o_proj | (all-reduce) | up_gate | down |
    (all-reduce)

Lanes: `compute` for everything that is neither decode attention (`memory`) nor a collective
(`network`). Decode attention on all SMs is on the compute lane too: beside it nothing could run
but what takes no SMs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from ..runtime.legality import serialize_conflicts
from ..runtime.op_graph import GEMM_KINDS, Dependency, Op, OpGraph, RowMix
from ..runtime.plan import Lane, NanoBatch, NanoOp, Schedule
from ..search_spaces.schema import HardwareSpec, RowOrder, SearchSpace
from .cost_model import CostModel
from .power_model import Price

COMPUTE, MEMORY, NETWORK = "compute", "memory", "network"


def has_sm_free(graph: OpGraph, cost_model: CostModel) -> bool:
    """Whether the collectives of a layer can go without SMs, as far as the profile knows."""
    collectives = [op for op in graph.layer if op.kind == "all_reduce"]
    return bool(collectives) and all(cost_model.variants(op, 0) for op in collectives)


def legal_shares(
    lane: Lane, hardware: HardwareSpec, space: SearchSpace, is_sm_free: bool = False
) -> list[int]:
    """Shares of the space that this GPU can make, for a lane that runs beside others.

    At most half of the SMs beside the compute lane, and the half, rounded to the granularity,
    where the space offers none; at least half on the compute lane, complements included. The
    network lane may take 0 where its collectives can go without SMs.
    """
    total, step = hardware.num_sms, hardware.sm_granularity
    offered = space.network_sm_shares if lane == NETWORK else space.sm_shares
    legal = [s for s in offered if s < total and (s % step == 0 or (total - s) % step == 0)]
    side = sorted({s for s in legal if 2 * s <= total} or {max(step, total // 2 // step * step)})
    if lane == NETWORK and is_sm_free:
        return [0, *side]
    if lane != COMPUTE:
        return side
    return sorted({s for s in legal if 2 * s >= total} | {total - s for s in side})


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A macro op waits for another one of this or the previous layer."""

    macro: int
    """Position in the list of macro ops."""
    layer_distance: int
    reach: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MacroOp:
    """Ops that run back to back on one lane and one share."""

    ops: tuple[Op, ...]
    lane: Lane
    needs: tuple[Need, ...]

    @property
    def name(self) -> str:
        """Its heaviest op: the last GEMM, or simply the last."""
        gemms = [op.name for op in self.ops if op.kind in GEMM_KINDS]
        return (gemms or [op.name for op in self.ops])[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A macro op of one nano-batch at its place in the period."""

    macro: int
    batch: int
    stage: int
    num_sms: int


def lane_of(op: Op) -> Lane:
    """The lane of an op, by its kind."""
    return {"decode_attention": MEMORY, "all_reduce": NETWORK}.get(op.kind, COMPUTE)


def _extends(group: Sequence[Op], op: Op, graph: OpGraph) -> bool:
    """Whether an op can be run as one with the group before it."""
    last = group[-1]
    consumers = [
        other.name
        for other in graph.layer
        for dependency in other.dependencies
        if dependency == Dependency(last.name, 0, dependency.reach)
    ]
    gemms = [member for member in (*group, op) if member.kind in GEMM_KINDS]
    return (
        lane_of(op) == lane_of(last)
        and op.dependencies == (Dependency(last.name),)
        and consumers == [op.name]
        and len(gemms) <= 1
    )


@cache
def macro_ops(graph: OpGraph) -> tuple[MacroOp, ...]:
    """The layer's ops, grouped; in sequential order."""
    groups: list[list[Op]] = []
    for op in graph.layer:
        if groups and _extends(groups[-1], op, graph):
            groups[-1].append(op)
        else:
            groups.append([op])
    home = {op.name: index for index, group in enumerate(groups) for op in group}
    macros: list[MacroOp] = []
    for index, group in enumerate(groups):
        needs = [
            Need(macro=home[on.op], layer_distance=on.layer_distance, reach=on.reach)
            for op in group
            for on in op.dependencies
            if home[on.op] != index or on.layer_distance
        ]
        macros.append(MacroOp(ops=tuple(group), lane=lane_of(group[0]), needs=tuple(needs)))
    return tuple(macros)


def split_batches(sizes: Sequence[int], row_order: RowOrder, mix: RowMix) -> tuple[NanoBatch, ...]:
    """Nano-batches of these sizes; empty ones are left out.

    `decodes_first` fills the first nano-batches with the decode rows, `interleaved` gives each
    its proportional part.
    """
    sizes = [size for size in sizes if size]
    ends = list(accumulate(sizes))
    decodes, total = round(mix.decode_tokens), ends[-1]

    def decodes_before(row: int) -> int:
        return min(row, decodes) if row_order == "decodes_first" else round(decodes * row / total)

    return tuple(
        NanoBatch(
            tokens=(end - size, end),
            decode_tokens=decodes_before(end) - decodes_before(end - size),
        )
        for size, end in zip(sizes, ends, strict=True)
    )


def batch_mix(batch: NanoBatch, mix: RowMix) -> RowMix:
    """What one nano-batch of the mix holds."""
    return replace(
        mix,
        decode_tokens=batch.decode_tokens,
        prefill_tokens=batch.num_tokens - batch.decode_tokens,
    )


def build_schedule(
    name: str,
    cost_model: CostModel,
    graph: OpGraph,
    mix: RowMix,
    batches: tuple[NanoBatch, ...],
    placed: Sequence[Placed],
    variants: Mapping[str, str] | None = None,
    single_lane: bool = False,
    price: Price | None = None,
) -> Schedule:
    """Write down one period, each op with its cheapest variant unless `variants` names one.

    Cheapest at the batch's price of a joule, unless `price` is another: where the power cap does
    not bind, the fastest. A variant that cannot run on the op's share is not taken. What could run
    at once on too many SMs is put in order with `after`.
    """
    macros, chosen = macro_ops(graph), variants or {}
    price = price or cost_model.price(graph, mix)
    num_sms = cost_model.hardware.num_sms
    nano_ops: list[NanoOp] = []
    for place in placed:
        macro, batch = macros[place.macro], batches[place.batch]
        rows = batch_mix(batch, mix)
        is_whole = macro.lane == MEMORY and place.num_sms == num_sms
        for op in macro.ops:
            variant = chosen.get(op.name)
            if variant is None or variant not in cost_model.variants(op, place.num_sms):
                variant = cost_model.cheapest(op, rows, (place.num_sms,), price)[0]
            nano_ops.append(
                NanoOp(
                    op=op.name,
                    tokens=batch.tokens,
                    lane=COMPUTE if single_lane or is_whole else macro.lane,
                    num_sms=place.num_sms,
                    variant=variant,
                    stage=place.stage,
                )
            )
    schedule = Schedule(name=name, nano_batches=batches, nano_ops=tuple(nano_ops))
    return serialize_conflicts(schedule, graph, num_sms, cost_model.hardware.sm_granularity)


def total_tokens(mix: RowMix) -> int:
    """Rows of the dense batch, as a whole number."""
    return round(mix.tokens)
