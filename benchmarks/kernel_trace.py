"""What a profiler trace says of steps: how much of each is outside of all kernels, and where.

Reads the Chrome trace of `torch.profiler` (kineto): one record for each kernel, copy and fill of
the device, those of CUDA graphs one by one. A step ends with the copy of its tokens to the host,
of which each step has one. Needs no GPU and no torch.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

Kind = Literal["kernel", "copy", "fill"]
_KINDS: dict[str, Kind] = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "fill"}
_TO_HOST = "Memcpy DtoH"


@dataclass(frozen=True, slots=True, order=True)
class Activity:
    """One thing that the device did."""

    start_us: float
    end_us: float
    kind: Kind
    name: str
    stream: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Time without a kernel, and the kernels around it."""

    start_us: float
    length_us: float
    before: str
    """The kernel that ended last."""
    after: str
    copies: tuple[str, ...]
    """Copies and fills that began within."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One step between the ends of two copies of tokens."""

    wall_us: float
    kernel_us: float
    """Union over all streams, so kernels side by side count once."""
    busy_us: float
    """The same with copies and fills."""

    @property
    def overhead_percent(self) -> float:
        """Of its wall time, outside of all kernels."""
        return 100 * (1 - self.kernel_us / self.wall_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """All launches of one kernel."""

    name: str
    count: int
    total_us: float
    """Kernels side by side count both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTimes:
    """Steps of a trace in order, and all gaps within them, the longest first."""

    steps: tuple[StepTime, ...]
    gaps: tuple[Gap, ...]
    kernels: tuple[KernelTime, ...]
    """Of these steps, those that take longest first."""

    @property
    def overhead_percent(self) -> float:
        """Of all steps together."""
        kernels = sum(step.kernel_us for step in self.steps)
        return 100 * (1 - kernels / sum(step.wall_us for step in self.steps))

    @property
    def idle_percent(self) -> float:
        """The same, where copies and fills count as work."""
        busy = sum(step.busy_us for step in self.steps)
        return 100 * (1 - busy / sum(step.wall_us for step in self.steps))


def read_trace(path: Path) -> list[Activity]:
    """Activities of the device in order of their start.

    Raises:
        ValueError: not a trace, or one in which the device did nothing.
    """
    try:
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{path} is no Chrome trace of torch.profiler: {err!r}") from err
    activities = sorted(_activity(event) for event in events if event.get("cat") in _KINDS)
    if not activities:
        raise ValueError(f"{path} has no kernel: was the profiler told to record CUDA activities?")
    return activities


def _activity(event: dict[str, Any]) -> Activity:
    start_us = float(event["ts"])
    return Activity(
        start_us=start_us,
        end_us=start_us + float(event["dur"]),
        kind=_KINDS[event["cat"]],
        name=str(event["name"]),
        stream=int(event.get("args", {}).get("stream", -1)),
    )


def step_ends(activities: Iterable[Activity]) -> list[float]:
    """When the tokens of each step had been copied to the host."""
    return sorted(
        activity.end_us
        for activity in activities
        if activity.kind == "copy" and activity.name.startswith(_TO_HOST)
    )


def times(activities: Sequence[Activity], skipped: int = 2) -> TraceTimes:
    """Steps and gaps of a trace.

    Args:
        activities: of all streams, in order of their start.
        skipped: copies of tokens before the first step that counts: starting the profiler holds
            the host up.

    Raises:
        ValueError: no step is left.
    """
    ends = step_ends(activities)[skipped:]
    if len(ends) < 2:
        raise ValueError(
            f"the trace must have at least {skipped + 2} copies of tokens to the host, one a step, "
            f"but has {len(ends) + skipped}: record more steps"
        )
    kernels = [activity for activity in activities if activity.kind == "kernel"]
    in_kernels, busy = _union(kernels), _union(activities)
    steps = tuple(
        StepTime(
            wall_us=end - start,
            kernel_us=_within(in_kernels, start, end),
            busy_us=_within(busy, start, end),
        )
        for start, end in pairwise(ends)
    )
    within = [kernel for kernel in kernels if ends[0] <= kernel.start_us < ends[-1]]
    return TraceTimes(
        steps=steps,
        gaps=_gaps(activities, kernels, ends[0], ends[-1]),
        kernels=_kernel_times(within),
    )


def _kernel_times(kernels: Iterable[Activity]) -> tuple[KernelTime, ...]:
    lengths: dict[str, list[float]] = {}
    for kernel in kernels:
        lengths.setdefault(kernel.name, []).append(kernel.end_us - kernel.start_us)
    found = (
        KernelTime(name=name, count=len(mine), total_us=sum(mine)) for name, mine in lengths.items()
    )
    return tuple(sorted(found, key=lambda kernel: -kernel.total_us))


def _union(activities: Iterable[Activity]) -> list[tuple[float, float]]:
    """Disjoint intervals that cover the same time; `activities` are sorted by start."""
    covered: list[tuple[float, float]] = []
    for activity in activities:
        if covered and activity.start_us <= covered[-1][1]:
            covered[-1] = covered[-1][0], max(covered[-1][1], activity.end_us)
        else:
            covered.append((activity.start_us, activity.end_us))
    return covered


def _within(covered: Iterable[tuple[float, float]], start: float, end: float) -> float:
    return sum(max(0.0, min(b, end) - max(a, start)) for a, b in covered)


def _gaps(
    activities: Sequence[Activity], kernels: Sequence[Activity], start: float, end: float
) -> tuple[Gap, ...]:
    others = [activity for activity in activities if activity.kind != "kernel"]
    other_starts = [activity.start_us for activity in others]
    gaps: list[Gap] = []
    last: Activity | None = None
    for kernel in kernels:
        if last is not None and last.end_us < kernel.start_us and start <= last.end_us < end:
            first = bisect_left(other_starts, last.end_us)
            behind = bisect_left(other_starts, kernel.start_us)
            gaps.append(
                Gap(
                    start_us=last.end_us,
                    length_us=kernel.start_us - last.end_us,
                    before=last.name,
                    after=kernel.name,
                    copies=tuple(other.name for other in others[first:behind]),
                )
            )
        if last is None or kernel.end_us > last.end_us:
            last = kernel
    return tuple(sorted(gaps, key=lambda gap: -gap.length_us))
