"""When each nano-op of an iteration runs, by discrete events: what a schedule costs, predicted.

An instance starts when all that it waits for has finished, and runs at rate 1 / slowdown, which
changes whenever something beside it starts or ends.

Slowdown of a nano-op = product of its pairwise slowdowns against all that run beside it. Only
pairs are measured; the product treats their causes (bandwidth, L2, clocks) as independent. With
two lanes busy it is exact, with three it is never below the largest single slowdown, as measured
triples are not.

Power: a kernel alone is timed for 12 to 30 ms, shorter than the card takes to enforce its cap; a
whole iteration is held to it. So `predict` lowers the clock (`power_model.py`) until the timeline,
stretched where it is bound by compute, gives the dynamic joules the time that the cap asks for.
Roofline figures stay what the datasheet says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..profiler.profile import Source
from ..runtime.op_graph import Op, OpGraph, RowMix
from ..runtime.plan import NanoOp, Schedule, Timing
from ..runtime.schedule import Instance, row_mix, unroll
from .copy_transport import ops_as_run
from .cost_model import CostModel, Estimate
from .power_model import FASTEST, Load, PowerModel, Price, period_at

SYNC_US = 2.0
"""Start of a nano-op that waits for another stream (lane or share): event record, wait, launch."""
ROOFLINE_SHARE = 0.05
"""Above this part of solo time from the roofline, a prediction is called `roofline`."""
STEADY_TOLERANCE = 1e-9
CLOCK_TOLERANCE, MOST_CLOCKS = 0.002, 5
"""Of a plan's period at the clock found for it, and how many clocks are simulated at most."""


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
        scale: Callable[[Op, RowMix], float] | None = None,
    ) -> None:
        self.schedule, self.graph, self.cost_model, self.mix = schedule, graph, cost_model, mix
        self.sync_us = sync_us
        self._scale = scale
        """Factor on time and joules of an op, to ask what if."""
        self._ops = ops_as_run(schedule, graph)
        self._slowdowns: dict[tuple[int, int], float] = {}

    @cached_property
    def loads(self) -> tuple[Load, ...]:
        """Each nano-op as power management sees it; for cost models with a power model."""
        power = self.cost_model.power
        assert power is not None
        contexts = self.mix.decode_context_tokens, self.mix.prefill_context_tokens
        loads: list[Load] = []
        for op, nano_op, cost in zip(self._ops, self.schedule.nano_ops, self.solo, strict=True):
            rows = row_mix(self.schedule, nano_op.tokens, *contexts)
            factor = self._scale(op, rows) if self._scale else 1.0
            load = power.load(op, rows, nano_op.num_sms, nano_op.variant, cost.us / factor)
            loads.append(replace(load, us=cost.us, joules=load.joules * factor))
        return tuple(loads)

    @cached_property
    def _overhead(self) -> tuple[Load, ...]:
        return self.cost_model.overhead_loads(self.graph, self.mix)

    def joules(self) -> float:
        """Dynamic joules of an iteration of one GPU at the highest clock."""
        layer = sum(load.joules for load in self.loads)
        return layer * self.graph.num_layers + sum(load.joules for load in self._overhead)

    def price(self) -> Price:
        """What a joule is worth to this schedule; `FASTEST` where only the datasheet is known."""
        power = self.cost_model.power if self.cost_model.energy else None
        if power is None or self._source() == "roofline":
            return FASTEST
        layer = [(load, self.graph.num_layers) for load in self.loads]
        return power.price([*layer, *((load, 1) for load in self._overhead)])

    def under_cap(self, power: PowerModel, burst_us: float) -> tuple[float, float]:
        """Clock and period in us of the plan at the cap, from the period at the highest clock."""
        joules, periods = self.joules(), {1.0: burst_us}

        def told_us(clock: float) -> float:
            return period_at(periods, clock)

        clock = power.clock_under_cap(joules, told_us)
        if clock >= 1.0:
            return clock, burst_us
        burst_sum_us = sum(load.us for load in self.loads)

        def in_a_row_us(clock: float) -> float:
            return burst_us * sum(load.us_at(clock) for load in self.loads) / burst_sum_us

        clock = power.clock_under_cap(joules, in_a_row_us)  # a first guess
        for _ in range(MOST_CLOCKS):
            expected_us = told_us(clock)
            simulated_us = periods[clock] = self.timeline(clock=clock).period_us
            clock = power.clock_under_cap(joules, told_us)
            if abs(simulated_us - expected_us) <= CLOCK_TOLERANCE * expected_us:
                break
        return clock, told_us(clock)

    @cached_property
    def solo(self) -> tuple[Estimate, ...]:
        """Each nano-op alone on its share."""
        contexts = self.mix.decode_context_tokens, self.mix.prefill_context_tokens
        found: list[Estimate] = []
        for op, nano_op in zip(self._ops, self.schedule.nano_ops, strict=True):
            rows = row_mix(self.schedule, nano_op.tokens, *contexts)
            cost = self.cost_model.estimate(op, rows, nano_op.num_sms, nano_op.variant)
            factor = self._scale(op, rows) if self._scale else 1.0
            found.append(replace(cost, us=cost.us * factor))
        return tuple(found)

    def solo_us(self, clock: float) -> tuple[float, ...]:
        """Time of each nano-op alone on its share, at a clock (a part of the highest)."""
        if clock >= 1.0:
            return tuple(cost.us for cost in self.solo)
        return tuple(load.us_at(clock) for load in self.loads)

    def events(self, num_layers: int, clock: float = 1.0) -> list[Event]:
        """Simulate this many layers from start to drain."""
        instances = unroll(self.schedule, self.graph, num_layers)
        return _Run(self, instances, self.solo_us(clock), self._hidden(clock)).events()

    def _hidden(self, clock: float) -> tuple[float, ...]:
        """Slowdown that neighbours may cause without effect: what the clock has cost already.

        A memory-bound op waits either for its SMs' ports, which are as slow as the clock, or for
        memory that others use: the larger of the two counts, not their product.
        """
        return tuple(
            at_us / cost.us if cost.us and op.resource == "memory" else 1.0
            for op, cost, at_us in zip(self._ops, self.solo, self.solo_us(clock), strict=True)
        )

    def timeline(self, num_layers: int | None = None, clock: float = 1.0) -> Timeline:
        """The whole iteration.

        Args:
            num_layers: layers to give events of; None simulates until the pattern repeats itself
                exactly and adds the remaining layers at that pace.
            clock: SM clock as a part of the highest; below 1 with a power model only.
        """
        total = self.graph.num_layers
        count = min(total, num_layers or self.schedule.max_stage + 6)
        events, layer_us = self.events(count, clock), None
        while count < total:
            layer_us = steady_layer_us(events, count, self.schedule)
            if layer_us is not None:
                break
            count = min(total, 2 * count)
            events = self.events(count, clock)
        end_us = max((event.end_us for event in events), default=0.0)
        makespan_us = end_us + (total - count) * (layer_us or 0.0)
        overhead = self.cost_model.iteration_overhead(self.graph, self.mix)
        period_us = makespan_us + overhead.us
        if clock < 1.0:
            period_us += sum(load.us_at(clock) - load.us for load in self._overhead)
        return Timeline(
            events=tuple(events),
            makespan_us=makespan_us,
            period_us=period_us,
            layer_us=layer_us if layer_us is not None else end_us / count,
            joules=self._joules(period_us, clock),
            source=self._source(),
        )

    def slowdown(self, a: int, b: int) -> float:
        """Of nano-op a beside nano-op b."""
        if (a, b) not in self._slowdowns:
            first, second = self.schedule.nano_ops[a], self.schedule.nano_ops[b]
            self._slowdowns[a, b] = self.cost_model.slowdown(
                self._ops[a],
                first.num_sms,
                self._ops[b],
                second.num_sms,
                first.variant,
                second.variant,
            )
        return self._slowdowns[a, b]

    def _joules(self, period_us: float, clock: float) -> float:
        """Dynamic joules of all ops, and static power once for the whole time."""
        power = self.cost_model.power if self.cost_model.energy else None
        if power is None:
            return 0.0
        dynamic = power.joules_at(self.joules(), clock)
        return dynamic + power.base.static_w * period_us * 1e-6

    def _source(self) -> Source:
        total_us = sum(cost.us for cost in self.solo)
        roofline_us = sum(cost.us for cost in self.solo if cost.source == "roofline")
        if roofline_us > ROOFLINE_SHARE * total_us:
            return "roofline"
        is_measured = all(cost.source == "measured" for cost in self.solo)
        return "measured" if is_measured else "interpolated"


