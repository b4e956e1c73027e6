"""Times kernels on a warm GPU: CUDA-graph batches of rotated calls, sampled with events.

The regime is a server under load: the card sits on its power cap, operands come from HBM. So a
heater (a large GEMM) runs whenever the host prepares the next case, each case is warmed before it
is sampled, and a batch rotates over operand sets that together exceed the L2 cache. Launch cost is
not in the figures: a batch of calls is one graph. A case takes about 20 ms, 12 of them samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .power import PowerMeter

BATCH_MS, HEAT_MS, WARM_MS, SAMPLE_MS = 1.5, 3.2, 3.0, 12.0
"""One graph of calls; the heater while the host captures it; replays before and while sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Times of one call, in microseconds, one per batch."""

    times_us: tuple[float, ...]
    sm_clock_mhz: float

    def percentile(self, share: float) -> float:
        """Linear-interpolated percentile, share in [0, 1]."""
        ordered = sorted(self.times_us)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    @property
    def median_us(self) -> float:
        """Median."""
        return statistics.median(self.times_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Batches side by side: time of one call of each while all of them ran."""

    median_us: tuple[float, ...]
    watts: float
    sm_clock_mhz: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Joules:
    """Energy of one call in a run of many; nan without a counter, or when it did not advance."""

    per_call: float
    watts: float
    sm_clock_mhz: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InTurn:
    """Kernels one after the other, each alone: what one call of each takes in all."""

    us: float
    watts: float
    """Board power; nan without a counter."""
    sm_clock_mhz: float

    def dynamic_joules(self, static_w: float) -> float:
        """Of one call of each, beyond static power."""
        return (self.watts - static_w) * self.us * 1e-6


class Batch:
    """Calls captured into one CUDA graph on one stream, replayed as a unit."""

    def __init__(
        self, calls: Sequence[Callable[[], None]], stream: torch.cuda.Stream, repeats: int
    ) -> None:
        self.num_calls = repeats
        self._calls = calls  # keeps the operands alive: the graph holds bare addresses
        self._graph = torch.cuda.CUDAGraph()
        fork, join = torch.cuda.Event(), torch.cuda.Event()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            fork.record()
            stream.wait_event(fork)
            with torch.cuda.stream(stream):
                for index in range(repeats):
                    calls[index % len(calls)]()
                join.record()
            torch.cuda.current_stream().wait_event(join)

    def replay(self) -> None:
        """Enqueue the batch on the current stream (its kernels run on the captured one)."""
        self._graph.replay()


