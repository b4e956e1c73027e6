"""What one rank's GPU gives a schedule: SM partitions from one split, and process groups per lane.

`device_resources` is the CUDA counterpart of the CPU's plain process groups; verification, the
profiler and the engine all take their partitions from here, so that there is one split per process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..search_spaces.schema import HardwareSpec
from .executor import Resources
from .kernels.collectives import make_groups
from .kernels.copy_engine import CopyEngine
from .kernels.gather_buffer import GatherBuffers
from .launch import RankContext
from .op_graph import OpGraph
from .partition_layout import GroupRange, Slot, concurrent_slots, layout
from .plan import Schedule
from .schedule import concurrent_pairs
from .sm_partition import SmPartitions

LANES = ("compute", "memory", "network")


def device_resources(
    ctx: RankContext, graph: OpGraph, hardware: HardwareSpec, schedules: Sequence[Schedule]
) -> Resources:
    """Audited partitions and groups for some schedules on this rank.

    Raises:
        PartitionError: a partition is not what was asked for.
        ValueError: two of the schedules place the same share differently; ask for them apart.
    """
    groups = lane_groups(ctx, schedules)  # communicators come before partitions
    if "partitions" not in ctx.state:
        ctx.state["partitions"] = SmPartitions(hardware.num_sms, hardware.sm_granularity)
    partitions: SmPartitions = ctx.state["partitions"]
    slots: dict[Slot, GroupRange] = {}
    concurrent: set[tuple[Slot, Slot]] = set()
    for schedule in schedules:
        pairs = concurrent_pairs(schedule, graph)
        placed = layout(schedule, pairs, hardware.num_sms, partitions.split)
        for slot, groups_of_slot in placed.items():
            if slots.setdefault(slot, groups_of_slot) != groups_of_slot:
                raise ValueError(f"lane {slot[0]} on {slot[1]} SMs is placed in two ways")
        concurrent |= concurrent_slots(schedule, pairs)
    view = partitions.view(slots)
    audited: set[Any] = ctx.state.setdefault("audited", set())
    key = (frozenset(slots.items()), frozenset(concurrent))
    if key not in audited:
        view.audit(concurrent)
        audited.add(key)
    return Resources(partitions=view, groups=groups)


def lane_groups(ctx: RankContext, schedules: Sequence[Schedule]) -> Mapping[str, Any] | None:
    """What the collectives of every lane need, kept for later calls; None with one rank."""
    if ctx.world_size == 1:
        return None
    groups: dict[str, Any] = ctx.state.setdefault("lane_groups", {})
    engine: CopyEngine = ctx.state.setdefault("copy_engine", CopyEngine())
    gathered: GatherBuffers = ctx.state.setdefault("gathered", GatherBuffers())
    named = (lane for schedule in schedules for lane in schedule.lanes)
    for lane in dict.fromkeys((*LANES, *named)):
        if lane not in groups:
            groups[lane] = make_groups(ctx.world_size, engine, gathered)
    return groups
