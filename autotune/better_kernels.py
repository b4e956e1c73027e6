"""Other kernels for single nano-ops of a schedule, where a plan gets faster by them.

Kernels are chosen by one price of a joule for the whole plan. What one nano-op costs its neighbours
and whether anything waits for it differ, so that the best few schedules try others, one at a time.
"""

from __future__ import annotations

from dataclasses import replace

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Candidate
from .copy_transport import ops_as_run
from .cost_model import CostModel
from .simulator import predict

ROUNDS = 2
WORTH = 1e-5
"""Part of the period below which another kernel is no gain."""


def with_better_kernels(
    best: Candidate, graph: OpGraph, cost_model: CostModel, mix: RowMix
) -> Candidate:
    """The schedule with every single change of a kernel that shortens its predicted period.

    Shares, order and nano-batches stay, so that it is as legal as before.
    """
    for _ in range(ROUNDS):
        before = best
        ops = ops_as_run(best.schedule, graph)
        for number, op in enumerate(ops):
            for variant in cost_model.variants(op, best.schedule.nano_ops[number].num_sms):
                nano_ops = list(best.schedule.nano_ops)
                if nano_ops[number].variant == variant:
                    continue
                nano_ops[number] = replace(nano_ops[number], variant=variant)
                other = replace(best.schedule, nano_ops=tuple(nano_ops))
                timing = predict(other, graph, cost_model, mix)
                if timing.period_us < best.predicted.period_us * (1 - WORTH):
                    best = Candidate(schedule=other, predicted=timing)
        if best is before:
            break
    return best
