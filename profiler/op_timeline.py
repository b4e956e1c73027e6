"""When each nano-op of a schedule runs on the GPU: CUDA events around every one, medians over runs.

The runs are eager, because events inside a captured graph cannot be read one by one. Replays of the
schedule's graph go ahead of each: they keep the card as hot as the schedule itself does, and give
the host the lead that it needs to stay ahead of the GPU; without it the gaps between short nano-ops
would be the host's. Two events a nano-op cost about a microsecond or two, so the iteration is timed
elsewhere (`iteration.py`).

Runs on every tensor-parallel rank, in step.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from ..runtime.executor import Executor
from ..runtime.launch import RankContext
from ..runtime.plan import Schedule
from ..runtime.schedule import Instance
from .iteration import agree, captured, iterations_of, loaded_for, warm
from .rank_jobs import IterationCase, OpTime

TURN_S = 0.5
"""Of replays before the first run of a schedule is looked at."""
REPLAYS_AHEAD = 3
"""Iterations in front of each run: enqueuing a run takes the host less than one."""


def measure_timelines(
    ctx: RankContext, case: IterationCase, schedules: Sequence[Schedule], runs: int
) -> list[list[OpTime]]:
    """When each nano-op of each schedule runs on this rank.

    Args:
        ctx: this rank.
        case: model, GPUs, batch; its weights stay loaded.
        schedules: to run, one after the other.
        runs: of each; a time is the median over them.

    Returns:
        One list per schedule, in issue order; ranges without rows of their kind take no time.
    """
    loaded = loaded_for(ctx, case, schedules)
    return [_timeline(captured(ctx, loaded, schedule), runs) for schedule in schedules]


def _timeline(executor: Executor, runs: int) -> list[OpTime]:
    warm([executor], agree([iterations_of(executor, TURN_S)]), TURN_S)
    marks = _Marks(len(executor.instances))
    times: list[list[tuple[float, float]]] = []
    for _ in range(runs):
        for _ in range(REPLAYS_AHEAD):
            executor.replay()
        marks.rewind()
        executor.run(observe=marks.after, before=marks.before)
        torch.cuda.synchronize()
        times.append(marks.times_us())
    return medians(executor.instances, times)


class _Marks:
    """An event before and one behind each instance, on the stream that it runs on."""

    def __init__(self, count: int) -> None:
        self._begins = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        self._ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        self._next = 0

    def rewind(self) -> None:
        self._next = 0

    def before(self, _: Instance) -> None:
        self._begins[self._next].record(torch.cuda.current_stream())

    def after(self, _: Instance) -> None:
        self._ends[self._next].record(torch.cuda.current_stream())
        self._next += 1

    def times_us(self) -> list[tuple[float, float]]:
        first = self._begins[0]
        return [
            (1e3 * first.elapsed_time(begin), 1e3 * first.elapsed_time(end))
            for begin, end in zip(self._begins, self._ends, strict=True)
        ]


def medians(
    instances: Sequence[Instance], times: Sequence[Sequence[tuple[float, float]]]
) -> list[OpTime]:
    """One record per instance from several runs of them, in the order of the instances.

    The first of them that starts is at 0. Durations are medians of durations, so that a run which
    is late as a whole does not stretch a nano-op.

    Args:
        instances: of an executor.
        times: of each run, (start, end) of each instance in us.
    """
    found: list[OpTime] = []
    earliest = [min(start for start, _ in run) for run in times]
    for place, instance in enumerate(instances):
        starts = [run[place][0] - zero for run, zero in zip(times, earliest, strict=True)]
        lengths = [run[place][1] - run[place][0] for run in times]
        start_us = statistics.median(starts)
        found.append(
            OpTime(
                index=instance.index,
                layer=instance.layer,
                start_us=start_us,
                end_us=start_us + max(0.0, statistics.median(lengths)),
            )
        )
    return found
