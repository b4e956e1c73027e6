"""Which rows the next step computes: continuous batching with a constant dense batch.

Unfinished decodes come first, one row each; prompts are cut into chunks that fill the rest exactly.
First come, first served throughout. Which prompts come in, and when, is `intake`'s concern. When
pages run out all the same, the latest arrival is swapped to host memory, and comes back before
anything new is admitted, with no token computed twice (`residency`). No torch here: steps are
records, and pages are numbers.
"""

from __future__ import annotations

import random
from collections.abc import Collection

import numpy as np

from .intake import Intake
from .page_pool import PagePool
from .prefix_index import PrefixIndex
from .request_check import check_request
from .residency import Residency
from .scheduler_records import Forming, SchedulerLimits, Step, Totals
from .sequence import (
    FinishEvent,
    FinishReason,
    GenerationRequest,
    OnEvent,
    RequestRejected,
    TokenEvent,
)
from .sequence_state import Sequence
from .step import NOT_YET_KNOWN, StepInputs


class Scheduler:
    """Owns all requests and pages; not thread-safe, the engine's thread alone calls it."""

    def __init__(
        self,
        limits: SchedulerLimits,
        pool: PagePool,
        stop_token_ids: frozenset[int] = frozenset(),
        index: PrefixIndex | None = None,
        seed: int = 0,
    ) -> None:
        """Start without requests.

        Args:
            limits: sizes.
            pool: the pages of the cache.
            stop_token_ids: the model's own ends of sequence.
            index: of finished requests' pages in host memory and on disk; None keeps none.
            seed: of the seeds that requests without one get.
        """
        self.limits, self.pool = limits, pool
        self.totals = Totals()
        self._sequences: dict[str, Sequence] = {}
        self._stop_token_ids = stop_token_ids
        self._index = index or PrefixIndex(0, 0, pool.page_size)
        self._residency = Residency(limits, pool, self.totals, self._fail)
        self._intake = Intake(limits, self._residency, self._index, self.totals)
        self._rng = random.Random(seed)
        self._next_order = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._sequences)

    @property
    def waiting(self) -> Collection[Sequence]:
        """Requests that have not been admitted."""
        return self._intake.waiting

    @property
    def num_queued_prompt_tokens(self) -> int:
        """Of the requests that wait."""
        return self._intake.num_prompt_tokens

    @property
    def running(self) -> list[Sequence]:
        """By arrival."""
        return self._residency.running

    @property
    def swapped(self) -> list[Sequence]:
        """Preempted ones, by arrival."""
        return self._residency.swapped

    @property
    def num_swapped_pages(self) -> int:
        """Pages in host memory of preempted requests."""
        return self._residency.num_swapped_pages

    def check(self, request: GenerationRequest, num_arrived: int = 0) -> None:
        """Whether the engine could ever run a request, and takes it now.

        Args:
            request: not added yet.
            num_arrived: requests that were checked and not added yet.

        Raises:
            RequestRejected: 400, 413 or 429, with rule, value and remedy.
        """
        check_request(request, self.limits, self.pool)
        if request.request_id in self._sequences:
            raise RequestRejected(400, f"request {request.request_id!r} is running already")
        num_waiting = len(self.waiting) + num_arrived
        if num_waiting >= self.limits.max_waiting:
            raise RequestRejected(429, f"{num_waiting} requests are waiting: try again later", 1.0)

    def add(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """Queue a request that `check` passed."""
        seed = request.sampling.seed
        sequence = Sequence(
            request=request,
            on_event=on_event,
            order=self._next_order,
            seed=self._rng.getrandbits(63) if seed is None else seed,
            token_ids=list(request.prompt_token_ids),
        )
        self._next_order += 1
        self._sequences[request.request_id] = sequence
        self._intake.add(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request now, whatever its state; unknown ones have ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence, "cancelled")

    def schedule(self, max_rows: int) -> Step | None:
        """Form the next step of at most `max_rows` rows, or None when nothing can run.

        Cache operations that it decided on are part of the step, or of the next one that runs.
        """
        forming = Forming()
        self._form_decodes(forming, max_rows)
        self._residency.swap_in(forming, max_rows)
        self._intake.form_chunks(forming, max_rows)
        if not forming.decodes and not forming.chunks:
            return None
        return Step(
            decodes=tuple(forming.decodes),
            chunks=tuple(forming.chunks),
            inputs=self._inputs(forming),
        )

    def update(self, step: Step, token_ids: list[int], details: list[TokenEvent] | None) -> None:
        """Take in what a step sampled, one token for each of `step.predicting`.

        Tokens of requests that have ended meanwhile are dropped.

        Args:
            step: a step that has run; steps come in the order they were formed in.
            token_ids: sampled tokens.
            details: events with log-probabilities, where anyone asked for them.
        """
        for place, (sequence, token) in enumerate(zip(step.predicting, token_ids, strict=True)):
            if sequence.state == "finished":
                continue
            sequence.num_in_flight -= 1
            sequence.token_ids.append(token)
            self.totals.generated += 1
            event = TokenEvent(request_id=sequence.request.request_id, token_id=token)
            sequence.on_event(details[place] if details is not None else event)
            reason = self._end_of(sequence, token)
            if reason is not None:
                self._intake.lengths.add(sequence.num_generated)
                self._finish(sequence, reason)

    def cancel_all(self) -> None:
        """End every request now."""
        for sequence in list(self._sequences.values()):
            self._finish(sequence, "cancelled")

    def fail_all(self, message: str) -> None:
        """End every request with an error: the device is in no state to go on."""
        for sequence in list(self._sequences.values()):
            self._finish(sequence, "error", message)

    def _end_of(self, sequence: Sequence, token: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        is_stop = token in self._stop_token_ids or token in sampling.stop_token_ids
        if is_stop and not sampling.ignore_eos:
            return "stop"
        return "length" if sequence.num_generated >= sampling.max_tokens else None

    def _form_decodes(self, forming: Forming, max_rows: int) -> None:
        decodes, page_size = forming.decodes, self.pool.page_size
        for sequence in tuple(self.running):
            if len(decodes) == max_rows:
                return
            if sequence.state != "running" or not sequence.can_decode:
                continue
            has_room = sequence.num_computed < len(sequence.pages) * page_size
            if has_room or self._residency.grow(sequence, sequence.num_computed + 1, forming):
                decodes.append(sequence)

    def _inputs(self, forming: Forming) -> StepInputs:
        """Numbers of the step; counts its rows as computed and its tokens as in flight."""
        decodes = forming.decodes
        slots, positions, tokens = [], [], []
        for sequence in decodes:
            place = sequence.num_computed
            slots.append(sequence.slot)
            positions.append(place)
            is_known = place < len(sequence.token_ids)
            tokens.append(sequence.token_ids[place] if is_known else NOT_YET_KNOWN)
            sequence.num_computed = place + 1
            sequence.num_in_flight += 1
        for sequence, chunk in forming.chunks:
            sequence.num_computed += len(chunk.token_ids)
            sequence.num_in_flight += chunk.is_complete
            self.totals.prompt += len(chunk.token_ids)
        residency = self._residency
        taken, residency.taken = residency.taken, []
        ops, residency.ops = residency.ops, []
        return StepInputs(
            choice="",
            decode_slots_R=np.array(slots, dtype=np.int32),
            decode_positions_R=np.array(positions, dtype=np.int32),
            decode_tokens_R=np.array(tokens, dtype=np.int64),
            chunks=tuple(chunk for _, chunk in forming.chunks),
            page_updates_U3=residency.updates.take(),
            slots_taken=tuple(taken),
            cache_ops=tuple(ops),
        )

    def _fail(self, sequence: Sequence, message: str) -> None:
        self._finish(sequence, "error", message)

    def _finish(self, sequence: Sequence, reason: FinishReason, message: str = "") -> None:
        if sequence.state == "waiting":
            self._intake.remove(sequence)
        elif sequence.state == "swapped":
            self._residency.drop_swapped(sequence)
        else:
            if reason in ("stop", "length"):
                # The last token was sampled, so its own key is not in the cache.
                self._residency.ops += self._index.save(sequence.token_ids[:-1], sequence.pages)
            self._residency.leave(sequence)
        sequence.state = "finished"
        del self._sequences[sequence.request.request_id]
        self.totals.finished += 1
        self.totals.cancelled += reason == "cancelled"
        sequence.on_event(
            FinishEvent(
                request_id=sequence.request.request_id,
                reason=reason,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_generated_tokens=sequence.num_generated,
                message=message,
            )
        )
