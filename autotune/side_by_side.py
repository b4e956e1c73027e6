"""Overlap that splits nothing: decode attention beside prefill attention, in one dense batch.

Both wait for the same rotary op and for nothing of each other. Decode attention is bound by memory
on a third of the SMs, so that prefill attention on the others costs no time; no weight is read
twice, as it would be by nano-batches. NanoFlow does the same within each nano-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Schedule
from .cost_model import CostModel
from .patterns import COMPUTE, MEMORY
from .simulator import Simulator, predict

NAME = "overlapped_attention"
DECODE, PREFILL = "decode_attention", "prefill_attention"


def attention_side_by_side(
    base: Schedule, graph: OpGraph, cost_model: CostModel, mix: RowMix
) -> Schedule | None:
    """The base with both attentions at once, on the shares that make the shortest period.

    Args:
        base: a schedule of one nano-batch in one lane.
        graph: of one tensor-parallel rank.
        cost_model: prices kernels on shares.
        mix: rows of the dense batch.

    Returns:
        None if the batch holds decodes or prefills only, the graph has no such ops, or no two
        shares fit.
    """
    has_both = {DECODE, PREFILL} <= set(graph.op_names) and mix.decode_tokens and mix.prefill_tokens
    if not has_both or len(base.nano_batches) != 1:
        return None
    found = [
        (predict(schedule, graph, cost_model, mix).period_us, number, schedule)
        for number, schedule in enumerate(_divided(base, graph, cost_model, mix))
    ]
    return min(found)[2] if found else None


def _divided(
    base: Schedule, graph: OpGraph, cost_model: CostModel, mix: RowMix
) -> Iterator[Schedule]:
    """Each share of decode attention, with the largest share for prefill attention beside it."""
    price = Simulator(base, graph, cost_model, mix).price()
    num_sms = cost_model.hardware.num_sms
    decode, prefill = graph.op(DECODE), graph.op(PREFILL)
    for memory_sms in cost_model.shares_of(decode):
        beside = [sms for sms in cost_model.shares_of(prefill) if sms + memory_sms <= num_sms]
        if not memory_sms or not beside or not max(beside):
            continue
        shares = {decode.name: memory_sms, prefill.name: max(beside)}
        variants = {
            op.name: cost_model.cheapest(op, mix, (shares[op.name],), price)[0]
            for op in (decode, prefill)
        }
        lanes = {decode.name: MEMORY, prefill.name: COMPUTE}
        nano_ops = tuple(
            replace(
                nano_op,
                num_sms=shares[nano_op.op],
                variant=variants[nano_op.op],
                lane=lanes[nano_op.op],
            )
            if nano_op.op in shares
            else nano_op
            for nano_op in base.nano_ops
        )
        yield replace(base, name=NAME, nano_ops=nano_ops)
