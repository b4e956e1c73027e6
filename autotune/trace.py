"""What ran when, on which SMs: tracks for the figures, and `trace.json` for Perfetto.

A track is one schedule played out, planned by the simulator or measured on the GPU. In the trace
each track is a process and each lane a thread (open it in https://ui.perfetto.dev).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..runtime.op_graph import OpGraph, OpKind, Resource
from ..runtime.plan import NanoOp, Schedule

RESOURCES: tuple[Resource, ...] = ("compute", "memory", "network")


class PlayedOp(Protocol):
    """One instance of a nano-op with its times, e.g. an event of the simulator's timeline."""

    @property
    def index(self) -> int:
        """Position of the nano-op in `Schedule.nano_ops`."""
        ...

    @property
    def layer(self) -> int:
        """Layer that it works on."""
        ...

    @property
    def start_us(self) -> float:
        """Start, from the start of the iteration."""
        ...

    @property
    def end_us(self) -> float:
        """End, from the start of the iteration."""
        ...

    @property
    def slowdown(self) -> float:
        """Time beside its neighbours / time alone on the same SMs; 0 where it is not known."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One instance of a nano-op, with all that a reader may ask of it."""

    name: str
    """Id of the nano-op, `<op>.<k>`."""
    op: str
    kind: OpKind
    resource: Resource
    nano_batch: int
    """Index of the nano-batch that holds its first row."""
    tokens: tuple[int, int]
    lane: str
    num_sms: int
    variant: str
    layer: int
    start_us: float
    end_us: float
    slowdown: float

    @property
    def duration_us(self) -> float:
        """End minus start."""
        return self.end_us - self.start_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """One schedule played out."""

    title: str
    """e.g. `overlapped (winner)`."""
    source: str
    """`measured`, `predicted` or `roofline`."""
    period_us: float
    """One whole iteration."""
    measured_us: float
    """The same, measured; 0 where it was not."""
    lanes: tuple[str, ...]
    bars: tuple[Bar, ...]

    def window(self, first_layer: int, num_layers: int) -> Track:
        """The bars between the starts of two layers, clipped and moved to time 0."""
        start = self._layer_start_us(first_layer)
        end = self._layer_start_us(first_layer + num_layers)
        bars = tuple(
            replace(
                bar, start_us=max(bar.start_us, start) - start, end_us=min(bar.end_us, end) - start
            )
            for bar in self.bars
            if bar.start_us < end and bar.end_us > start
        )
        return replace(self, bars=bars)

    def _layer_start_us(self, layer: int) -> float:
        starts = [bar.start_us for bar in self.bars if bar.layer == layer]
        return min(starts) if starts else max(bar.end_us for bar in self.bars)


def track(
    schedule: Schedule,
    graph: OpGraph,
    events: Iterable[PlayedOp],
    *,
    title: str,
    source: str,
    period_us: float,
    measured_us: float = 0.0,
) -> Track:
    """Join the events of a played schedule with what its nano-ops are."""
    ids = schedule.ids
    bars: list[Bar] = []
    for event in sorted(events, key=lambda event: (event.start_us, event.index)):
        nano_op = schedule.nano_ops[event.index]
        op = graph.op(nano_op.op)
        bars.append(
            Bar(
                name=ids[event.index],
                op=op.name,
                kind=op.kind,
                resource=op.resource,
                nano_batch=nano_batch_index(schedule, nano_op),
                tokens=nano_op.tokens,
                lane=nano_op.lane,
                num_sms=nano_op.num_sms,
                variant=nano_op.variant,
                layer=event.layer,
                start_us=event.start_us,
                end_us=event.end_us,
                slowdown=event.slowdown,
            )
        )
    return Track(
        title=title,
        source=source,
        period_us=period_us,
        measured_us=measured_us,
        lanes=schedule.lanes,
        bars=tuple(bars),
    )


def nano_batch_index(schedule: Schedule, nano_op: NanoOp) -> int:
    """Index of the nano-batch that holds the first row of a nano-op."""
    return sum(1 for batch in schedule.nano_batches if batch.tokens[1] <= nano_op.tokens[0])


def trace_json(tracks: Sequence[Track]) -> str:
    """All tracks as one Chrome trace."""
    events: list[dict[str, Any]] = []
    for pid, played in enumerate(tracks, start=1):
        events += _metadata(pid, played)
        events += [_complete_event(pid, played, bar) for bar in played.bars]
        events += _sm_counter(pid, played.bars)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))


def _metadata(pid: int, played: Track) -> list[dict[str, Any]]:
    name = f"{played.title}, {played.source}"
    events = [_name(pid, 0, "process_name", name)]
    events += [_name(pid, tid, "thread_name", lane) for tid, lane in enumerate(played.lanes, 1)]
    return events


def _name(pid: int, tid: int, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}


def _complete_event(pid: int, played: Track, bar: Bar) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": pid,
        "tid": played.lanes.index(bar.lane) + 1,
        "name": bar.name,
        "cat": bar.resource,
        "ts": round(bar.start_us, 3),
        "dur": round(bar.duration_us, 3),
        "args": {
            "layer": bar.layer,
            "tokens": f"[{bar.tokens[0]}, {bar.tokens[1]})",
            "num_sms": bar.num_sms,
            "variant": bar.variant,
            **({"slowdown": round(bar.slowdown, 4)} if bar.slowdown else {}),
        },
    }


def _sm_counter(pid: int, bars: Iterable[Bar]) -> list[dict[str, Any]]:
    return [
        {"ph": "C", "pid": pid, "name": "SMs in use", "ts": round(time_us, 3), "args": args}
        for time_us, args in sm_usage(bars, lambda bar: bar.resource, RESOURCES)
    ]


def sm_usage(
    bars: Iterable[Bar], classify: Callable[[Bar], str], classes: Sequence[str]
) -> list[tuple[float, dict[str, int]]]:
    """SMs held by each class of bars from each moment on, in time order."""
    changes: dict[float, dict[str, int]] = {}
    for bar in bars:
        for time_us, sign in ((bar.start_us, 1), (bar.end_us, -1)):
            change = changes.setdefault(round(time_us, 3), {})
            name = classify(bar)
            change[name] = change.get(name, 0) + sign * bar.num_sms
    usage = dict.fromkeys(classes, 0)
    steps: list[tuple[float, dict[str, int]]] = []
    for time_us in sorted(changes):
        for name, change in changes[time_us].items():
            usage[name] += change
        steps.append((time_us, dict(usage)))
    return steps
