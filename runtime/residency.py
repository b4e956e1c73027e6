"""Who is on the device: slots, pages, and requests swapped to host memory while pages lack.

When pages run out, the latest arrival is swapped out with all that is computed of it, and comes
back before anything new is admitted. What the device must be told of it (pages in tables, slots
taken, copies) is gathered here for the next step. No torch: pages are numbers.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from .page_pool import PagePool
from .scheduler_records import Forming, SchedulerLimits, Totals
from .sequence_state import Sequence
from .step import CacheOp, PageUpdates, SlotTaken


class Residency:
    """Slots and pages of running requests; the scheduler alone calls it."""

    def __init__(
        self,
        limits: SchedulerLimits,
        pool: PagePool,
        totals: Totals,
        fail: Callable[[Sequence, str], None],
    ) -> None:
        """Start with all slots and pages free.

        Args:
            limits: sizes.
            pool: the pages of the cache.
            totals: preemptions and their pages are counted there.
            fail: ends a request that neither the cache nor the swap space has room for.
        """
        self.pool = pool
        self.running: list[Sequence] = []
        """By arrival."""
        self.swapped: list[Sequence] = []
        """By arrival."""
        self.updates = PageUpdates()
        self.taken: list[SlotTaken] = []
        self.ops: list[CacheOp] = []
        self._limits, self._totals, self._fail = limits, totals, fail
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._next_swap_key = -1

    @property
    def has_free_slot(self) -> bool:
        """Whether one more request may run."""
        return bool(self._free_slots)

    @property
    def num_swapped_pages(self) -> int:
        """Pages in host memory of preempted requests."""
        return sum(sequence.num_swapped_pages for sequence in self.swapped)

    def enter(self, sequence: Sequence, pages: list[int]) -> None:
        """Give a request a slot, and pages that it holds from the start."""
        sequence.slot = self._free_slots.pop()
        sequence.state = "running"
        insort(self.running, sequence, key=_order)
        self.taken.append(
            SlotTaken(
                slot=sequence.slot,
                sampling=sequence.request.sampling,
                seed=sequence.seed,
                num_generated=sequence.num_generated,
            )
        )
        self._add_pages(sequence, pages)

    def leave(self, sequence: Sequence) -> None:
        """Take slot and pages back."""
        self.running.remove(sequence)
        self.pool.give_back(sequence.pages)
        sequence.pages.clear()
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def drop_swapped(self, sequence: Sequence) -> None:
        """Forget a request that ended while it was swapped out."""
        self.swapped.remove(sequence)
        sequence.num_swapped_pages = 0
        self.ops.append(CacheOp(kind="drop", key=sequence.swap_key))

    def grow(self, sequence: Sequence, num_tokens: int, forming: Forming) -> bool:
        """Give a request pages for `num_tokens`, taken from later arrivals when none are free."""
        count = self.pool.pages_for(num_tokens) - len(sequence.pages)
        while count > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            forming.preempted = True
            if victim is sequence:
                return False
        self._add_pages(sequence, self.pool.take(count) if count > 0 else [])
        return True

    def swap_in(self, forming: Forming, max_rows: int) -> None:
        """Bring preempted requests back while there is room for them and for growth."""
        while self.swapped and self._free_slots and not forming.preempted:
            sequence = self.swapped[0]
            if len(forming.decodes) == max_rows:
                return
            growth = self.pool.pages_for(len(self.running)) if self.running else 0
            wanted = max(sequence.num_swapped_pages, self.pool.pages_for(sequence.num_computed + 1))
            if wanted + growth > self.pool.num_free:
                return
            self.swapped.pop(0)
            pages = self.pool.take(sequence.num_swapped_pages)
            self.ops.append(CacheOp(kind="load", key=sequence.swap_key, pages=tuple(pages)))
            self.ops.append(CacheOp(kind="drop", key=sequence.swap_key))
            sequence.num_swapped_pages = 0
            self.enter(sequence, pages)
            if sequence.can_decode and self.grow(sequence, sequence.num_computed + 1, forming):
                forming.decodes.append(sequence)

    def _add_pages(self, sequence: Sequence, pages: list[int]) -> None:
        if pages:
            self.updates.add(sequence.slot, len(sequence.pages), pages)
            sequence.pages.extend(pages)

    def _preempt(self, sequence: Sequence) -> None:
        limit = self._limits.max_swapped_pages
        if limit is not None and self.num_swapped_pages + len(sequence.pages) > limit:
            message = (
                f"the KV cache is full and so is the swap space of {limit} pages: send fewer "
                "requests at once, or allow more swap space"
            )
            self._fail(sequence, message)
            return
        sequence.swap_key, self._next_swap_key = self._next_swap_key, self._next_swap_key - 1
        sequence.num_swapped_pages = len(sequence.pages)
        self.ops.append(CacheOp(kind="save", key=sequence.swap_key, pages=tuple(sequence.pages)))
        self._totals.preemptions += 1
        self._totals.swapped_pages += len(sequence.pages)
        self.leave(sequence)
        sequence.state = "swapped"
        insort(self.swapped, sequence, key=_order)


def _order(sequence: Sequence) -> int:
    return sequence.order
