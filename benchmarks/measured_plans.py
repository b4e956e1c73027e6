"""What the cost model says of plans that were measured, a line for each set of them. No GPU.

    python benchmarks/measured_plans.py            medians by set
    python benchmarks/measured_plans.py --plans    and every plan

`results/measured_plans.csv` holds plans measured on H200s with their schedules, whoever made them:
races, trials of the hardware loop, layers. Nothing of the model is fitted to them. `layer` is the
difference of 16 layers and 4, a twelfth of it, with a small vocabulary.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.profiler.store import shipped_profile
from nanoflow_tune.runtime.op_graph import OpGraph, RowMix
from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule
from nanoflow_tune.search_spaces.loader import load_hardware, load_model

FILE = Path(__file__).parents[1] / "results/measured_plans.csv"
LAYERS, FEW_LAYERS, VOCABULARY = 16, 4, 2048
DECODE_KEYS, PROMPT_KEYS = 768.0, 256.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPlan:
    """A schedule and what it took."""

    set: str
    schedule: Schedule
    model: str
    tp_degree: int
    what: str
    """`iteration`, `iteration of 16 layers` or `layer`."""
    mix: RowMix
    us: float
    sm_clock_mhz: float
    """0 where only the period was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A measured plan and its prediction."""

    plan: MeasuredPlan
    us: float
    sm_clock_mhz: float

    @property
    def error(self) -> float:
        """Predicted / measured period less 1."""
        return self.us / self.plan.us - 1


def read_plans(path: Path = FILE) -> list[MeasuredPlan]:
    """All measured plans."""
    with path.open(encoding="utf-8", newline="") as file:
        return [_plan(row) for row in csv.DictReader(file)]


def _plan(row: dict[str, str]) -> MeasuredPlan:
    return MeasuredPlan(
        set=row["set"],
        schedule=Schedule(
            name=row["plan"],
            nano_batches=tuple(_nano_batch(text) for text in row["nano_batches"].split("; ")),
            nano_ops=tuple(_nano_op(text) for text in row["nano_ops"].split("; ")),
        ),
        model=row["model"],
        tp_degree=int(row["tp_degree"]),
        what=row["what"],
        mix=RowMix(
            decode_tokens=float(row["decode_tokens"]),
            prefill_tokens=float(row["prefill_tokens"]),
            decode_context_tokens=DECODE_KEYS,
            prefill_context_tokens=PROMPT_KEYS,
        ),
        us=float(row["measured_us"]),
        sm_clock_mhz=float(row["sm_clock_mhz"]),
    )


def _tokens(text: str) -> tuple[int, int]:
    start, end = text.split("-")
    return int(start), int(end)


def _nano_batch(text: str) -> NanoBatch:
    tokens, decode_tokens = text.split()
    return NanoBatch(tokens=_tokens(tokens), decode_tokens=int(decode_tokens))


def _nano_op(text: str) -> NanoOp:
    op, tokens, lane, num_sms, variant, stage, *after = text.split()
    return NanoOp(
        op=op,
        tokens=_tokens(tokens),
        lane=lane,
        num_sms=int(num_sms),
        variant=variant,
        stage=int(stage),
        after=tuple(after[0].split(",")) if after else (),
    )


@cache
def graph_of(model: str, tp_degree: int, num_layers: int = 0) -> OpGraph:
    """The whole model, or some layers of it with a small vocabulary."""
    spec = load_model(model)
    if num_layers:
        spec = replace(spec, num_hidden_layers=num_layers, vocab_size=VOCABULARY)
    return OpGraph.build(spec, tp_degree)


def tell(plan: MeasuredPlan, costs: CostModel) -> Told:
    """Predict what was measured."""
    layers = 0 if plan.what == "iteration" else LAYERS
    graph = graph_of(plan.model, plan.tp_degree, layers)
    timing = predict(plan.schedule, graph, costs, plan.mix)
    us = timing.period_us
    if plan.what == "layer":
        few = graph_of(plan.model, plan.tp_degree, FEW_LAYERS)
        us -= predict(plan.schedule, few, costs, plan.mix).period_us
        us /= LAYERS - FEW_LAYERS
    return Told(plan=plan, us=us, sm_clock_mhz=timing.sm_clock_mhz)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, without ties."""
    rank_a, rank_b = (
        {place: rank for rank, place in enumerate(sorted(range(len(x)), key=x.__getitem__))}
        for x in (a, b)
    )
    count = len(a)
    squares = sum((rank_a[place] - rank_b[place]) ** 2 for place in range(count))
    return 1 - 6 * squares / (count * (count**2 - 1))


def bias(told: Sequence[Told], *, is_overlapped: bool) -> float:
    """Median signed error of the sequential or of the overlapped plans; 0 without any."""
    found = [t.error for t in told if t.plan.schedule.is_overlapped == is_overlapped]
    return median(found) if found else 0.0


def line(name: str, told: Sequence[Told]) -> str:
    """One set in a row of a Markdown table."""
    clocks = [t.sm_clock_mhz / t.plan.sm_clock_mhz - 1 for t in told if t.plan.sm_clock_mhz]
    rank = rank_correlation([t.us for t in told], [t.plan.us for t in told])
    worst = max((t.error for t in told), key=abs)
    errors = median(abs(t.error) for t in told)
    return (
        f"| {name} | {len(told)} | {100 * errors:.1f} | {100 * worst:+.1f} "
        f"| {100 * bias(told, is_overlapped=False):+.1f} "
        f"| {100 * bias(told, is_overlapped=True):+.1f} "
        f"| {100 * median(abs(c) for c in clocks):.1f} | {rank:.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", action="store_true", help="every plan, too")
    options = parser.parse_args()
    costs = CostModel(shipped_profile("h200"), load_hardware("h200"))
    told = [tell(plan, costs) for plan in read_plans()]
    for t in told if options.plans else ():
        print(
            f"{t.plan.set:14s} {t.plan.schedule.name:30s} measured {t.plan.us:9.1f} us, "
            f"{t.plan.sm_clock_mhz:4.0f} MHz, predicted {t.us:9.1f} us, {t.sm_clock_mhz:4.0f} MHz "
            f"({100 * t.error:+.1f} %)"
        )
    print("| set | plans | median | worst | sequential | overlapped | clock | rank |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in dict.fromkeys(t.plan.set for t in told):
        print(line(name, [t for t in told if t.plan.set == name]))


if __name__ == "__main__":
    main()
