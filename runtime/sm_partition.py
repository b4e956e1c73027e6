"""SM partitions by CUDA green contexts: the only file that calls the driver for them.

One `cuDevSmResourceSplitByCount` makes all groups; every partition is a green context over some of
them, so partitions over different groups are disjoint by construction (contexts from separate
splits may share SMs). `audit` proves it on the device by reading %smid, eagerly and in a graph.

Device properties still report the whole GPU inside a partition: kernels are told their share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .cuda_driver import checked, driver
from .partition_layout import GroupRange, Slot, SmSplit


class PartitionError(RuntimeError):
    """A partition cannot be made, or is not what was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionAudit:
    """SM ids that a partition really ran on."""

    slot: Slot
    sm_ids: frozenset[int]


class PartitionView:
    """The partitions of one schedule (or one sweep): a stream for each (lane, share)."""

    def __init__(self, owner: SmPartitions, slots: Mapping[Slot, GroupRange]) -> None:
        self._owner = owner
        self._streams = {slot: owner.stream_of(groups) for slot, groups in slots.items()}

    def stream(self, lane: str, num_sms: int) -> torch.cuda.Stream:
        """The stream of a slot; a share of all SMs, or of none, gets a plain stream of its lane.

        Raises:
            PartitionError: the slot was not laid out; names it and the known ones.
        """
        found = self._streams.get((lane, num_sms))
        if found is not None:
            return found
        if num_sms not in (0, self._owner.num_sms):
            known = ", ".join(f"{lane}:{share}" for lane, share in sorted(self._streams))
            raise PartitionError(
                f"no partition of {num_sms} SMs on lane {lane}; known: {known or 'none'}"
            )
        return self._owner.whole_stream(lane)

    def audit(self, concurrent: Iterable[tuple[Slot, Slot]] = ()) -> tuple[PartitionAudit, ...]:
        """Run a probe on every partition and compare the SMs it saw with what was asked.

        Args:
            concurrent: pairs of slots that can run at the same time.

        Raises:
            PartitionError: a share differs from what was asked, or two that can run at once
                overlap; names both.
        """
        from .kernels.sm_probe import seen_sm_ids

        audits = {
            slot: PartitionAudit(slot=slot, sm_ids=seen_sm_ids(stream, self._owner.num_sms))
            for slot, stream in self._streams.items()
        }
        check_audits(audits, concurrent)
        return tuple(audits.values())


def check_audits(
    audits: Mapping[Slot, PartitionAudit], concurrent: Iterable[tuple[Slot, Slot]]
) -> None:
    """Refuse shares that are not what was asked, or that overlap and can run at once.

    Raises:
        PartitionError: names the slots and the SMs.
    """
    for slot, audit in audits.items():
        if len(audit.sm_ids) != slot[1]:
            raise PartitionError(
                f"lane {slot[0]} asked for {slot[1]} SMs but ran on {len(audit.sm_ids)}: "
                f"{sorted(audit.sm_ids)}"
            )
    for a, b in concurrent:
        if a in audits and b in audits and audits[a].sm_ids & audits[b].sm_ids:
            both = sorted(audits[a].sm_ids & audits[b].sm_ids)
            raise PartitionError(
                f"lane {a[0]} on {a[1]} SMs and lane {b[0]} on {b[1]} SMs can run at once but "
                f"share SMs {both}"
            )


class SmPartitions:
    """Owns one split of the current device and the green contexts made from it.

    Create communicators before partitions.
    """

    def __init__(self, num_sms: int, granularity: int) -> None:
        self.num_sms = num_sms
        self._granularity = granularity
        self._contexts: list[Any] = []
        self._by_range: dict[GroupRange, torch.cuda.Stream] = {}
        self._whole: dict[str, torch.cuda.Stream] = {}
        self._groups, self._remainder = self._split()
        self.split = SmSplit(
            granularity=granularity,
            num_groups=len(self._groups),
            remainder=num_sms - granularity * len(self._groups),
        )

    def _split(self) -> tuple[list[Any], Any]:
        api = driver()
        torch.cuda.init()
        device = checked(api.cuDeviceGet(torch.cuda.current_device()), "cuDeviceGet")
        self._device = device
        whole = checked(
            api.cuDeviceGetDevResource(device, api.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM),
            "cuDeviceGetDevResource",
        )
        if whole.sm.smCount != self.num_sms:
            raise PartitionError(
                f"the hardware spec says {self.num_sms} SMs, the device has {whole.sm.smCount}: "
                "choose the spec of this GPU with --gpu"
            )
        count = self.num_sms // self._granularity
        groups, made, remainder = checked(
            api.cuDevSmResourceSplitByCount(count, whole, 0, self._granularity),
            "cuDevSmResourceSplitByCount",
        )
        groups = list(groups)[:made]
        sizes = {group.sm.smCount for group in groups}
        left = self.num_sms - made * self._granularity
        if sizes != {self._granularity} or (left and remainder.sm.smCount != left):
            raise PartitionError(
                f"asked the driver for groups of {self._granularity} SMs, got {made} of sizes "
                f"{sorted(sizes)} and {remainder.sm.smCount} left over of {self.num_sms}"
            )
        return groups, remainder

    def view(self, slots: Mapping[Slot, GroupRange]) -> PartitionView:
        """Streams for the slots of a layout; equal ranges share one green context."""
        return PartitionView(self, slots)

    def stream_of(self, groups: GroupRange) -> torch.cuda.Stream:
        """The stream on a range of SM groups."""
        if groups not in self._by_range:
            self._by_range[groups] = self._make_stream(groups)
        return self._by_range[groups]

    def whole_stream(self, lane: str) -> torch.cuda.Stream:
        """A plain stream on the whole GPU, one for each lane."""
        if lane not in self._whole:
            self._whole[lane] = torch.cuda.Stream()
        return self._whole[lane]

    def _make_stream(self, groups: GroupRange) -> torch.cuda.Stream:
        api = driver()
        resources = self._groups[groups.start : groups.end]
        if groups.has_remainder:
            resources = [*resources, self._remainder]
        description = checked(
            api.cuDevResourceGenerateDesc(resources, len(resources)), "cuDevResourceGenerateDesc"
        )
        # 1 = CU_GREEN_CTX_DEFAULT_STREAM and CU_STREAM_NON_BLOCKING: enum names changed, the
        # values did not.
        context = checked(api.cuGreenCtxCreate(description, self._device, 1), "cuGreenCtxCreate")
        stream = checked(api.cuGreenCtxStreamCreate(context, 1, 0), "cuGreenCtxStreamCreate")
        self._contexts.append(context)
        return torch.cuda.ExternalStream(int(stream))

    def close(self) -> None:
        """Destroy the green contexts; no kernel may be running on them."""
        api = driver()
        torch.cuda.synchronize()
        self._by_range.clear()
        for context in self._contexts:
            checked(api.cuGreenCtxDestroy(context), "cuGreenCtxDestroy")
        self._contexts.clear()
