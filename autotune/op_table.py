"""What each nano-op of a schedule costs and reaches, and how ops gain from more SMs.

From schedules and a cost model to rows of a table and curves of a figure.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from ..profiler.profile import Profile
from ..runtime.op_graph import DENSE_GEMM_KINDS, Op, OpGraph, OpKind, RowMix
from ..runtime.op_shapes import shape_numbers
from ..runtime.plan import Schedule
from ..runtime.schedule import row_mix
from ..search_spaces.schema import HardwareSpec
from .copy_transport import ops_as_run
from .cost_model import CostModel
from .figures import SHORT, Chosen, Curve
from .roofline_figure import RoofPoint
from .trace import Bar


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRow:
    """One nano-op of one layer."""

    name: str
    op: str
    kind: str
    resource: str
    tokens: tuple[int, int]
    lane: str
    num_sms: int
    variant: str
    alone_us: float
    """Alone on its SMs."""
    beside_us: float
    """Beside its neighbours, mean over the steady layers."""
    throughput: float
    """While it runs beside its neighbours."""
    unit: str
    source: str
    flops: float = 0.0
    memory_bytes: float = 0.0
    """Of device memory."""
    joules: float = 0.0
    """Alone on its SMs, one GPU; 0 without an energy model."""
    measured_us: float = 0.0
    """In the plan as it ran on the GPU, mean over the layers; 0 where it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPeak:
    """The FLOP/s that `percent_of_optimal` is measured against, one GPU."""

    flops_per_s: float
    source: str
    """Where it is from, in words."""


def gemm_peak(profile: Profile | None, hardware: HardwareSpec, dtype: str) -> GemmPeak:
    """What the card keeps up for seconds; failing that its best short GEMM, or the datasheet."""
    header = profile.header if profile else {}
    if "sustained_gemm_flops_per_s" in header:
        return GemmPeak(
            flops_per_s=float(header["sustained_gemm_flops_per_s"]),
            source=f"measured sustained GEMM ({_readable(header.get('sustained_gemm', ''))})",
        )
    best, best_name = 0.0, ""
    for row in profile.usable_rows if profile else ():
        point = row.point
        is_gemm = point.kind in DENSE_GEMM_KINDS
        if is_gemm and point.num_sms == hardware.num_sms and row.median_us > 0:
            n, k = shape_numbers(point.shape)
            flops_per_s = 2.0 * n * k * point.tokens / (row.median_us * 1e-6)
            if flops_per_s > best:
                best = flops_per_s
                best_name = f"{point.variant}, {point.tokens} x {n} x {k}"
    if best:
        return GemmPeak(flops_per_s=best, source=f"measured GEMM of 30 ms ({best_name})")
    return GemmPeak(flops_per_s=hardware.peak(dtype), source="datasheet peak")


def _readable(case: str) -> str:
    """The profile's words, with `7.4e+14` as 740 TFLOP/s."""
    return re.sub(
        r"\d\.\d+e\+1\d", lambda found: f"{float(found[0]) / 1e12:.0f} TFLOP/s", str(case)
    )


def throughput(op: Op, mix: RowMix, us: float) -> tuple[float, str]:
    """What the op moves or computes per second in its own unit."""
    if us <= 0:
        return 0.0, "TFLOP/s"
    if op.resource == "network":
        return op.link_bytes(mix) / us * 1e-3, "GB/s"
    if op.resource == "memory":
        return op.memory_bytes(mix) / us * 1e-6, "TB/s"
    return op.flops(mix) / us * 1e-6, "TFLOP/s"


def op_rows(
    schedule: Schedule,
    graph: OpGraph,
    cost_model: CostModel,
    mix: RowMix,
    bars: Iterable[Bar],
    measured: Iterable[Bar] = (),
) -> tuple[OpRow, ...]:
    """One row for each nano-op, in issue order.

    Args:
        schedule: the schedule.
        graph: its op graph.
        cost_model: prices each nano-op alone.
        mix: the whole dense batch, for the mean contexts.
        bars: the schedule played out over some layers.
        measured: the same as it ran on the GPU, where it did.
    """
    durations, measured_us = _mean_us(bars), _mean_us(measured)
    rows: list[OpRow] = []
    ops = ops_as_run(schedule, graph)
    for name, nano_op, op in zip(schedule.ids, schedule.nano_ops, ops, strict=True):
        part = _part(schedule, nano_op.tokens, mix)
        alone = cost_model.estimate(op, part, nano_op.num_sms, nano_op.variant)
        beside_us = durations.get(name, alone.us)
        reached, unit = throughput(op, part, beside_us)
        rows.append(
            OpRow(
                name=name,
                op=op.name,
                kind=op.kind,
                resource=op.resource,
                tokens=nano_op.tokens,
                lane=nano_op.lane,
                num_sms=nano_op.num_sms,
                variant=nano_op.variant,
                alone_us=alone.us,
                beside_us=beside_us,
                throughput=reached,
                unit=unit,
                source=alone.source,
                flops=op.flops(part),
                memory_bytes=op.memory_bytes(part),
                joules=alone.joules,
                measured_us=measured_us.get(name, 0.0),
            )
        )
    return tuple(rows)


