"""Which SM groups each (lane, share) of a schedule takes; pure arithmetic, no GPU.

A GPU is split once into groups of `granularity` SMs plus a remainder (an H200: 15 groups of 8 and
12 left over). A share is a run of groups, or a run at the back together with the remainder, so that
a share and its complement fit exactly. The first lane grows from the front, the last lane from the
back, lanes between are placed first-fit. Two shares that can run
at the same time must not meet; that is checked here and again on the device by reading %smid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .plan import NanoOp, Schedule
from .schedule import IllegalScheduleError

Slot = tuple[str, int]
"""(lane, num_sms)."""

# Grows from the front first: shares of the memory lane are plain multiples of the granularity;
# the compute lane takes complements, so it sits at the back with the remainder.
_FRONT_TO_BACK = ("memory", "network", "compute")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmSplit:
    """What one driver split of all SMs gives."""

    granularity: int
    num_groups: int
    remainder: int
    """SMs left over, usable as one piece."""

    @classmethod
    def expected(cls, num_sms: int, granularity: int) -> SmSplit:
        """The split to plan for without a device: drivers keep one group in the remainder."""
        num_groups, remainder = divmod(num_sms, granularity)
        if remainder:
            num_groups, remainder = num_groups - 1, remainder + granularity
        return cls(granularity=granularity, num_groups=num_groups, remainder=remainder)

    def place(self, share: int) -> tuple[int, bool]:
        """(groups, whether the remainder is needed) of a share.

        Raises:
            IllegalScheduleError: the share is neither a multiple of the granularity nor the
                complement of one.
        """
        if share % self.granularity == 0 and share <= self.num_groups * self.granularity:
            return share // self.granularity, False
        groups, rest = divmod(share - self.remainder, self.granularity)
        if groups < 0 or rest or groups > self.num_groups:
            raise IllegalScheduleError(
                f"no partition of {share} SMs: the GPU splits into {self.num_groups} groups of "
                f"{self.granularity} and {self.remainder} left over"
            )
        return groups, True


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRange:
    """A run of SM groups [start, end) and whether the remainder belongs to it."""

    start: int
    end: int
    has_remainder: bool = False

    def meets(self, other: GroupRange) -> bool:
        """Whether both hold a common SM."""
        shared = self.start < other.end and other.start < self.end
        return shared or (self.has_remainder and other.has_remainder)


def _lane_rank(lane: str) -> tuple[int, str]:
    rank = _FRONT_TO_BACK.index(lane) if lane in _FRONT_TO_BACK else 1
    return rank, lane


def slot_of(nano_op: NanoOp) -> Slot:
    """The (lane, share) that a nano-op runs on."""
    return nano_op.lane, nano_op.num_sms


def concurrent_slots(
    schedule: Schedule, pairs: Iterable[tuple[int, int]]
) -> set[tuple[Slot, Slot]]:
    """Pairs of different slots that can run at the same time.

    Args:
        schedule: whose nano-ops are meant.
        pairs: its `concurrent_pairs`.
    """
    slots = [slot_of(nano_op) for nano_op in schedule.nano_ops]
    return {(slots[a], slots[b]) for a, b in pairs if slots[a] != slots[b]}


def layout(
    schedule: Schedule, pairs: Iterable[tuple[int, int]], num_sms: int, split: SmSplit
) -> dict[Slot, GroupRange]:
    """Place every (lane, share) below the whole GPU; a share of 0 needs no place.

    Args:
        schedule: what to place.
        pairs: its `concurrent_pairs`.
        num_sms: of the whole GPU.
        split: groups that the driver makes of them.

    Raises:
        IllegalScheduleError: two shares that can run at once do not fit side by side.
    """
    meets: dict[Slot, set[Slot]] = {}
    for first, second in concurrent_slots(schedule, pairs):
        meets.setdefault(first, set()).add(second)
        meets.setdefault(second, set()).add(first)
    lanes = sorted(schedule.lanes, key=_lane_rank)
    placed: dict[Slot, GroupRange] = {}
    slots = {slot_of(nano_op) for nano_op in schedule.nano_ops if 0 < nano_op.num_sms < num_sms}
    order = sorted(slots, key=lambda slot: (_placement_turn(slot[0], lanes), -slot[1]))
    for slot in order:
        lane, share = slot
        size, has_remainder = split.place(share)
        taken = [placed[other] for other in meets.get(slot, ()) if other in placed]
        starts = range(split.num_groups - size + 1)
        if has_remainder:
            starts = starts[-1:]
        elif lane == lanes[-1]:
            starts = reversed(starts)
        candidates = (
            GroupRange(start=start, end=start + size, has_remainder=has_remainder)
            for start in starts
        )
        place = next((c for c in candidates if not any(c.meets(t) for t in taken)), None)
        if place is None:
            others = ", ".join(f"{name} on {sms} SMs" for name, sms in sorted(meets.get(slot, ())))
            raise IllegalScheduleError(
                f"lane {lane} on {share} SMs does not fit beside what can run with it ({others}) "
                f"on {split.num_groups} groups of {split.granularity} SMs and {split.remainder} "
                "left over: lower a share"
            )
        placed[slot] = place
    return placed


def _placement_turn(lane: str, lanes: list[str]) -> int:
    """Front lane first, back lane second, the ones between last."""
    if lane == lanes[0]:
        return 0
    return 1 if lane == lanes[-1] else 2
