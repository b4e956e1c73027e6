"""When each nano-op of an iteration runs, by discrete events: what a schedule costs, predicted.

An instance starts when all that it waits for has finished, and runs at rate 1 / slowdown, which
changes whenever something beside it starts or ends.

Slowdown of a nano-op = product of its pairwise slowdowns against all that run beside it. Only
pairs are measured; the product treats their causes (bandwidth, L2, clocks) as independent. With
two lanes busy it is exact, with three it is never below the largest single slowdown, as measured
triples are not.

Power: a kernel alone is timed for 30 ms, shorter than the card takes to enforce its cap; a whole
iteration is held to it. So `predict` joins two times, the timeline's and the one that the dynamic
joules need under the cap, by a p-norm: either alone when it is far the larger, some percent more
when both press. Roofline figures stay what the datasheet says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..profiler.profile import Source
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.op_shapes import moved_bytes
from ..runtime.plan import NanoOp, Schedule, Timing
from ..runtime.schedule import Instance, row_mix, unroll
from .copy_transport import ops_as_run
from .cost_model import CostModel, Estimate

SYNC_US = 2.0
"""Start of a nano-op that waits for another stream (lane or share): event record, wait, launch."""
ROOFLINE_SHARE = 0.05
"""Above this part of solo time from the roofline, a prediction is called `roofline`."""
STEADY_TOLERANCE = 1e-9
POWER_NORM = 16
"""Exponent that joins timeline and power limit. Against the two sequential iterations measured for
results/: llama3-8b TP1 +2 %, llama2-70b TP2 -2 %."""


@dataclass(frozen=True, slots=True)
class Event:
    """One nano-op of one layer, as simulated."""

    index: int
    """Position in `Schedule.nano_ops`."""
    layer: int
    lane: str
    num_sms: int
    start_us: float
    end_us: float
    slowdown: float
    """Time it took / time alone on the same SMs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A simulated iteration."""

    events: tuple[Event, ...]
    """Of the layers that were simulated, by start."""
    makespan_us: float
    """All layers."""
    period_us: float
    """The whole iteration: all layers, embedding, LM head, sampling."""
    layer_us: float
    """Steady time of one more layer."""
    joules: float
    """Of one iteration, one GPU."""
    source: Source


class Simulator:
    """One schedule with its solo costs looked up."""

    def __init__(
        self,
        schedule: Schedule,
        graph: OpGraph,
        cost_model: CostModel,
        mix: RowMix,
        sync_us: float = SYNC_US,
    ) -> None:
        self.schedule, self.graph, self.cost_model, self.mix = schedule, graph, cost_model, mix
        self.sync_us = sync_us
        self._ops = ops_as_run(schedule, graph)
        self._slowdowns: dict[tuple[int, int], float] = {}

    @cached_property
    def solo(self) -> tuple[Estimate, ...]:
        """Each nano-op alone on its share."""
        contexts = self.mix.decode_context_tokens, self.mix.prefill_context_tokens
        return tuple(
            self.cost_model.estimate(
                op,
                row_mix(self.schedule, nano_op.tokens, *contexts),
                nano_op.num_sms,
                nano_op.variant,
            )
            for op, nano_op in zip(self._ops, self.schedule.nano_ops, strict=True)
        )

    def events(self, num_layers: int) -> list[Event]:
        """Simulate this many layers from start to drain."""
        instances = unroll(self.schedule, self.graph, num_layers)
        return _Run(self, instances).events()

    def timeline(self, num_layers: int | None = None) -> Timeline:
        """The whole iteration.

        Args:
            num_layers: layers to give events of; None simulates until the pattern repeats itself
                exactly and adds the remaining layers at that pace.
        """
        total = self.graph.num_layers
        count = min(total, num_layers or self.schedule.max_stage + 6)
        events, layer_us = self.events(count), None
        while count < total:
            layer_us = steady_layer_us(events, count, self.schedule)
            if layer_us is not None:
                break
            count = min(total, 2 * count)
            events = self.events(count)
        end_us = max((event.end_us for event in events), default=0.0)
        makespan_us = end_us + (total - count) * (layer_us or 0.0)
        overhead = self.cost_model.iteration_overhead(self.graph, self.mix)
        period_us = makespan_us + overhead.us
        return Timeline(
            events=tuple(events),
            makespan_us=makespan_us,
            period_us=period_us,
            layer_us=layer_us if layer_us is not None else end_us / count,
            joules=self._joules(period_us, overhead),
            source=self._source(),
        )

    def slowdown(self, a: int, b: int) -> float:
        """Of nano-op a beside nano-op b."""
        if (a, b) not in self._slowdowns:
            first, second = self.schedule.nano_ops[a], self.schedule.nano_ops[b]
            self._slowdowns[a, b] = self.cost_model.slowdown(
                self._ops[a], first.num_sms, self._ops[b], second.num_sms
            )
        return self._slowdowns[a, b]

    def _joules(self, period_us: float, overhead: Estimate) -> float:
        """Dynamic joules of all ops, and static power once for the whole time."""
        energy = self.cost_model.energy
        if energy is None:
            return 0.0
        static_j_per_us = energy.static_w * 1e-6
        contexts = self.mix.decode_context_tokens, self.mix.prefill_context_tokens
        layer_j = 0.0
        for op, nano_op in zip(self._ops, self.schedule.nano_ops, strict=True):
            rows = row_mix(self.schedule, nano_op.tokens, *contexts)
            memory_bytes = moved_bytes(op, rows, nano_op.variant)
            layer_j += energy.dynamic_joules(op.flops(rows), memory_bytes, op.link_bytes(rows))
        overhead_j = max(0.0, overhead.joules - overhead.us * static_j_per_us)
        return layer_j * self.graph.num_layers + overhead_j + period_us * static_j_per_us

    def _source(self) -> Source:
        total_us = sum(cost.us for cost in self.solo)
        roofline_us = sum(cost.us for cost in self.solo if cost.source == "roofline")
        if roofline_us > ROOFLINE_SHARE * total_us:
            return "roofline"
        is_measured = all(cost.source == "measured" for cost in self.solo)
        return "measured" if is_measured else "interpolated"


class _Run:
    """State of one simulation: what waits, what runs, how much of it is left."""

    def __init__(self, simulator: Simulator, instances: Sequence[Instance]) -> None:
        self.simulator, self.instances = simulator, instances
        self.missing = [len(instance.waits_for) for instance in instances]
        self.followers: list[list[int]] = [[] for _ in instances]
        for here, instance in enumerate(instances):
            for there in instance.waits_for:
                self.followers[there].append(here)
        self.left_us: dict[int, float] = {}  # of running instances, at solo speed
        self.start_us = [0.0] * len(instances)
        self.end_us = [0.0] * len(instances)
        self.now_us = 0.0

    def events(self) -> list[Event]:
        self._start([here for here, count in enumerate(self.missing) if count == 0])
        while self.left_us:
            self._advance()
        order = sorted(range(len(self.instances)), key=lambda here: (self.start_us[here], here))
        return [self._event(here) for here in order]

    def _start(self, ready: list[int]) -> None:
        for here in ready:
            self.start_us[here] = self.now_us
            self.left_us[here] = self._work_us(here)

    def _work_us(self, here: int) -> float:
        """Solo time, and the synchronisation when it waits for another stream."""
        instance, nano_ops = self.instances[here], self.simulator.schedule.nano_ops
        solo_us = self.simulator.solo[instance.index].us
        if solo_us == 0.0:
            return 0.0
        mine = nano_ops[instance.index]
        for there in instance.waits_for:
            other = nano_ops[self.instances[there].index]
            if self._stream(mine) != self._stream(other):
                return solo_us + self.simulator.sync_us
        return solo_us

    def _stream(self, nano_op: NanoOp) -> tuple[str, int]:
        """Lane and share: a lane has one stream for all SMs and for none."""
        return nano_op.lane, nano_op.num_sms % self.simulator.cost_model.hardware.num_sms

    def _advance(self) -> None:
        """Move to the next end, and start what it releases."""
        rates = {here: 1 / self._slowdown(here) for here in self.left_us}
        step_us = min(left / rates[here] for here, left in self.left_us.items())
        self.now_us += step_us
        finished: list[int] = []
        for here in self.left_us:
            self.left_us[here] -= step_us * rates[here]
            if self.left_us[here] <= 1e-7:
                finished.append(here)
        ready: list[int] = []
        for here in finished:
            del self.left_us[here]
            self.end_us[here] = self.now_us
            for follower in self.followers[here]:
                self.missing[follower] -= 1
                if self.missing[follower] == 0:
                    ready.append(follower)
        self._start(sorted(ready))

    def _slowdown(self, here: int) -> float:
        product = 1.0
        if self.left_us[here] == 0.0:
            return product
        index = self.instances[here].index
        for other, left_us in self.left_us.items():
            if other != here and left_us > 0.0:
                product *= self.simulator.slowdown(index, self.instances[other].index)
        return product

    def _event(self, here: int) -> Event:
        instance = self.instances[here]
        nano_op = self.simulator.schedule.nano_ops[instance.index]
        work_us = self._work_us(here)
        took_us = self.end_us[here] - self.start_us[here]
        return Event(
            index=instance.index,
            layer=instance.layer,
            lane=nano_op.lane,
            num_sms=nano_op.num_sms,
            start_us=self.start_us[here],
            end_us=self.end_us[here],
            slowdown=took_us / work_us if work_us else 1.0,
        )


def steady_layer_us(events: Sequence[Event], num_layers: int, schedule: Schedule) -> float | None:
    """Time between layers once every nano-op repeats at the same pace, or None before that.

    Looked for in the last three layers of which all neighbours were simulated too.
    """
    start = {(event.index, event.layer): event.start_us for event in events}
    last = num_layers - 1 - schedule.max_stage
    if last < 2:
        return None
    pace = [
        start[index, layer] - start[index, layer - 1]
        for layer in (last - 1, last)
        for index in range(len(schedule.nano_ops))
    ]
    if max(pace) - min(pace) > STEADY_TOLERANCE * max(start.values()):
        return None
    return pace[0]


def simulate(
    schedule: Schedule,
    graph: OpGraph,
    cost_model: CostModel,
    mix: RowMix,
    num_layers: int | None = None,
    sync_us: float = SYNC_US,
) -> Timeline:
    """The timeline of one iteration; see `Simulator.timeline`."""
    return Simulator(schedule, graph, cost_model, mix, sync_us).timeline(num_layers)


def predict(schedule: Schedule, graph: OpGraph, cost_model: CostModel, mix: RowMix) -> Timing:
    """Simulated timing of one iteration; joules of all GPUs, watts of one."""
    timeline, energy = simulate(schedule, graph, cost_model, mix), cost_model.energy
    period_us, joules = timeline.period_us, timeline.joules
    if energy is not None and timeline.source != "roofline":
        dynamic = joules - energy.static_w * period_us * 1e-6
        headroom_w = max(1.0, cost_model.hardware.power_cap_w - energy.static_w)
        period_us = _joined(period_us, 1e6 * dynamic / headroom_w)
        joules = dynamic + energy.static_w * period_us * 1e-6
    return Timing(
        period_us=period_us,
        source="roofline" if timeline.source == "roofline" else "predicted",
        p10_us=period_us,
        p90_us=period_us,
        joules=joules * graph.tp_degree,
        watts=joules / period_us * 1e6,
    )


def _joined(a_us: float, b_us: float) -> float:
    """p-norm of two times that both have to pass."""
    larger, smaller = max(a_us, b_us), min(a_us, b_us)
    return larger * (1 + (smaller / larger) ** POWER_NORM) ** (1 / POWER_NORM)