def _mean_us(bars: Iterable[Bar]) -> dict[str, float]:
    """Mean duration of each nano-op over its layers."""
    durations: dict[str, list[float]] = defaultdict(list)
    for bar in bars:
        durations[bar.name].append(bar.duration_us)
    return {name: sum(played) / len(played) for name, played in durations.items()}


def roof_points(rows: Iterable[OpRow]) -> tuple[RoofPoint, ...]:
    """The ops of a schedule that have a place on a roofline, nano-ops of one op together."""
    found: dict[str, RoofPoint] = {}
    for row in rows:
        if row.resource == "network" or row.source == "roofline":
            continue  # a roofline says nothing about times that are from one
        held = found.get(row.op)
        found[row.op] = RoofPoint(
            name=SHORT.get(row.op, row.op.replace("_", " ")),
            kind=cast(OpKind, row.kind),
            flops=row.flops + (held.flops if held else 0.0),
            memory_bytes=row.memory_bytes + (held.memory_bytes if held else 0.0),
            us=row.beside_us + (held.us if held else 0.0),
        )
    return tuple(found.values())


def curves(
    graph: OpGraph, cost_model: CostModel, mix: RowMix, schedules: Mapping[str, Schedule]
) -> tuple[Curve, ...]:
    """Throughput of each distinct layer op at every SM share, over the rows of the whole batch.

    Args:
        graph: the op graph; ops of one kind and shape share a curve.
        cost_model: prices each op at each share.
        mix: the whole dense batch.
        schedules: whose choices to mark, by the name shown in the legend.
    """
    distinct: dict[tuple[str, str], list[Op]] = defaultdict(list)
    used = {nano_op.op for schedule in schedules.values() for nano_op in schedule.nano_ops}
    for op in graph.all_ops:
        if op.rows(mix) > 0 and (op in graph.layer or op.name in used):
            distinct[op.kind, op.shape].append(op)
    drawn: list[Curve] = []
    for ops in distinct.values():
        op = ops[0]
        shares = _shares(op, cost_model)
        estimates = [cost_model.best(op, mix, share)[1] for share in shares]
        reached = tuple(throughput(op, mix, estimate.us)[0] for estimate in estimates)
        drawn.append(
            Curve(
                op=_curve_name(ops),
                kind=op.kind,
                unit=throughput(op, mix, 1.0)[1],
                num_sms=tuple(shares),
                throughput=reached,
                is_measured=tuple(estimate.source == "measured" for estimate in estimates),
                is_roofline=all(estimate.source == "roofline" for estimate in estimates),
                chosen=_chosen(ops, cost_model, mix, schedules),
            )
        )
    return tuple(drawn)


def _shares(op: Op, cost_model: CostModel) -> list[int]:
    """Shares that the profile has of this kind of op, else every eighth."""
    rows = cost_model.profile.usable_rows if cost_model.profile else ()
    measured = {row.point.num_sms for row in rows if row.point.kind == op.kind} - {0}
    num_sms = cost_model.hardware.num_sms
    return sorted({*(measured or range(8, num_sms, 8)), num_sms})


def _chosen(
    ops: list[Op], cost_model: CostModel, mix: RowMix, schedules: Mapping[str, Schedule]
) -> tuple[Chosen, ...]:
    by_name = {op.name: op for op in ops}
    marks: dict[tuple[str, int], Chosen] = {}
    for title, schedule in schedules.items():
        for nano_op in schedule.nano_ops:
            if nano_op.op not in by_name or nano_op.num_sms == 0:
                continue  # what takes no SMs has no place on a curve over SMs
            op, part = by_name[nano_op.op], _part(schedule, nano_op.tokens, mix)
            us = cost_model.estimate(op, part, nano_op.num_sms, nano_op.variant).us
            reached = throughput(op, part, us)[0]
            known = marks.get((title, nano_op.num_sms))
            if us > 0 and (known is None or reached > known.throughput):
                marks[title, nano_op.num_sms] = Chosen(
                    num_sms=nano_op.num_sms, throughput=reached, schedule=title
                )
    return tuple(marks.values())


def _curve_name(ops: list[Op]) -> str:
    names = {"norm": "norm", "gemm": ", ".join(op.name for op in ops)}
    names |= {"all_reduce": "all-reduce", "all_gather": "all-gather"}
    return names.get(ops[0].kind, ops[0].name).replace("_", " ")


def _part(schedule: Schedule, tokens: tuple[int, int], mix: RowMix) -> RowMix:
    return row_mix(schedule, tokens, mix.decode_context_tokens, mix.prefill_context_tokens)
