"""Which nano-ops of a cut may run at the same instant, on which shares, and how fast.

The options and rates of the configuration LP (`configuration_lp.py`) of a graph and cost model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..runtime.op_graph import OpGraph
from .configuration_lp import Array, Lanes, Option
from .cost_model import CostModel
from .patterns import COMPUTE, MEMORY, NETWORK, lane_of

LANES = COMPUTE, MEMORY, NETWORK


def make_lanes(
    graph: OpGraph, cost_model: CostModel, shares_of: Mapping[str, Sequence[int]], num_batches: int
) -> Lanes:
    """Options and rates; for 0 nano-batches ops as a whole, which may all meet."""
    layer, num_ops = graph.layer, len(graph.layer)
    options = tuple(
        (
            *(
                Option(node=batch * num_ops + index, op=index, num_sms=share)
                for batch in range(max(1, num_batches))
                for index, op in enumerate(layer)
                if lane_of(op) == lane
                for share in shares_of[lane]
            ),
            None,
        )
        for lane in LANES
    )
    can, slow = {}, {}
    for a, b in ((0, 1), (0, 2), (1, 2)):
        can[a, b], slow[a, b], slow[b, a] = _beside(
            graph, cost_model, options[a], options[b], num_batches
        )
    shares = [np.array([o.num_sms if o else 0 for o in lane]) for lane in options]
    fits = (
        shares[0][:, None, None] + shares[1][None, :, None] + shares[2][None, None, :]
    ) <= cost_model.hardware.num_sms
    allowed = fits & can[0, 1][:, :, None] & can[0, 2][:, None, :] & can[1, 2][None, :, :]
    mask = allowed.astype(np.float64)
    return Lanes(
        options=options,
        rates=(
            mask / (slow[0, 1][:, :, None] * slow[0, 2][:, None, :]),
            mask / (slow[1, 0].T[:, :, None] * slow[1, 2][None, :, :]),
            mask / (slow[2, 0].T[:, None, :] * slow[2, 1].T[None, :, :]),
        ),
    )


def _beside(
    graph: OpGraph,
    cost_model: CostModel,
    first: Sequence[Option | None],
    second: Sequence[Option | None],
    num_batches: int,
) -> tuple[NDArray[np.bool_], Array, Array]:
    """(may run at once, slowdown of the first, of the second [second, first])."""
    apart = apart_ops(graph)
    layer, num_ops = graph.layer, len(graph.layer)
    can = np.ones((len(first), len(second)), dtype=bool)
    slow_first = np.ones((len(first), len(second)))
    slow_second = np.ones((len(second), len(first)))
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            if a is None or b is None:
                continue
            is_same = num_batches > 0 and a.node // num_ops == b.node // num_ops
            if is_same and (a.op, b.op) in apart:
                can[i, j] = False
            elif a.num_sms + b.num_sms <= cost_model.hardware.num_sms:
                ops = layer[a.op], layer[b.op]
                slow_first[i, j] = cost_model.slowdown(ops[0], a.num_sms, ops[1], b.num_sms)
                slow_second[j, i] = cost_model.slowdown(ops[1], b.num_sms, ops[0], a.num_sms)
    return can, slow_first, slow_second


def apart_ops(graph: OpGraph) -> set[tuple[int, int]]:
    """Pairs of ops of which one always waits for the other, on the same rows, in any layer."""
    place = {op.name: index for index, op in enumerate(graph.layer)}
    count = len(graph.layer)
    far = np.full((count, count), np.inf)
    np.fill_diagonal(far, 0.0)
    for index, op in enumerate(graph.layer):
        for on in op.dependencies:
            before = place[on.op]
            far[before, index] = min(far[before, index], on.layer_distance)
    for k in range(count):
        far = np.minimum(far, far[:, k : k + 1] + far[k : k + 1, :])
    together = far + far.T
    return {(i, j) for i in range(count) for j in range(count) if together[i, j] <= 1}
