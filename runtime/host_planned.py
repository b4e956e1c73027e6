"""Attention variants that plan on the host for given lengths, and schedules without them.

A step that no CUDA graph holds is launched op by op, so that the device waits for the host: on an
H200, llama3-8b was slower so than by a slower schedule with graphs (results/LOG.md). An engine on a
GPU therefore runs other variants in their place, and says so. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .op_graph import OpGraph, OpKind
from .plan import Schedule

HOST_PLANNED = ("flashinfer",)
"""How names of variants start that plan on the host: no CUDA graph of them serves other lengths."""


def host_planned(schedule: Schedule) -> tuple[str, ...]:
    """Variants of a schedule that plan on the host, each once, behind the name of their op."""
    names = (
        f"{nano_op.op} {nano_op.variant}"
        for nano_op in schedule.nano_ops
        if nano_op.variant.startswith(HOST_PLANNED)
    )
    return tuple(dict.fromkeys(names))


def without_host_planned(
    schedule: Schedule, graph: OpGraph, stand_ins: Mapping[OpKind, str]
) -> tuple[Schedule, tuple[str, ...]]:
    """A schedule with other variants in place of those that plan on the host.

    Args:
        schedule: any legal one.
        graph: of the model that it is for.
        stand_ins: by kind of op; kinds without one keep their variants.

    Returns:
        The schedule, the same object where nothing is to be replaced, and a remark for each pair
        of variants.
    """
    remarks: dict[str, None] = {}

    def stand_in(op: str, variant: str) -> str:
        kind = graph.op(op).kind
        if not variant.startswith(HOST_PLANNED) or kind not in stand_ins:
            return variant
        what = f"{kind} {variant} -> {stand_ins[kind]}"
        remarks[f"{what}: it plans on the host, which no CUDA graph holds"] = None
        return stand_ins[kind]

    nano_ops = tuple(
        replace(nano_op, variant=stand_in(nano_op.op, nano_op.variant))
        for nano_op in schedule.nano_ops
    )
    return replace(schedule, nano_ops=nano_ops) if remarks else schedule, tuple(remarks)
