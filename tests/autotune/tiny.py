"""A layer of two ops with costs written down by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from nanoflow_tune.autotune.cost_model import Estimate
from nanoflow_tune.autotune.power_model import FASTEST, Price
from nanoflow_tune.profiler.profile import EnergyModel
from nanoflow_tune.runtime.op_graph import Dependency, Op, OpGraph, RowMix
from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule
from nanoflow_tune.search_spaces.schema import HardwareSpec

from .fakes import graph_of, h200

MIX = RowMix(
    decode_tokens=64, prefill_tokens=0, decode_context_tokens=100, prefill_context_tokens=1
)


def tiny_graph(num_layers: int = 12) -> OpGraph:
    """a (compute) -> b (decode attention) -> a of the next layer."""
    a = Op(
        name="a",
        kind="gemm",
        resource="compute",
        shape="n64_k64",
        dependencies=(Dependency("b", 1),),
    )
    b = Op(
        name="b",
        kind="decode_attention",
        resource="memory",
        shape="q4_kv4_d64",
        dependencies=(Dependency("a"),),
    )
    graph = graph_of("llama3-8b")
    model = replace(graph.model, num_hidden_layers=num_layers)
    return OpGraph(model=model, tp_degree=1, prologue=(), layer=(a, b), epilogue=())


@dataclass
class FixedCosts:
    """Stands in for a CostModel: times by (op, rows, share), one slowdown for every pair."""

    us: dict[tuple[str, int, int], float]
    pair_slowdown: float = 1.0
    overhead_us: float = 0.0
    energy: EnergyModel | None = None
    profile: None = None
    hardware: HardwareSpec = field(default_factory=h200)

    def estimate(self, op: Op, mix: RowMix, num_sms: int, variant: str) -> Estimate:
        return Estimate(self.us[op.name, round(op.rows(mix)), num_sms], 0.0, "measured")

    def best(self, op: Op, mix: RowMix, num_sms: int) -> tuple[str, Estimate]:
        return "any", self.estimate(op, mix, num_sms, "any")

    def cheapest(
        self, op: Op, mix: RowMix, shares: Iterable[int], price: Price
    ) -> tuple[str, int, float]:
        us, share = min((self.estimate(op, mix, share, "any").us, share) for share in shares)
        return "any", share, us

    def price(self, graph: OpGraph, mix: RowMix) -> Price:
        return FASTEST

    def slowdown(
        self,
        op_a: Op,
        num_sms_a: int,
        op_b: Op,
        num_sms_b: int,
        variant_a: str = "",
        variant_b: str = "",
    ) -> float:
        return self.pair_slowdown

    def iteration_overhead(self, graph: OpGraph, mix: RowMix) -> Estimate:
        return Estimate(self.overhead_us, 0.0, "measured")


def tiny_schedule(*places: tuple[str, int, int, int]) -> Schedule:
    """(op, nano-batch, stage, share) in issue order; two nano-batches of 32 rows."""
    batches = (
        NanoBatch(tokens=(0, 32), decode_tokens=32),
        NanoBatch(tokens=(32, 64), decode_tokens=32),
    )
    nano_ops = tuple(
        NanoOp(
            op=op,
            tokens=batches[batch].tokens,
            lane="compute" if op == "a" else "memory",
            num_sms=share,
            variant="any",
            stage=stage,
        )
        for op, batch, stage, share in places
    )
    return Schedule(name="overlapped", nano_batches=batches, nano_ops=nano_ops)
