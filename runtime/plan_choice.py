"""What runs a step: a schedule of the plan, chosen by rows, mix and KV length.

Small steps run sequential schedules in sizes between the plan's, so that little is padding; where
an overlapped schedule of the plan, somewhat shorter or with padding, gains at what attention has to
read, that runs. Every choice says why. Without a plan (or with one that fits only roughly) all
schedules are sequential. No torch here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..search_spaces.schema import HardwareSpec
from .host_planned import host_planned, without_host_planned
from .legality import check
from .op_graph import OpGraph, OpKind
from .plan import Bucket, Candidate, NanoBatch, NanoOp, Plan, Schedule
from .plan_lookup import (
    MAX_DISTANCE,
    bucket_sizes,
    distance,
    gain_over_sequential,
    margin_of,
    nearest,
)
from .step_schedules import pace, sizes_below, step_sizes, with_fewer_rows, with_rows

MOST_PADDING = 0.25
"""Of a dense batch, in rows that an overlapped schedule may have more than the step needs."""
_MIN_TIME = 0.15
"""Of a bucket's time: what a step of few rows takes at least, since all weights are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A schedule that a step may run."""

    key: str
    """Names it on all ranks."""
    schedule: Schedule
    period_us: float
    """Predicted or measured time of one iteration; 0 when nobody knows."""
    is_replaced: bool = False
    """Some kernels are others than those that `period_us` was found with."""
    pace: float = 1.0
    """Of a bucket's schedule with fewer rows: the part of the whole one's time that it takes."""

    @property
    def rows(self) -> int:
        """Of its dense batch."""
        return self.schedule.dense_batch_tokens

    @property
    def host_planned(self) -> tuple[str, ...]:
        """Its variants that plan on the host, behind the names of their ops."""
        return host_planned(self.schedule)

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph of it serves any step."""
        return not self.host_planned


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A choice and why it was made."""

    choice: Choice
    reason: str
    gain: float = 0.0
    """Over a sequential schedule of as many rows as the choice has, as far as it is known."""

    @property
    def label(self) -> str:
        """For logs and stats."""
        other = "; not with the kernels it was timed with" if self.choice.is_replaced else ""
        return f"{self.choice.schedule.name} ({self.reason}{other})"


