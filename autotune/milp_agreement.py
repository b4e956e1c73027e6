"""Does the MILP's model of time agree with the simulator? The same schedule in both.

They differ in what a nano-op takes, not in what it waits for. The MILP has one time for each share:
the mean slowdown beside a typical op of the other lanes, and one synchronisation; the simulator has
the slowdown beside what really runs, for as long as it does. So where the two periods differ by
more than `LARGEST_DIFFERENCE`, the MILP orders its nodes again, with the time that each took in the
simulator (`milp_repricing.py`). Another order has other neighbours: a few rounds, then the schedule
that the simulator finds shortest keeps its order and is timed by the MILP's constraints alone, with
its own simulated times. What is then left between the two periods is phase and drain.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Schedule
from ..runtime.schedule import period_edges
from .brute_force import Wait, least_period_us
from .cost_model import CostModel
from .patterns import macro_ops
from .simulator import Simulator

MOST_LAYERS = 60
LARGEST_DIFFERENCE = 0.01
"""Of the MILP's period from the simulated one, relative."""
MOST_ROUNDS = 2
"""Times that the MILP orders its nodes again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Steady time of one layer of one schedule, in us."""

    simulated_us: float
    same_interference_us: float
    """By the MILP's constraints, with the simulated time of each nano-op."""
    nano_op_us: tuple[float, ...]
    """What each nano-op of the schedule took in the simulator, in a steady layer."""

    def node_us(self, schedule: Schedule, graph: OpGraph) -> dict[int, float]:
        """The same by node of the MILP; those without rows are left out."""
        macros = macro_ops(graph)
        home = {op.name: index for index, macro in enumerate(macros) for op in macro.all_ops}
        batch_of = {batch.tokens: index for index, batch in enumerate(schedule.nano_batches)}
        found: dict[int, float] = {}
        for nano_op, us in zip(schedule.nano_ops, self.nano_op_us, strict=True):
            node = batch_of[nano_op.tokens] * len(macros) + home[nano_op.op]
            found[node] = found.get(node, 0.0) + us
        return found

    @property
    def difference(self) -> float:
        """Relative, with the same interference."""
        return abs(self.same_interference_us / self.simulated_us - 1)


def agreement(schedule: Schedule, graph: OpGraph, cost_model: CostModel, mix: RowMix) -> Agreement:
    """Both periods of a schedule."""
    simulator = Simulator(schedule, graph, cost_model, mix)
    simulated_us = simulator.timeline().layer_us
    layers = min(MOST_LAYERS, 4 * schedule.max_stage + 12)
    middle = layers // 2
    times = [0.0] * len(schedule.nano_ops)
    for event in simulator.events(layers):
        if event.layer == middle:
            times[event.index] = event.end_us - event.start_us
    return Agreement(
        simulated_us=simulated_us,
        same_interference_us=least_period_us(_waits(schedule, graph), times),
        nano_op_us=tuple(times),
    )


def _waits(schedule: Schedule, graph: OpGraph) -> list[Wait]:
    """Dependencies, `after` edges, and turns within each lane."""
    waits = [
        Wait(before=before, after=after, height=periods)
        for before, after, periods in period_edges(schedule, graph)
    ]
    for lane in schedule.lanes:
        members = [i for i, nano_op in enumerate(schedule.nano_ops) if nano_op.lane == lane]
        for before, after in zip(members, [*members[1:], members[0]], strict=True):
            waits.append(Wait(before=before, after=after, height=int(after <= before)))
    return waits
