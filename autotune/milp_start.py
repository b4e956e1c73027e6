"""A known schedule as a start for the structure MILP: its split, shares, overlaps and turns.

Start times are read off the simulated steady state; the solver recomputes them exactly from the
integers given here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Schedule
from ..runtime.schedule import output_forms
from .cost_model import CostModel
from .milp_input import Split
from .patterns import macro_ops
from .simulator import Simulator

TOUCH = 1e-6
"""Overlaps shorter than this part of a period are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where each node of a known schedule runs, in periods; nodes as in the MILP."""

    split: int
    share: dict[int, int]
    span: dict[int, tuple[float, float]]
    """(start, end) of layer 0 of each node that has rows."""
    in_form_1: frozenset[int] = frozenset()
    """Nano-batches that take form 1, where they may choose."""

    def turn(self, i: int, j: int) -> int:
        """Whole periods that put the start of j behind that of i and before its next one."""
        return ceil(self.span[i][0] - self.span[j][0] - TOUCH)

    def overlaps(self, i: int, j: int) -> bool:
        """Whether the two run at the same time somewhere in the period."""
        turn = self.turn(i, j)
        begin, end = self.span[j][0] + turn, self.span[j][1] + turn
        return begin < self.span[i][1] - TOUCH or end > self.span[i][0] + 1 + TOUCH


def start_from(
    schedule: Schedule,
    graph: OpGraph,
    cost_model: CostModel,
    mix: RowMix,
    splits: Sequence[Split],
) -> Start | None:
    """The schedule in the MILP's terms, or None when its split is not among the candidates."""
    sizes = [batch.num_tokens for batch in schedule.nano_batches]
    padded = (*sizes, *[0] * (len(splits[0].sizes) - len(sizes)))
    decodes = [batch.decode_tokens for batch in schedule.nano_batches]
    for split_index, split in enumerate(splits):
        if split.sizes == padded and decodes == split.decode_tokens(mix):
            return _read(schedule, graph, cost_model, mix, split_index)
    return None


def _read(
    schedule: Schedule, graph: OpGraph, cost_model: CostModel, mix: RowMix, split_index: int
) -> Start:
    layer, count = schedule.max_stage + 3, 2 * schedule.max_stage + 7
    events = Simulator(schedule, graph, cost_model, mix).events(min(count, 60))
    macros = macro_ops(graph)
    home = {op.name: index for index, macro in enumerate(macros) for op in macro.all_ops}
    batch_of = {batch.tokens: index for index, batch in enumerate(schedule.nano_batches)}
    spans: dict[int, dict[int, tuple[float, float]]] = {layer: {}, layer + 1: {}}
    share: dict[int, int] = {}
    for event in events:
        nano_op = schedule.nano_ops[event.index]
        node = batch_of[nano_op.tokens] * len(macros) + home[nano_op.op]
        share[node] = nano_op.num_sms
        if event.layer in spans:
            known = spans[event.layer].get(node, (event.start_us, event.end_us))
            begin, end = min(known[0], event.start_us), max(known[1], event.end_us)
            spans[event.layer][node] = begin, end
    zero_us = spans[layer][0][0]
    period_us = spans[layer + 1][0][0] - zero_us
    span = {
        node: ((begin - zero_us) / period_us, (end - zero_us) / period_us)
        for node, (begin, end) in spans[layer].items()
    }
    formed = frozenset(
        batch
        for batch, forms in enumerate(output_forms(schedule, graph))
        if forms[0] != graph.forms[0]
    )
    return Start(split=split_index, share=share, span=span, in_form_1=formed)