class PlanBook:
    """All schedules that an engine may run, the same on every rank."""

    def __init__(
        self,
        sequential: Mapping[int, Choice],
        plan: Plan | None = None,
        remark: str = "",
        *,
        even_losing: bool = False,
    ) -> None:
        """Collect the choices; `from_plan` and `without_plan` are the ways here.

        Args:
            sequential: by rows.
            plan: whose winners may be used; None: none.
            remark: why there are none.
            even_losing: use them near their buckets whether they gain or not, to measure them.
        """
        self._remark, self._even_losing = remark or "no plan", even_losing
        self.replaced: tuple[str, ...] = ()
        """Kernels that others stand in for, one remark each; see `hold_in_graphs`."""
        self._plan = plan
        self._sizes = sorted(sequential)
        self.target_rows = plan.buckets[0].dense_batch_tokens if plan else self._sizes[-1]
        """The constant dense batch: the plan's own bucket comes first in it."""
        self._sequential = dict(sequential)
        self._overlapped: dict[tuple[int, int], Choice] = {}
        """By bucket and rows."""
        sizes = bucket_sizes(plan) if plan is not None else ()
        next_smaller = dict(zip(sizes, (0, *sizes), strict=False))
        for index, bucket in enumerate(plan.buckets if plan is not None else ()):
            if even_losing:
                self._add(index, bucket.winner)
                continue
            if not _is_worth_knowing(bucket):
                continue
            best, least = bucket.best_overlapped, next_smaller[bucket.dense_batch_tokens]
            self._add(index, best)
            if bucket.overlap_gain is not None:
                for rows in sizes_below(best.schedule, least):
                    self._add(index, best, rows)
        self.choices = self._by_key()

    @classmethod
    def from_plan(
        cls,
        graph: OpGraph,
        plan: Plan,
        hardware: HardwareSpec,
        remark: str = "",
        *,
        even_losing: bool = False,
    ) -> PlanBook:
        """The choices of a plan; with a remark, its sequential schedules alone.

        Raises:
            IllegalScheduleError: a schedule is not one of this model's, or asks for SMs that the
                GPU lacks.
        """
        sequential: dict[int, Choice] = {}
        largest = max(bucket.dense_batch_tokens for bucket in plan.buckets)
        for rows in step_sizes(largest, {b.dense_batch_tokens for b in plan.buckets}):
            bucket = _nearest_size(plan, rows)
            sequential[rows] = _sequential_choice(bucket, rows)
        book = cls(sequential, None if remark else plan, remark, even_losing=even_losing)
        book.target_rows = plan.buckets[0].dense_batch_tokens
        for choice in book.choices.values():
            check(choice.schedule, graph, hardware.num_sms, hardware.sm_granularity)
        return book

    @classmethod
    def without_plan(
        cls, graph: OpGraph, max_rows: int, variants: Mapping[OpKind, str], num_sms: int = 1
    ) -> PlanBook:
        """Sequential schedules with one kernel variant for each kind of op."""
        nano_ops = tuple(
            NanoOp(
                op=op,
                tokens=(0, max_rows),
                lane="compute",
                num_sms=num_sms,
                variant=variants[graph.op(op).kind],
            )
            for op in graph.op_names
        )
        whole = Schedule(
            name="sequential",
            nano_batches=(NanoBatch(tokens=(0, max_rows), decode_tokens=0),),
            nano_ops=nano_ops,
        )
        sizes = step_sizes(max_rows, {max_rows})
        sequential = {
            rows: Choice(key=f"sequential {rows}", schedule=with_rows(whole, rows), period_us=0.0)
            for rows in sizes
        }
        return cls(sequential)

    def aim_at(self, rows: int) -> None:
        """Make another size the constant dense batch.

        Args:
            rows: rounded up to a size that there is.

        Raises:
            ValueError: more than the largest dense batch has, or none.
        """
        if not 1 <= rows <= self.max_rows:
            raise ValueError(
                f"the constant dense batch must have 1 to {self.max_rows} rows, the most that the "
                f"plan has a bucket for, but got {rows}: tune with larger --buckets"
            )
        self.target_rows = next(size for size in self._sizes if size >= rows)

    def hold_in_graphs(self, graph: OpGraph, stand_ins: Mapping[OpKind, str]) -> tuple[str, ...]:
        """Replace variants that plan on the host by others, as an engine on a GPU must.

        Times of the choices stay, as the nearest that are known, and each changed choice says that
        they are not its own. A second call finds nothing to replace.

        Args:
            graph: of the model that is served.
            stand_ins: by kind of op; kinds without one keep their variants.

        Returns:
            All remarks of this book, for the operator.
        """
        said = dict.fromkeys(self.replaced)

        def held(choice: Choice) -> Choice:
            schedule, remarks = without_host_planned(choice.schedule, graph, stand_ins)
            said.update(dict.fromkeys(remarks))
            return replace(choice, schedule=schedule, is_replaced=True) if remarks else choice

        self._sequential = {rows: held(choice) for rows, choice in self._sequential.items()}
        self._overlapped = {place: held(choice) for place, choice in self._overlapped.items()}
        self.choices = self._by_key()
        self.replaced = tuple(said)
        return self.replaced

    @property
    def max_rows(self) -> int:
        """Rows of the largest dense batch."""
        return self._sizes[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of all dense batches, ascending."""
        return tuple(self._sizes)

    def choose(self, num_decodes: int, num_prompt_tokens: int, mean_kv_len: float) -> Chosen:
        """What runs a step.

        Args:
            num_decodes: decode rows.
            num_prompt_tokens: prefill rows.
            mean_kv_len: keys of the average decode row; 0 without any.

        Raises:
            ValueError: more rows than the largest dense batch has.
        """
        rows = num_decodes + num_prompt_tokens
        place = bisect_left(self._sizes, rows)
        if place == len(self._sizes):
            raise ValueError(
                f"a step of {rows} rows is larger than any dense batch ({self.max_rows}): "
                "schedule fewer rows"
            )
        size = self._sizes[place]
        sequential = self._sequential[size]
        if self._plan is None:
            return Chosen(choice=sequential, reason=self._remark)
        if self._even_losing:
            return self._nearest_winner(size, num_decodes / rows, mean_kv_len)
        best = Chosen(
            choice=sequential,
            reason="no overlapped schedule is known to gain at "
            f"{num_decodes * mean_kv_len / size:.0f} keys a row",
        )
        most = -1.0
        for (index, _), choice in self._overlapped.items():
            bucket = self._plan.buckets[index]
            if not size <= choice.rows <= size * (1 + MOST_PADDING):
                continue
            fraction = num_decodes / choice.rows
            gain = gain_over_sequential(bucket, fraction, mean_kv_len)
            if gain is None:
                continue
            gain = (1 + gain) * choice.rows / (choice.pace * bucket.dense_batch_tokens) - 1
            worth = (1 + gain) * size / choice.rows - 1
            if worth >= margin_of(bucket) and worth > most:
                most = worth
                said = f"{100 * worth:.0f} % faster at {fraction * mean_kv_len:.0f} keys a row"
                best = Chosen(choice=choice, reason=said, gain=gain)
        return best

    def _nearest_winner(self, size: int, fraction: float, mean_kv_len: float) -> Chosen:
        """The winner of the nearest bucket of a size, whether it gains or not."""
        sequential = self._sequential[size]
        assert self._plan is not None
        buckets = [bucket for bucket in self._plan.buckets if bucket.dense_batch_tokens == size]
        if not buckets:
            return Chosen(choice=sequential, reason=f"the plan has no bucket of {size} rows")
        bucket = nearest(buckets, fraction, mean_kv_len)
        away = distance(bucket, fraction, mean_kv_len)
        if away > MAX_DISTANCE:
            said = f"mix and KV length are {away:.2f} from the nearest bucket"
            return Chosen(choice=sequential, reason=said)
        index = next(i for i, b in enumerate(self._plan.buckets) if b is bucket)
        periods = bucket.sequential.best_known.period_us, bucket.winner.best_known.period_us
        said = f"the plan's winner at {size} rows"
        choice = self._overlapped[index, size]
        return Chosen(choice=choice, reason=said, gain=periods[0] / periods[1] - 1)

    def _by_key(self) -> dict[str, Choice]:
        every = (*self._sequential.values(), *self._overlapped.values())
        return {choice.key: choice for choice in every}

    def _add(self, index: int, candidate: Candidate, rows: int | None = None) -> None:
        """An overlapped schedule of a bucket, with all of its rows or fewer."""
        schedule, key, part = candidate.schedule, f"bucket {index}", 1.0
        if rows is not None:
            schedule, key = with_fewer_rows(candidate.schedule, rows), f"{key}, {rows} rows"
            part = pace(candidate.schedule, schedule)
        self._overlapped[index, schedule.dense_batch_tokens] = Choice(
            key=key,
            schedule=schedule,
            period_us=part * candidate.best_known.period_us,
            pace=part,
        )

    def rows_within(self, limit_s: float, measured_s: Mapping[int, float]) -> int:
        """Rows of the largest dense batch whose step keeps a time limit; at least the smallest.

        Args:
            limit_s: of one step.
            measured_s: times of steps by rows of their dense batch; they count before predictions.
        """
        fitting = [size for size in self._sizes if self.step_s(size, measured_s) <= limit_s]
        return fitting[-1] if fitting else self._sizes[0]

    def step_s(self, size: int, measured_s: Mapping[int, float]) -> float:
        """Time of a step: measured, else predicted and scaled as the nearest measured size is."""
        if size in measured_s:
            return measured_s[size]
        predicted = self._sequential[size].period_us * 1e-6
        if not measured_s:
            return predicted
        near = min(measured_s, key=lambda other: abs(other - size))
        reference = self._sequential[near].period_us * 1e-6
        if reference <= 0:
            return measured_s[near] * max(_MIN_TIME, size / near)
        return predicted * measured_s[near] / reference


def _is_worth_knowing(bucket: Bucket) -> bool:
    """Whether its overlapped schedule gains anywhere."""
    curve = bucket.overlap_gain
    if curve is None:
        return bucket.winner.schedule.is_overlapped
    return max(curve.gains) > margin_of(bucket)


def _nearest_size(plan: Plan, rows: int) -> Bucket:
    return min(plan.buckets, key=lambda bucket: abs(bucket.dense_batch_tokens - rows))


def _sequential_choice(bucket: Bucket, rows: int) -> Choice:
    part = rows / bucket.dense_batch_tokens
    period_us = bucket.sequential.best_known.period_us * max(_MIN_TIME, part)
    return Choice(
        key=f"sequential {rows}",
        schedule=with_rows(bucket.sequential.schedule, rows),
        period_us=period_us,
    )
