"""Two figures that say how good a plan can get, never mixed.

`lower_bound_us`  what the hardware's peaks allow for this op graph: nothing can beat it
`power_limit_us`  what the power cap allows, an estimate with the error of its energy model
"""

from __future__ import annotations

from dataclasses import dataclass

from ..profiler.profile import EnergyModel
from ..runtime.op_graph import Op, OpGraph, Resource, RowMix
from ..search_spaces.schema import HardwareSpec
from .cost_model import CostModel, logit_mix


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationWork:
    """What one rank must do in one iteration."""

    flops: float
    memory_bytes: float
    link_bytes: float


def iteration_ops(graph: OpGraph, mix: RowMix) -> list[tuple[Op, RowMix, int]]:
    """Every op of an iteration with the rows it works on and how often it runs."""
    logits = logit_mix(mix)
    ops = [(op, mix, 1) for op in graph.prologue]
    ops += [(op, mix, graph.num_layers) for op in graph.layer]
    return ops + [(op, logits, 1) for op in graph.epilogue]


def iteration_work(graph: OpGraph, mix: RowMix) -> IterationWork:
    """All FLOPs, bytes and link bytes, each operand of each op counted once."""
    ops = iteration_ops(graph, mix)
    return IterationWork(
        flops=sum(count * op.flops(rows) for op, rows, count in ops),
        memory_bytes=sum(count * op.memory_bytes(rows) for op, rows, count in ops),
        link_bytes=sum(count * op.link_bytes(rows) for op, rows, count in ops),
    )


def unavoidable_bytes(op: Op, mix: RowMix) -> float:
    """Bytes that must cross device memory: weights once, the keys of decode rows once.

    Activations and the keys of a running prefill may stay in the cache, so they do not count.
    """
    keys = 0.0
    if op.kind == "decode_attention":
        keys = op.kv_elements_per_key * mix.decode_tokens * mix.decode_context_tokens
    return op.dtype_bytes * (op.weight_elements + keys)


def lower_bound_us(
    graph: OpGraph, mix: RowMix, hardware: HardwareSpec, dtype: str
) -> tuple[float, Resource]:
    """Largest of compute, memory and network time of an iteration, in us, and which it is.

    Of the forms that rows may have, each resource has the cheaper one.

    Source: arXiv 2408.12757 section 3, on this mix instead of a full memory.
    """
    works = [iteration_ops(graph.in_form(form), mix) for form in graph.forms]
    flops = min(
        sum(n * op.flops(rows) for op, rows, n in ops if op.kind != "all_reduce") for ops in works
    )
    moved = min(sum(n * unavoidable_bytes(op, rows) for op, rows, n in ops) for ops in works)
    link_bytes = min(sum(n * op.link_bytes(rows) for op, rows, n in ops) for ops in works)
    times: list[tuple[float, Resource]] = [
        (1e6 * flops / hardware.peak(dtype), "compute"),
        (1e6 * moved / hardware.memory_bytes_per_s, "memory"),
    ]
    if link_bytes:
        times.append((1e6 * link_bytes / hardware.link_bytes_per_s, "network"))
    return max(times)


def power_limit_us(
    graph: OpGraph, mix: RowMix, hardware: HardwareSpec, energy: EnergyModel | None
) -> float:
    """Dynamic joules of an iteration over the watts left for them under the cap, in us.

    Of fused ops: what an unfused variant moves through scratch buffers is not counted. 0 without
    an energy model.

    Raises:
        ValueError: static power alone reaches the cap.
    """
    if energy is None:
        return 0.0
    headroom_w = hardware.power_cap_w - energy.static_w
    if headroom_w <= 0:
        raise ValueError(
            f"`power_cap_w` must exceed the static power, but got {hardware.power_cap_w} W for "
            f"{hardware.name} and static_w={energy.static_w}; check the profile's energy fit"
        )
    work = iteration_work(graph, mix)
    joules = energy.dynamic_joules(work.flops, work.memory_bytes, work.link_bytes)
    return 1e6 * joules / headroom_w


def power_limit_of(
    graph: OpGraph, mix: RowMix, cost_model: CostModel, clock_mhz: float = 0.0
) -> float:
    """What the cap allows an iteration of the kernels at hand, in us.

    Each op on the share and in the variant of the fewest dynamic joules, in the form that needs
    fewer. That of FLOPs and bytes (`power_limit_us`) where nothing was measured; 0 without an
    energy model.

    Args:
        graph: of one rank.
        mix: rows of the dense batch.
        cost_model: of the kernels.
        clock_mhz: of the plan that the limit is for, measured or predicted: joules fall with it.
            0: the one that the batch settles at in sequence.
    """
    power = cost_model.power
    floor_us = power_limit_us(graph, mix, cost_model.hardware, cost_model.energy)
    if power is None or cost_model.profile is None:
        return floor_us
    clock = cost_model.price(graph, mix).clock
    if clock_mhz > 0:
        clock = min(1.0, clock_mhz / power.max_clock_mhz)

    def least_joules(op: Op, rows: RowMix) -> float:
        return min(
            power.load(op, rows, share, name, cost_model.estimate(op, rows, share, name).us).joules
            for share in cost_model.shares_of(op)
            for name in cost_model.variants(op, share)
        )

    joules = min(
        sum(n * least_joules(op, rows) for op, rows, n in iteration_ops(graph.in_form(form), mix))
        for form in graph.forms
    )
    return 1e6 * power.joules_at(joules, clock) / power.headroom_w


def power_floor_us(dynamic_joules: float, hardware: HardwareSpec, energy: EnergyModel) -> float:
    """Least time, in us, for so many dynamic joules of one GPU that is worth believing.

    The power limit less the error of its model (at least 10 %, as dynamic joules fall with the
    clocks). The structure MILP looks at no period below it.
    """
    error = max(0.1, energy.relative_error)
    return 1e6 * (1 - error) * dynamic_joules / max(1.0, hardware.power_cap_w - energy.static_w)


def what_binds(lower: tuple[float, Resource], power_us: float) -> str:
    """`power` when its limit is above the lower bound, else the bound's resource."""
    return "power" if power_us > lower[0] else lower[1]
