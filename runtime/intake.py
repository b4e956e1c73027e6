"""Which prompts fill a step: the queue, admission, the pace of intake, and the cutting into chunks.

A waiting request is admitted when the pages that all running ones are expected to need at their
peak fit (`admission`). While more wait than the cache has room for, a cache that holds hardly more
decodes than a full dense batch needs takes prompts in at the pace at which answers end, in whole
tiles of rows: requests that all begin at once would also all peak at once. No torch here.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from .admission import DecodeLengths, Growth, fits_peak, steady_rows
from .prefix_index import PrefixIndex
from .residency import Residency
from .scheduler_records import Forming, SchedulerLimits, Totals
from .sequence_state import Sequence
from .step import Chunk

_ROOMY = 1.1
"""Rows that a full cache could keep busy, of those of the dense batch: with more, a batch that is
full from the start takes no longer, although requests of one age need their pages at once."""


class Intake:
    """Requests that wait, and the prompts of those that run; the scheduler alone calls it."""

    def __init__(
        self, limits: SchedulerLimits, residency: Residency, index: PrefixIndex, totals: Totals
    ) -> None:
        """Start with nobody waiting.

        Args:
            limits: sizes.
            residency: of slots and pages.
            index: of finished requests' pages outside the device.
            totals: prompt tokens found there are counted there.
        """
        self.lengths = DecodeLengths(limits.expected_decode_tokens)
        self.waiting: deque[Sequence] = deque()
        self.num_prompt_tokens = 0
        """Of the requests that wait."""
        self._max_decode_tokens = 0
        self._limits, self._residency, self._pool = limits, residency, residency.pool
        self._index, self._totals = index, totals

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.waiting.append(sequence)
        self.num_prompt_tokens += sequence.num_prompt_tokens
        self._max_decode_tokens += sequence.max_tokens

    def remove(self, sequence: Sequence) -> None:
        """Take a request that waits out of the queue."""
        self.waiting.remove(sequence)
        self.num_prompt_tokens -= sequence.num_prompt_tokens
        self._max_decode_tokens -= sequence.max_tokens

    def form_chunks(self, forming: Forming, max_rows: int) -> None:
        """Fill the rest with prompts: those begun before, then new ones."""
        running = self._residency.running
        rows = self._rows(len(forming.decodes), max_rows) - len(forming.decodes)
        for sequence in tuple(running):
            if rows == 0 or len(forming.chunks) == self._limits.max_chunks:
                return
            if sequence.state == "running" and sequence.is_prefilling:
                rows -= self._form_chunk(sequence, rows, forming)
        while rows and self.waiting and len(forming.chunks) < self._limits.max_chunks:
            if self._residency.swapped or not self._residency.has_free_slot:
                return
            sequence = self.waiting[0]
            if not self._admit(sequence, forming):
                return
            taken = self._form_chunk(sequence, rows, forming)
            if taken == 0:
                return
            rows -= taken

    def _rows(self, num_decodes: int, max_rows: int) -> int:
        """Rows of the step: all, or what keeps the pace, in whole tiles."""
        count, limits = len(self.waiting), self._limits
        if not count:
            return max_rows
        answer = min(self.lengths.mean, self._max_decode_tokens / count)
        free = (limits.admitted_fraction * self._pool.num_pages - self._pool.num_used) * (
            self._pool.page_size
        )
        if self.num_prompt_tokens + count * answer <= free:
            return max_rows  # whoever waits finds room, and nothing would be gained
        decodes, prompts = steady_rows(
            self.num_prompt_tokens / count,
            answer,
            limits.admitted_fraction * self._pool.num_pages,
            self._pool.page_size,
        )
        if decodes + prompts >= _ROOMY * max_rows:
            return max_rows
        prompts *= min(1.0, max_rows / (decodes + prompts))
        tile = limits.tile_rows
        wanted = round((num_decodes + prompts) / tile)
        return min(max_rows, max(wanted, num_decodes // tile + 1) * tile)

    def _admit(self, sequence: Sequence, forming: Forming) -> bool:
        """Give a waiting request a slot if the expected peak fits."""
        key, num_pages = self._index.match(sequence.request.prompt_token_ids)
        if forming.preempted or num_pages + 1 > self._pool.num_free:
            return False
        if not self._peak_fits(sequence, forming):
            return False
        self.remove(sequence)
        pages = self._pool.take(num_pages)
        if pages:
            self._residency.ops += self._index.load(key, tuple(pages))
        self._residency.enter(sequence, pages)
        sequence.num_computed = num_pages * self._pool.page_size
        self._totals.prefix += sequence.num_computed
        self._totals.prompt += sequence.num_computed
        return True

    def _peak_fits(self, newcomer: Sequence, forming: Forming) -> bool:
        if forming.growths is None:
            forming.growths = sorted(map(self._growth, self._residency.running))
        growth = self._growth(newcomer)
        insort(forming.growths, growth)
        return fits_peak(
            forming.growths,
            growth,
            num_waiting=len(self.waiting),
            room_pages=self._limits.admitted_fraction * self._pool.num_pages,
            page_size=self._pool.page_size,
            tile_rows=self._limits.tile_rows,
        )

    def _growth(self, sequence: Sequence) -> Growth:
        generated = sequence.num_generated + sequence.num_in_flight
        remaining = self.lengths.remaining(generated, sequence.max_tokens)
        return -remaining, max(sequence.num_computed, sequence.num_prompt_tokens)

    def _form_chunk(self, sequence: Sequence, rows: int, forming: Forming) -> int:
        """Add the next prompt tokens of a sequence, as many as rows and pages allow."""
        start, end = sequence.num_computed, sequence.num_prompt_tokens
        count = min(rows, end - start)
        room = len(sequence.pages) + self._pool.num_free
        is_oldest = sequence is self._residency.running[0]
        if is_oldest and not forming.decodes and not forming.chunks:
            # The oldest request must get on, or a cache full of begun prompts would never empty.
            if not self._residency.grow(sequence, start + count, forming):
                return 0
        else:
            count = min(count, room * self._pool.page_size - start)
            if count <= 0:
                return 0
            self._residency.grow(sequence, start + count, forming)
        tokens = sequence.request.prompt_token_ids[start : start + count]
        chunk = Chunk(
            slot=sequence.slot,
            first_position=start,
            token_ids=tokens,
            is_complete=start + count == end,
        )
        forming.chunks.append((sequence, chunk))
        return count
