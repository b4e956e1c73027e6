"""The cost model of the paper's own search: its durations, and its table from R to P.

Source: arXiv 2408.12757, table 2 (durations as run on 8 x A100 80GB, LLaMA-2-70B, 2048 rows of the
512/1024 workload) and table 3 (R to P). A nano-op on a share R of the GPU takes

    time = solo time / P(R)

where R, the share of GEMM throughput that is left beside it, stands for a part of the GPU: it is a
tenth for each "SM" of the made-up GPU here. P was measured beside other kernels, so no further
slowdown applies. What is simpler here than on a GPU:

- times are proportional to rows (decode attention: to keys), so that splitting as such costs
  nothing, while the paper's nano-batches without overlap are 8 to 12 % slower than unsplit;
- norms, rotary embedding, activation, embedding, LM head and sampling take no time, as in the
  paper's search;
- the time of collectives is divided by the bytes they send: half of it goes to each all-reduce, a
  quarter to each of the two all-gathers that may stand for the first.
"""

from __future__ import annotations

from dataclasses import replace

from ..runtime.op_graph import Op, OpGraph, RowMix
from ..search_spaces.loader import load_hardware
from ..search_spaces.schema import HardwareSpec
from .cost_model import NO_WORK, CostModel, Estimate

TENTHS = 10
NUM_LAYERS = 80
TABLE_2_ROWS = 2048.0
TABLE_2_DECODES = 2048 * 1024 / 1536
"""512/1024: d / (p + d) of the rows decode, at p + d / 2 = 1024 keys."""
TABLE_2_KEYS = 1024.0

TABLE_2_MS = {
    "kqv": 16.08,
    "o_proj": 16.01,
    "up_gate": 69.92,
    "down": 34.96,
    "decode_attention": 35.60,
    "prefill_attention": 4.56,
    "attn_all_gather": 47.92 / 4,
    "o_proj_columns": 16.01,
    "o_all_gather": 47.92 / 4,
    "attn_all_reduce": 47.92 / 2,
    "ffn_all_reduce": 47.92 / 2,
}
"""Column "real" of table 2: 80 layers, ms."""

GEMM_P = tuple(tenth / TENTHS for tenth in range(TENTHS + 1))
"""P = R by definition; prefill attention counts as compute."""
MEMORY_P = (0.0, 0.2, 0.3, 0.5, 0.8, 0.8, 0.8, 0.85, 0.85, 0.95, 1.0)
"""Printed at 0, .1, .2, .8, .9, 1, and .4 -> .8 in section 4.1.4. The elided .3, .6, .7 are from
the later public branch of the reference repository (its .4 -> .6 contradicts the paper's text); its
.5 -> .7 is raised to .8, so that more of the GPU is never slower."""
NETWORK_P = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0)
"""Printed at 0, .1, .2, .8, .9, 1. The elided .3 to .5 are from the same branch, .6 and .7 lie
between two equal values."""


def paper_hardware() -> HardwareSpec:
    """An A100 80GB whose shares are tenths of R."""
    return replace(
        load_hardware("a100-80"), name="a100-80-tenths", num_sms=TENTHS, sm_granularity=1
    )


def performance(op: Op, tenths: int) -> float:
    """P of an op on this many tenths of R."""
    table = {"memory": MEMORY_P, "network": NETWORK_P}.get(op.resource, GEMM_P)
    return table[tenths]


class PaperCosts(CostModel):
    """`CostModel` of LLaMA-2-70B on eight A100 as the paper's search sees it."""

    def __init__(self) -> None:
        super().__init__(None, paper_hardware(), "float16")

    def estimate(self, op: Op, mix: RowMix, num_sms: int, variant: str) -> Estimate:
        """Solo time over P of the share, one layer."""
        work = self._work(op, mix)
        if work == 0 or op.name not in TABLE_2_MS:
            return NO_WORK
        solo_us = 1e3 * TABLE_2_MS[op.name] / NUM_LAYERS * work
        source = "measured" if num_sms == TENTHS else "interpolated"
        return Estimate(solo_us / performance(op, num_sms), 0.0, source)

    def iteration_overhead(self, graph: OpGraph, mix: RowMix) -> Estimate:
        """None: the paper's search leaves out what is not a layer."""
        return NO_WORK

    def _work(self, op: Op, mix: RowMix) -> float:
        """Rows, or keys for decode attention, as a part of table 2's."""
        rows = op.rows(mix)
        if op.kind == "decode_attention":
            return rows * op.context(mix) / (TABLE_2_DECODES * TABLE_2_KEYS)
        if op.kind == "prefill_attention":
            return rows / (TABLE_2_ROWS - TABLE_2_DECODES)
        return rows / TABLE_2_ROWS

    def _variants(self, op: Op, num_sms: int) -> tuple[str, ...]:
        return ("paper",) if num_sms else ()

    def _slowdown(
        self,
        op_a: Op,
        num_sms_a: int,
        op_b: Op,
        num_sms_b: int,
        variant_a: str = "",
        variant_b: str = "",
    ) -> float:
        return 1.0