def timed_replays(
    replay: Callable[[], None], count: int, meter: PowerMeter
) -> tuple[list[float], float]:
    """Time of each of `count` replays in a row, in us, and the SM clock half-way through them."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    events[count // 2].synchronize()
    clock = meter.sm_clock_mhz
    events[-1].synchronize()
    return [1e3 * before.elapsed_time(after) for before, after in pairwise(events)], clock


class Timer:
    """Keeps the card warm and takes samples on it."""

    def __init__(self, meter: PowerMeter) -> None:
        self.meter = meter
        side = 8192
        self._heat_a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
        self._heat_b = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
        self._heat_out = torch.empty_like(self._heat_a)

    def heat(self, duration_ms: float) -> None:
        """Enqueue GEMMs for about `duration_ms` (1.6 ms each); returns at once."""
        for _ in range(max(1, round(duration_ms / 1.6))):
            torch.mm(self._heat_a, self._heat_b, out=self._heat_out)

    def calls_per_batch(
        self, calls: Sequence[Callable[[], None]], stream: torch.cuda.Stream, batch_ms: float
    ) -> int:
        """How many calls take about `batch_ms`, from one timed pass over the operand sets."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            for call in calls:
                call()  # compiles; plans on the host, for each operand set
            start.record()
            for call in calls:
                call()
            end.record()
        stream.synchronize()
        once_ms = start.elapsed_time(end) / len(calls)
        return max(len(calls), min(400, round(batch_ms / max(once_ms, 1e-3))))

    def batch(
        self,
        calls: Sequence[Callable[[], None]],
        stream: torch.cuda.Stream,
        batch_ms: float = BATCH_MS,
    ) -> Batch:
        """Capture a batch of about `batch_ms`, heating the card meanwhile."""
        stream.wait_stream(torch.cuda.current_stream())
        repeats = self.calls_per_batch(calls, stream, batch_ms)
        self.heat(HEAT_MS)
        return Batch(calls, stream, repeats)

    def replay_us(self, batch: Batch) -> float:
        """Time of one replay, from a first one."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        batch.replay()
        end.record()
        end.synchronize()
        return max(1e3 * start.elapsed_time(end), 10.0)

    def sample(
        self, batch: Batch, warm_ms: float = WARM_MS, sample_ms: float = SAMPLE_MS
    ) -> Samples:
        """Replay for `warm_ms`, then sample batches for at least `sample_ms`, three at least."""
        batch_ms = self.replay_us(batch) / 1e3
        for _ in range(round(warm_ms / batch_ms)):
            batch.replay()
        return self._timed(batch, max(3, round(sample_ms / batch_ms) + 1))

    def sample_fixed(self, batch: Batch, warm: int, count: int) -> Samples:
        """Sample a fixed number of batches: what ranks that must stay in step use."""
        for _ in range(warm):
            batch.replay()
        return self._timed(batch, count)

    def _timed(self, batch: Batch, count: int) -> Samples:
        times_us, clock = timed_replays(batch.replay, count, self.meter)
        return Samples(times_us=tuple(us / batch.num_calls for us in times_us), sm_clock_mhz=clock)

    def sample_together(
        self, batches: Sequence[Batch], counts: Sequence[int], heat_ms: float = 30.0
    ) -> Together:
        """Replay batches on their partitions at once and time each while all run.

        Args:
            batches: on disjoint partitions.
            counts: replays of each, so that all take about equally long; ranks that share a
                collective must be given the same.
            heat_ms: of GEMMs before.
        """
        launchers = [torch.cuda.Stream() for _ in batches]
        begin = torch.cuda.Event(enable_timing=True)
        marks: list[list[torch.cuda.Event]] = [[] for _ in batches]
        most = max(counts)
        self.heat(heat_ms)
        torch.cuda.synchronize()
        begin.record()
        for launcher in launchers:
            launcher.wait_event(begin)
        clock = 0.0
        with self.meter as meter:
            for turn in range(most):
                for which, batch in enumerate(batches):
                    if turn * counts[which] // most >= len(marks[which]):
                        with torch.cuda.stream(launchers[which]):
                            batch.replay()
                            mark = torch.cuda.Event(enable_timing=True)
                            mark.record()
                            marks[which].append(mark)
                if turn == most * 3 // 4:  # two thirds of these are half of the run: capped by now
                    marks[0][len(marks[0]) * 2 // 3].synchronize()
                    clock = self.meter.sm_clock_mhz
            torch.cuda.synchronize()
        ends = [[begin.elapsed_time(mark) for mark in column] for column in marks]
        calls = [batch.num_calls for batch in batches]
        return Together(
            median_us=steps_while_all_ran(ends, calls),
            watts=meter.watts,
            sm_clock_mhz=clock,
            n=min(len(column) for column in ends),
        )

    def sustain(self, batch: Batch, median_us: float, warm_s: float, sample_s: float) -> Samples:
        """Replay for seconds, so that the card enforces its cap; the meter holds the watts."""
        per_s = 1e6 / (median_us * batch.num_calls)
        for _ in range(round(warm_s * per_s)):
            batch.replay()
        torch.cuda.synchronize()
        with self.meter:
            return self.sample_fixed(batch, warm=0, count=max(3, round(sample_s * per_s)))

    def joules_per_call(
        self, batch: Batch, median_us: float, seconds: float, warm_s: float
    ) -> Joules:
        """Board joules of one call over `seconds` of back-to-back batches, `warm_s` before them.

        The warm-up keeps out of the counter what it still reports of the kernel before; the meter
        takes the slope from the first update it sees, so that one update's time is enough.
        """
        per_s = 1e6 / (median_us * batch.num_calls)
        count = max(3, round(seconds * per_s))
        for _ in range(max(1, round(warm_s * per_s))):
            batch.replay()
        torch.cuda.synchronize()
        with self.meter as meter:
            for _ in range(count):
                batch.replay()
            torch.cuda.synchronize()
        return Joules(
            per_call=meter.joules / (count * batch.num_calls),
            watts=meter.watts,
            sm_clock_mhz=meter.mean_sm_clock_mhz,
        )

    def in_turn(
        self,
        batches: Sequence[Batch],
        seconds: float,
        warm_s: float,
        agree: Callable[[list[int]], list[int]],
    ) -> InTurn:
        """Replay batches one after the other, round and round, so long that the cap is enforced.

        Args:
            batches: with equally many calls each.
            seconds: while watts, clock and time are taken.
            warm_s: before that.
            agree: gives all ranks that share a collective the same counts.
        """
        (calls,) = {batch.num_calls for batch in batches}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first one also warms
            begin.record()
            for batch in batches:
                batch.replay()
            end.record()
        end.synchronize()
        once_s = begin.elapsed_time(end) * 1e-3
        warm, count = agree([max(1, round(s / once_s)) for s in (warm_s, seconds)])
        for _ in range(warm):
            for batch in batches:
                batch.replay()
        torch.cuda.synchronize()
        with self.meter as meter:
            begin.record()
            for _ in range(count):
                for batch in batches:
                    batch.replay()
            end.record()
            torch.cuda.synchronize()
        us = 1e3 * begin.elapsed_time(end) / (count * calls)
        return InTurn(us=us, watts=meter.watts, sm_clock_mhz=meter.mean_sm_clock_mhz)


def steps_while_all_ran(
    ends_ms: Sequence[Sequence[float]], num_calls: Sequence[int]
) -> tuple[float, ...]:
    """Median time of one call of each column, in us, over the replays that ended while all ran.

    Args:
        ends_ms: for each column the ends of its replays, in order, from a common start.
        num_calls: calls of one replay, by column.

    Raises:
        ValueError: a column ended fewer than two replays before another one was through.
    """
    until = min(column[-1] for column in ends_ms)
    medians: list[float] = []
    for column, calls in zip(ends_ms, num_calls, strict=True):
        inside = [time for time in column if time <= until]
        if len(inside) < 2:
            raise ValueError(
                f"a kernel ended {len(inside)} replays while the others ran, but two are needed: "
                "give it more, or shorter ones"
            )
        medians.append(statistics.median(1e3 * (b - a) / calls for a, b in pairwise(inside)))
    return tuple(medians)
