"""Orders of one period of two nano-batches, half of it apart: while A computes, B does the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ..runtime.op_graph import OpGraph, OutputForm
from .patterns import NETWORK, macro_ops

PingPongOrder = Literal["blocks", "interleaved", "alternating"]
Period = list[tuple[int, int, int]]
"""(macro, nano-batch, stage), in issue order."""


def layer_phases(graph: OpGraph) -> tuple[list[int], list[int], list[int], list[int]]:
    """Macro ops up to the attention, the gather of its heads, the output projection's, the rest.

    The projection's are those up to the feed-forward; the gather's are none where there is only
    one form.
    """
    macros = macro_ops(graph)
    attention = [
        index
        for index, macro in enumerate(macros)
        if macro.any_ops[0].kind in ("decode_attention", "prefill_attention")
    ]
    before, after = list(range(attention[0])), list(range(attention[-1] + 1, len(macros)))
    gather = [index for index in after[:1] if macros[index].lane == NETWORK]
    after = after[len(gather) :]
    cut = 2 if len(after) > 1 and macros[after[1]].lane == NETWORK else 1
    return before + attention, gather, after[:cut], after[cut:]


def _blocks(graph: OpGraph, forms: tuple[OutputForm, OutputForm]) -> Period:
    """A's tail, next KQV and attention; then the same of B.

    The attention of each is listed where it may start; it runs beside the other one's block,
    whose tail waits for its own attention, of the block before. So does the gather of its heads,
    behind the other one's collectives.
    """
    head, gather, output, ffn = layer_phases(graph)
    tail = gather + output + ffn
    period = [(index, 0, 1) for index in tail] + [(index, 0, 0) for index in head]
    return period + [(index, 1, 1) for index in tail] + [(index, 1, 0) for index in head]


def _interleaved(graph: OpGraph, forms: tuple[OutputForm, OutputForm]) -> Period:
    """In turn: o A, kqv B, ffn A, o B, kqv A, ffn B.

    Behind each block its collective or attention runs, beside the next block of the other one;
    heads are gathered as soon as there are any.
    """
    head, gather, output, ffn = layer_phases(graph)
    head = head + gather
    period = [(index, 0, 1) for index in output] + [(index, 1, 1) for index in head]
    period += [(index, 0, 1) for index in ffn] + [(index, 1, 1) for index in output]
    return period + [(index, 0, 0) for index in head] + [(index, 1, 1) for index in ffn]


def _alternating(graph: OpGraph, forms: tuple[OutputForm, OutputForm]) -> Period:
    """All up to o A, the same of B, ffn A, ffn B; o apart from the rest where one gathers heads.

    Each collective runs beside the block of the other nano-batch that follows.
    """
    head, gather, output, ffn = layer_phases(graph)
    head = head + gather
    is_gathered = any(form != graph.forms[0] for form in forms)
    blocks = (head, output, ffn) if is_gathered else (head + output, ffn)
    return [(index, batch, 0) for block in blocks for batch in (0, 1) for index in block]


PERIODS: dict[PingPongOrder, Callable[[OpGraph, tuple[OutputForm, OutputForm]], Period]] = {
    "blocks": _blocks,
    "interleaved": _interleaved,
    "alternating": _alternating,
}
"""By order: the period of two nano-batches of these forms."""
