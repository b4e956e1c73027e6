"""Building blocks of schedules: nano-batches, macro ops, and a period written down in order.

A macro op is a chain of ops that nothing else touches in between, such as norm -> KQV -> rotary.
The search places macro ops; a schedule lists their ops. A macro op holds at most one GEMM:

    kqv | decode_attention | prefill_attention | o_proj | (all-reduce) | up_gate | down |
    (all-reduce)

Where rows may take another form (`op_graph.Alternative`), a macro op stands for the ops of each:

    form of the rows  ...            |                   |               |
    all_reduce                       |                   | o_proj        | attn_all_reduce
    all_gather                       |  attn_all_gather  | o_proj_columns| o_all_gather

so that orders of macro ops hold for all forms, and each nano-batch takes one of them.

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
from ..runtime.op_graph import GEMM_KINDS, Dependency, Op, OpGraph, OutputForm, RowMix
from ..runtime.plan import Lane, NanoBatch, NanoOp, Schedule
from ..runtime.schedule import IllegalScheduleError
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
    """Of rows that have the layer's own form; none where only others have something to do."""
    lane: Lane
    needs: tuple[Need, ...]
    others: tuple[tuple[OutputForm, tuple[Op, ...]], ...] = ()
    """What rows of other forms do here, where it is something else."""

    @property
    def name(self) -> str:
        """Its heaviest op: the last GEMM, or simply the last."""
        ops = self.any_ops
        gemms = [op.name for op in ops if op.kind in GEMM_KINDS]
        return (gemms or [op.name for op in ops])[-1]

    @property
    def any_ops(self) -> tuple[Op, ...]:
        """The layer's own, else those of the first other form."""
        return self.ops or self.others[0][1]

    @property
    def all_ops(self) -> tuple[Op, ...]:
        """Those of all forms."""
        return self.ops + tuple(op for _, ops in self.others for op in ops)

    def ops_of(self, form: OutputForm) -> tuple[Op, ...]:
        """What rows of a form do here, perhaps nothing."""
        return dict(self.others).get(form, self.ops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A macro op of one nano-batch at its place in the period."""

    macro: int
    batch: int
    stage: int
    num_sms: int


def lane_of(op: Op) -> Lane:
    """The lane of an op, by its kind."""
    if op.kind == "decode_attention":
        return MEMORY
    return NETWORK if op.kind in ("all_reduce", "all_gather") else COMPUTE


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
    slots = _with_alternatives([_Slot(tuple(group), ()) for group in groups], graph)
    home = {op.name: index for index, slot in enumerate(slots) for op in slot.all_ops}
    macros: list[MacroOp] = []
    for index, slot in enumerate(slots):
        needs = dict.fromkeys(
            Need(macro=home[on.op], layer_distance=on.layer_distance, reach=on.reach)
            for op in slot.all_ops
            for on in op.dependencies
            if home[on.op] != index or on.layer_distance
        )
        lane = lane_of(slot.all_ops[0])
        macros.append(MacroOp(ops=slot.ops, lane=lane, needs=tuple(needs), others=slot.others))
    return tuple(macros)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A macro op before it is known what it needs."""

    ops: tuple[Op, ...]
    others: tuple[tuple[OutputForm, tuple[Op, ...]], ...]

    @property
    def all_ops(self) -> tuple[Op, ...]:
        return self.ops + tuple(op for _, ops in self.others for op in ops)


def _with_alternatives(slots: list[_Slot], graph: OpGraph) -> list[_Slot]:
    """Each chain's ops beside those that they replace, from the last one on.

    Ops that are left over at its start get places of their own, before.
    """
    for chain in graph.alternatives:
        heads = [slot.ops[0].name if slot.ops else "" for slot in slots]
        first, count = heads.index(chain.replaces[0]), len(chain.replaces)
        early = chain.ops[: len(chain.ops) - count]
        beside = zip(slots[first : first + count], chain.ops[len(early) :], strict=True)
        changed = [_Slot(s.ops, (*s.others, (chain.form, (op,)))) for s, op in beside]
        own = [_Slot((), ((chain.form, (op,)),)) for op in early]
        slots = [*slots[:first], *own, *changed, *slots[first + count :]]
    return slots


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
    forms: Sequence[OutputForm] = (),
) -> Schedule:
    """Write down one period, each op with its cheapest variant unless `variants` names one.

    `forms` are those of the nano-batches, by default the layer's own. Cheapest at the batch's price
    of a joule, unless `price` is another: where the power cap does not bind, the fastest. A variant
    that cannot run on the op's share is not taken. What could run at once on too many SMs is put in
    order with `after`.

    Raises:
        IllegalScheduleError: no order helps, or an op has no variant that goes without SMs.
    """
    macros, chosen = macro_ops(graph), variants or {}
    price = price or cost_model.price(graph, mix)
    num_sms = cost_model.hardware.num_sms
    nano_ops: list[NanoOp] = []
    for place in placed:
        macro, batch = macros[place.macro], batches[place.batch]
        rows = batch_mix(batch, mix)
        is_whole = macro.lane == MEMORY and place.num_sms == num_sms
        for op in macro.ops_of(forms[place.batch] if forms else graph.forms[0]):
            if not cost_model.variants(op, place.num_sms):
                raise IllegalScheduleError(f"no variant of {op.name} goes without SMs")
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