class _Run:
    """State of one simulation: what waits, what runs, how much of it is left."""

    def __init__(
        self,
        simulator: Simulator,
        instances: Sequence[Instance],
        solo_us: Sequence[float],
        hidden: Sequence[float],
    ) -> None:
        self.simulator, self.instances = simulator, instances
        self.solo_us, self.hidden = solo_us, hidden
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
        solo_us = self.solo_us[instance.index]
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
        return max(1.0, product / self.hidden[index]) if self.hidden[index] > 1.0 else product

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
    """Simulated timing of one iteration; joules of all GPUs, watts and clock of one."""
    simulator = Simulator(schedule, graph, cost_model, mix)
    timeline = simulator.timeline()
    power = cost_model.power if cost_model.energy else None
    period_us, joules, clock_mhz = timeline.period_us, timeline.joules, 0.0
    if power is not None and timeline.source != "roofline":
        clock, period_us = simulator.under_cap(power, period_us)
        joules = power.joules_at(simulator.joules(), clock)
        joules += power.base.static_w * period_us * 1e-6
        clock_mhz = clock * power.max_clock_mhz
    return Timing(
        period_us=period_us,
        source="roofline" if timeline.source == "roofline" else "predicted",
        p10_us=period_us,
        p90_us=period_us,
        joules=joules * graph.tp_degree,
        watts=joules / period_us * 1e6,
        sm_clock_mhz=clock_mhz,
    )
