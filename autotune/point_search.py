"""A quick search at one grid point: schedules of neighbours, made to fit, then moved a little.

    schedules of neighbouring points, the equal split, the whole-GPU ping-pong
      -> the best few of them, each improved by single moves until none helps:
         other SM shares, the other row order, the boundary of two nano-batches one step further

The best one meets the sequential schedule. Everything is predicted by the simulator; no MILP and no
study, so that a point takes well under a second. The workload's own bucket gets the whole search
(`search.py`), and lends its structure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from ..runtime.legality import check
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Candidate, Schedule
from ..runtime.schedule import IllegalScheduleError
from ..search_spaces.schema import RowOrder, SearchSpace
from .baselines import (
    equal_split_choice,
    ping_pong,
    sequential,
    whole_gpu_choice,
)
from .cost_model import CostModel
from .patterns import (
    COMPUTE,
    MEMORY,
    NETWORK,
    has_sm_free,
    legal_shares,
)
from .race import best_overlapped, distinct, pick_winner
from .resize import granularity, resized, row_order_of
from .side_by_side import attention_side_by_side
from .simulator import predict

NAME = "overlapped"
"""Of every overlapped schedule that is found here."""
MAX_ROUNDS = 3
LEAST_GAIN = 2e-3
"""Part of the period that a round of moves must gain for another one."""
SAME = 2e-3
"""A schedule already in the book is kept where a new one gains less than this part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """What a point's search found."""

    winner: Candidate
    sequential: Candidate
    best_overlapped: Candidate

    @property
    def fastest_us(self) -> float:
        """Least predicted time, the margin that a winner needs left aside."""
        return min(self.sequential.predicted.period_us, self.best_overlapped.predicted.period_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """What is changed of a structure."""

    order: RowOrder
    shares: Mapping[str, int] = field(default_factory=dict[str, int])
    """New SMs by lane."""
    shift: int = 0
    """Rows by which the boundary of two nano-batches moves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSearch:
    """What all points of one book share."""

    graph: OpGraph
    cost_model: CostModel
    space: SearchSpace
    starts: int = 2
    """Schedules that are improved, best first."""

    def solve(
        self, rows: RowMix, seeds: Sequence[Schedule], kept: Sequence[Schedule]
    ) -> PointResult:
        """Search one dense batch.

        Args:
            rows: the batch.
            seeds: overlapped schedules of any size, nearest first.
            kept: schedules of exactly these rows that the book already holds.
        """
        base = self._unless_kept(
            self.predicted(sequential(self.graph, self.cost_model, rows), rows), rows, kept
        )
        overlapped = self._overlapped(rows, base.schedule, seeds, kept)
        best = best_overlapped(overlapped, self.graph)
        best = self._unless_kept(best, rows, kept)
        winner = pick_winner(base, [best])
        return PointResult(winner=winner, sequential=base, best_overlapped=best)

    def predicted(self, schedule: Schedule, rows: RowMix) -> Candidate:
        """The schedule with its simulated time."""
        timing = predict(schedule, self.graph, self.cost_model, rows)
        return Candidate(schedule=schedule, predicted=timing)

    def _overlapped(
        self, rows: RowMix, base: Schedule, seeds: Sequence[Schedule], kept: Sequence[Schedule]
    ) -> list[Candidate]:
        """Legal overlapped candidates, best first."""
        same = [schedule for schedule in kept if schedule.is_overlapped]
        made = [*same, *self._resized_seeds(rows, seeds), *self._ping_pongs(rows)]
        beside = attention_side_by_side(base, self.graph, self.cost_model, rows)
        made += [replace(beside, name=NAME)] if beside is not None else []
        known = distinct(filter(None, (self._tried(schedule, rows) for schedule in made)))
        known.sort(key=lambda candidate: candidate.predicted.period_us)
        found = list(known)
        for candidate in known[: self.starts]:
            found.append(self._improved(candidate, rows))
        return sorted(found, key=lambda candidate: candidate.predicted.period_us)

    def _tried(self, schedule: Schedule, rows: RowMix) -> Candidate | None:
        hardware = self.cost_model.hardware
        try:
            check(schedule, self.graph, hardware.num_sms, hardware.sm_granularity)
            return self.predicted(schedule, rows)
        except IllegalScheduleError:
            return None

    def _resized_seeds(self, rows: RowMix, seeds: Sequence[Schedule]) -> Iterator[Schedule]:
        for seed in seeds:
            try:
                yield self._moved(seed, rows, _Move(order=row_order_of(seed)))
            except IllegalScheduleError:
                continue

    def _ping_pongs(self, rows: RowMix) -> Iterator[Schedule]:
        """The equal split, and where collectives can go without SMs also the whole-GPU one.

        Each with both nano-batches in one form, in every form.
        """
        hardware = self.cost_model.hardware
        choice = equal_split_choice(self.graph, rows, hardware, self.space)
        choices = [choice, replace(choice, order="blocks")]
        if has_sm_free(self.graph, self.cost_model):
            whole = whole_gpu_choice(choice.first_tokens, choice.row_order, hardware.num_sms)
            choices.append(whole)
        for choice, form in product(choices, self.graph.forms):
            choice = replace(choice, forms=(form, form))
            try:
                yield ping_pong(self.graph, self.cost_model, rows, choice, NAME)
            except IllegalScheduleError:
                continue

    def _improved(self, candidate: Candidate, rows: RowMix) -> Candidate:
        best = candidate
        for _ in range(MAX_ROUNDS):
            moved = filter(None, (self._tried(s, rows) for s in self._moves(best.schedule, rows)))
            next_best = min(moved, key=lambda c: c.predicted.period_us, default=best)
            limit_us = best.predicted.period_us * (1 - LEAST_GAIN)
            if next_best.predicted.period_us >= limit_us:
                return best
            best = next_best
        return best

    def _moves(self, schedule: Schedule, rows: RowMix) -> Iterator[Schedule]:
        """Schedules one move away."""
        own = row_order_of(schedule)
        options: list[_Move] = [
            *(_Move(order=order) for order in self.space.row_orders if order != own),
            *(_Move(order=own, shares=shares) for shares in self._shares(schedule)),
        ]
        if len(schedule.nano_batches) == 2:
            step = granularity(rows, self.space)
            options += [_Move(order=own, shift=-step), _Move(order=own, shift=step)]
        for move in options:
            try:
                yield self._moved(schedule, rows, move)
            except IllegalScheduleError:
                continue

    def _shares(self, schedule: Schedule) -> Iterator[dict[str, int]]:
        """Other shares of one side lane; the GEMMs take what the larger side lane leaves."""
        hardware = self.cost_model.hardware
        held = {lane: self._largest_part(schedule, lane) for lane in (MEMORY, NETWORK)}
        for lane, own in held.items():
            for share in legal_shares(lane, hardware, self.space) if own else ():
                shares = {**held, lane: share}
                if share != own:
                    yield {**shares, COMPUTE: hardware.num_sms - max(shares.values())}

    def _largest_part(self, schedule: Schedule, lane: str) -> int:
        """The most SMs that a nano-op of the lane holds, all SMs left aside; 0 for none."""
        total = self.cost_model.hardware.num_sms
        parts = (n.num_sms for n in schedule.nano_ops if n.lane == lane and n.num_sms < total)
        return max(parts, default=0)

    def _moved(self, schedule: Schedule, rows: RowMix, move: _Move) -> Schedule:
        return resized(
            schedule,
            rows,
            self.graph,
            self.cost_model,
            order=move.order,
            step=granularity(rows, self.space),
            shares=move.shares,
            shift=move.shift,
            name=NAME,
        )

    def _unless_kept(
        self, candidate: Candidate, rows: RowMix, kept: Sequence[Schedule]
    ) -> Candidate:
        """A schedule that the book holds already, where the new one is hardly faster."""
        alike = [s for s in kept if s.is_overlapped == candidate.schedule.is_overlapped]
        alike = [
            s
            for s in alike
            if (s.name == "sequential") == (candidate.schedule.name == "sequential")
        ]
        tried = filter(None, (self._tried(schedule, rows) for schedule in alike))
        limit_us = candidate.predicted.period_us * (1 + SAME)
        good = [c for c in tried if c.predicted.period_us <= limit_us]
        return min(good, key=lambda c: c.predicted.period_us, default=candidate)
