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

from .partition_layout import GroupRange, Slot


class PartitionError(RuntimeError):
    """A partition cannot be made, or is not what was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionAudit:
    """SM ids that a partition really ran on."""

    slot: Slot
    sm_ids: frozenset[int]


def _checked(result: tuple[Any, ...], what: str) -> Any:  # noqa: ANN401 - driver handles
    error, *values = result
    if int(error) != 0:
        raise PartitionError(f"{what} failed with CUDA driver error {error}")
    return values[0] if len(values) == 1 else tuple(values)


class SmPartitions:
    """Streams on disjoint SM groups of the current device.

    `stream(lane, num_sms)` gives the stream of a slot; a share of the whole GPU gets a plain
    stream per lane. Create communicators before partitions.
    """

    def __init__(self, num_sms: int, granularity: int, slots: Mapping[Slot, GroupRange]) -> None:
        self.num_sms = num_sms
        self._granularity = granularity
        self._streams: dict[Slot, torch.cuda.Stream] = {}
        self._contexts: list[Any] = []
        self._ranges: dict[Slot, GroupRange] = {}
        self._by_range: dict[GroupRange, torch.cuda.Stream] = {}
        self._groups, self._remainder = self._split()
        self.add(slots)

    def _split(self) -> tuple[list[Any], Any]:
        from cuda.bindings import driver

        torch.cuda.init()
        device = _checked(driver.cuDeviceGet(torch.cuda.current_device()), "cuDeviceGet")
        self._device = device
        whole = _checked(
            driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM),
            "cuDeviceGetDevResource",
        )
        if whole.sm.smCount != self.num_sms:
            raise PartitionError(
                f"the hardware spec says {self.num_sms} SMs, the device has {whole.sm.smCount}: "
                "choose the spec of this GPU with --gpu"
            )
        count = self.num_sms // self._granularity
        groups, made, remainder = _checked(
            driver.cuDevSmResourceSplitByCount(count, whole, 0, self._granularity),
            "cuDevSmResourceSplitByCount",
        )
        groups = list(groups)[:made]
        sizes = {group.sm.smCount for group in groups}
        if made != count or sizes != {self._granularity}:
            raise PartitionError(
                f"asked the driver for {count} groups of {self._granularity} SMs, got {made} of "
                f"sizes {sorted(sizes)}"
            )
        return groups, remainder

    def add(self, slots: Mapping[Slot, GroupRange]) -> None:
        """Make streams for further slots from the same split."""
        for slot, groups in slots.items():
            self._ranges[slot] = groups
            if groups not in self._by_range:
                self._by_range[groups] = self._make_stream(groups)
            self._streams[slot] = self._by_range[groups]

    def _make_stream(self, groups: GroupRange) -> torch.cuda.Stream:
        from cuda.bindings import driver

        resources = self._groups[groups.start : groups.end]
        if groups.has_remainder:
            resources = [*resources, self._remainder]
        description = _checked(
            driver.cuDevResourceGenerateDesc(resources, len(resources)), "cuDevResourceGenerateDesc"
        )
        # 1 = CU_GREEN_CTX_DEFAULT_STREAM and CU_STREAM_NON_BLOCKING: enum names changed, the
        # values did not.
        context = _checked(driver.cuGreenCtxCreate(description, self._device, 1), "cuGreenCtxCreate")
        stream = _checked(driver.cuGreenCtxStreamCreate(context, 1, 0), "cuGreenCtxStreamCreate")
        self._contexts.append(context)
        return torch.cuda.ExternalStream(int(stream))

    def stream(self, lane: str, num_sms: int) -> torch.cuda.Stream:
        """The stream of a slot.

        Raises:
            PartitionError: the slot was never laid out; names it and the known ones.
        """
        slot = (lane, num_sms)
        if slot not in self._streams:
            if num_sms != self.num_sms:
                known = ", ".join(f"{known[0]}:{known[1]}" for known in sorted(self._streams))
                raise PartitionError(
                    f"no partition of {num_sms} SMs on lane {lane}; known: {known or 'none'}"
                )
            self._streams[slot] = torch.cuda.Stream()
        return self._streams[slot]

    def audit(self, concurrent: Iterable[tuple[Slot, Slot]] = ()) -> tuple[PartitionAudit, ...]:
        """Run a probe on every partition and compare the SMs it saw with what was asked.

        Args:
            concurrent: pairs of slots that can run at the same time.

        Raises:
            PartitionError: a share differs from what was asked, or two that can run at once
                overlap; names both.
        """
        from .kernels.sm_probe import seen_sm_ids

        audits: dict[Slot, PartitionAudit] = {}
        for slot in self._ranges:
            stream = self._streams[slot]
            sm_ids = seen_sm_ids(stream, self.num_sms)
            if len(sm_ids) != slot[1]:
                raise PartitionError(
                    f"lane {slot[0]} asked for {slot[1]} SMs but ran on {len(sm_ids)}: "
                    f"{sorted(sm_ids)}"
                )
            audits[slot] = PartitionAudit(slot=slot, sm_ids=sm_ids)
        for a, b in concurrent:
            if a in audits and b in audits and audits[a].sm_ids & audits[b].sm_ids:
                both = sorted(audits[a].sm_ids & audits[b].sm_ids)
                raise PartitionError(
                    f"lane {a[0]} on {a[1]} SMs and lane {b[0]} on {b[1]} SMs can run at once but "
                    f"share SMs {both}"
                )
        return tuple(audits.values())

    def close(self) -> None:
        """Destroy the green contexts; no kernel may be running on them."""
        from cuda.bindings import driver

        torch.cuda.synchronize()
        self._streams.clear()
        self._by_range.clear()
        for context in self._contexts:
            _checked(driver.cuGreenCtxDestroy(context), "cuGreenCtxDestroy")
        self._contexts.clear()
