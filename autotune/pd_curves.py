"""What prefill and decode cost as two jobs side by side on disjoint SMs, from a profile.

SGLang's PD multiplexing runs decode steps and prefills of whole batches on two partitions. Here are
the curves behind its table of divisions:

    decode step   all layers, LM head and sampling, for some decode rows on `decode_sms`
    prefill       all layers for some prompt rows on `prefill_sms`

Beside each other every op is slowed as its pairs were measured, averaged over the other job's ops
by their times. Whole batches are also held to the time that their joules take at the power cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ..profiler.profile import Source
from ..runtime.op_graph import Op, OpGraph, RowMix
from .cost_model import CostModel, Estimate, logit_mix, worst_source

ALONE = 0
"""SMs of the other job when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """Keys that the rows read, as in a plan's bucket."""

    decode_context_tokens: float
    prefill_context_tokens: float

    def mix(self, decodes: float, prefill_tokens: float) -> RowMix:
        """So many decode and prefill rows."""
        return RowMix(
            decode_tokens=decodes,
            prefill_tokens=prefill_tokens,
            decode_context_tokens=self.decode_context_tokens,
            prefill_context_tokens=self.prefill_context_tokens,
        )


class PdCurves:
    """Decode steps and prefills of one model on every division of a GPU's SMs."""

    def __init__(
        self, graph: OpGraph, cost_model: CostModel, contexts: Contexts, prefill_tokens: int
    ) -> None:
        """`prefill_tokens`: rows of one prefill batch, whose ops slow the decode down."""
        self.graph = graph
        self.cost_model = cost_model
        self.contexts = contexts
        self.prefill_tokens = prefill_tokens
        self.num_sms = cost_model.hardware.num_sms
        self.decode_step = cache(self._decode_step)
        self.prefill = cache(self._prefill)
        self._solo = cache(self._solo_layer)

    def _decode_step(self, decodes: int, decode_sms: int, prefill_sms: int) -> Estimate:
        """One step of `decodes` requests beside a prefill on `prefill_sms` (`ALONE`: none)."""
        mix = self.contexts.mix(decodes, 0)
        layer = self._layer(mix, decode_sms, prefill_sms, self._prefill_mix)
        ends = [(op, mix) for op in self.graph.prologue]
        ends += [(op, logit_mix(mix)) for op in self.graph.epilogue]
        outside = [self.cost_model.best(op, rows, decode_sms)[1] for op, rows in ends]
        return _sum([layer] * self.graph.num_layers + outside)

    def _prefill(self, tokens: int, prefill_sms: int, decodes: int, decode_sms: int) -> Estimate:
        """All layers of `tokens` prompt rows beside decode steps (`ALONE`: none)."""
        other = self.contexts.mix(max(1, decodes), 0)
        layer = self._layer(self.contexts.mix(0, tokens), prefill_sms, decode_sms, other)
        return _sum([layer] * self.graph.num_layers)

    def divided_us(self, decodes: int, prefill_tokens: int, division: tuple[int, int]) -> float:
        """One decode step and some prefill rows, each on its SMs until one of them is done.

        The rest of the longer one runs on the whole GPU, as SGLang's scheduler does it.
        """
        prefill_sms, decode_sms = division
        step = self.decode_step(decodes, decode_sms, prefill_sms)
        fill = self.prefill(prefill_tokens, prefill_sms, decodes, decode_sms)
        if step.us < fill.us:
            whole_us = self.prefill(prefill_tokens, self.num_sms, decodes, ALONE).us
            rest_us = (1 - step.us / fill.us) * whole_us
        else:
            rest_us = (1 - fill.us / step.us) * self.decode_step(decodes, self.num_sms, ALONE).us
        return self._under_cap(min(step.us, fill.us) + rest_us, (step, fill))

    def mixed_us(self, decodes: int, prefill_tokens: int) -> float:
        """The same rows as one dense batch, one op after the other on the whole GPU."""
        mix = self.contexts.mix(decodes, prefill_tokens)
        layer = self._layer(mix, self.num_sms, ALONE, mix)
        outside = self.cost_model.iteration_overhead(self.graph, mix)
        whole = _sum([layer] * self.graph.num_layers + [outside])
        return self._under_cap(whole.us, (whole,))

    @property
    def _prefill_mix(self) -> RowMix:
        return self.contexts.mix(0, self.prefill_tokens)

    def _layer(self, mix: RowMix, num_sms: int, other_sms: int, other: RowMix) -> Estimate:
        parts: list[Estimate] = []
        for op, estimate in self._solo(mix, num_sms):
            slowdown = self._slowdown(op, num_sms, other, other_sms) if other_sms else 1.0
            parts.append(Estimate(estimate.us * slowdown, estimate.joules, estimate.source))
        return _sum(parts)

    def _solo_layer(self, mix: RowMix, num_sms: int) -> tuple[tuple[Op, Estimate], ...]:
        ops = [op for op in self.graph.layer if op.rows(mix) > 0]
        return tuple((op, self.cost_model.best(op, mix, num_sms)[1]) for op in ops)

    def _slowdown(self, op: Op, num_sms: int, other: RowMix, other_sms: int) -> float:
        beside = self._solo(other, other_sms)
        whole_us = sum(estimate.us for _, estimate in beside)
        weighted = (
            self.cost_model.slowdown(op, num_sms, peer, other_sms) * estimate.us
            for peer, estimate in beside
        )
        return sum(weighted) / whole_us if whole_us else 1.0

    def _under_cap(self, us: float, work: Sequence[Estimate]) -> float:
        energy, cap_w = self.cost_model.energy, self.cost_model.hardware.power_cap_w
        if energy is None or any(part.joules <= 0 for part in work):
            return us
        dynamic = sum(part.joules - energy.static_w * part.us * 1e-6 for part in work)
        return max(us, 1e6 * dynamic / max(1.0, cap_w - energy.static_w))


def _sum(parts: Sequence[Estimate]) -> Estimate:
    sources: list[Source] = [part.source for part in parts]
    return Estimate(
        sum(part.us for part in parts),
        sum(part.joules for part in parts),
        worst_source(sources),
    )
