"""Times kernels on a warm GPU: CUDA-graph batches of rotated calls, sampled with events.

The regime is a server under load: the card sits on its power cap, operands come from HBM. So a
heater (a large GEMM) runs whenever the host prepares the next case, each case is warmed before it
is sampled, and a batch rotates over operand sets that together exceed the L2 cache. Launch cost is
not in the figures: a batch of calls is one graph.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .power import PowerMeter


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
    """Two batches side by side: time of one call of each while both ran."""

    median_us: tuple[float, float]
    watts: float
    sm_clock_mhz: float
    n: int


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
            calls[0]()  # compiles
            start.record()
            for call in calls:
                call()
            end.record()
        stream.synchronize()
        once_ms = start.elapsed_time(end) / len(calls)
        return max(len(calls), min(400, round(batch_ms / max(once_ms, 1e-3))))

    def batch(
        self, calls: Sequence[Callable[[], None]], stream: torch.cuda.Stream, batch_ms: float = 3.0
    ) -> Batch:
        """Capture a batch of about `batch_ms`, heating the card meanwhile."""
        stream.wait_stream(torch.cuda.current_stream())
        repeats = self.calls_per_batch(calls, stream, batch_ms)
        self.heat(12.0)
        return Batch(calls, stream, repeats)

    def sample(self, batch: Batch, warm_ms: float = 8.0, sample_ms: float = 30.0) -> Samples:
        """Replay for `warm_ms`, then sample batches for at least `sample_ms`."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        batch.replay()
        end.record()
        end.synchronize()
        batch_ms = max(start.elapsed_time(end), 1e-2)
        for _ in range(round(warm_ms / batch_ms)):
            batch.replay()
        count = max(5, round(sample_ms / batch_ms) + 1)
        return self._timed(batch, count)

    def sample_fixed(self, batch: Batch, warm: int, count: int) -> Samples:
        """Sample a fixed number of batches: what ranks that must stay in step use."""
        for _ in range(warm):
            batch.replay()
        return self._timed(batch, count)

    def _timed(self, batch: Batch, count: int) -> Samples:
        times_us, clock = timed_replays(batch.replay, count, self.meter)
        return Samples(times_us=tuple(us / batch.num_calls for us in times_us), sm_clock_mhz=clock)

    def sample_together(
        self, a: Batch, b: Batch, alone_us: Sequence[float], seconds: float
    ) -> Together:
        """Replay two batches on their partitions at once and time both while both run."""
        launchers = torch.cuda.Stream(), torch.cuda.Stream()
        begin = torch.cuda.Event(enable_timing=True)
        marks: list[list[torch.cuda.Event]] = [[], []]
        counts = [
            max(8, round(seconds * 1e6 / (us * batch.num_calls)))
            for batch, us in zip((a, b), alone_us, strict=True)
        ]
        self.heat(100.0)
        torch.cuda.synchronize()
        begin.record()
        for launcher in launchers:
            launcher.wait_event(begin)
        clock = 0.0
        with self.meter as meter:
            for turn in range(max(counts)):
                for which, batch in enumerate((a, b)):
                    if turn * counts[which] // max(counts) >= len(marks[which]):
                        with torch.cuda.stream(launchers[which]):
                            batch.replay()
                            mark = torch.cuda.Event(enable_timing=True)
                            mark.record()
                            marks[which].append(mark)
                if turn == max(counts) // 2:
                    marks[0][len(marks[0]) // 4].synchronize()
                    clock = self.meter.sm_clock_mhz
            torch.cuda.synchronize()
        ends = [[begin.elapsed_time(mark) for mark in column] for column in marks]
        until = min(column[-1] for column in ends)
        medians: list[float] = []
        for batch, column in zip((a, b), ends, strict=True):
            inside = [time for time in column if time <= until]
            steps = [
                1e3 * (later - earlier) / batch.num_calls for earlier, later in pairwise(inside)
            ]
            medians.append(statistics.median(steps))
        return Together(
            median_us=(medians[0], medians[1]),
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

    def joules_per_call(self, batch: Batch, median_us: float, seconds: float = 0.5) -> float:
        """Board joules of one call over at least `seconds` of back-to-back batches."""
        count = max(3, round(seconds * 1e6 / (median_us * batch.num_calls)))
        torch.cuda.synchronize()
        for _ in range(max(1, count // 5)):
            batch.replay()
        torch.cuda.synchronize()
        with self.meter as meter:
            for _ in range(count):
                batch.replay()
            torch.cuda.synchronize()
        return meter.joules / (count * batch.num_calls)
