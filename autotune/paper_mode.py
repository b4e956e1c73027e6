"""`nanoflow-tune --paper`: the paper's pipeline and our search under the paper's own cost model.

LLaMA-2-70B on 8 x A100 80GB with 2048 rows, durations and R-to-P table as in `paper_costs.py`.
Predicted alike: sequential, the pipeline of the paper's figure 6, that pipeline with shares of our
own (`paper_shares.py`), and the plan of the search that the main job runs, whose structures get
their shares in the same way. Beside them stands what the paper measured. The durations are of
512/1024 (table 2); for other workloads attention is scaled by keys (decode) and rows (prefill).
Predictions leave out whatever is not a GEMM, attention or a collective, so sequential comes out
above the paper's own non-overlapped run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..runtime.legality import share_conflicts
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import NanoOp, Schedule
from ..runtime.schedule import concurrent_pairs
from ..search_spaces.loader import load_model, load_workload
from ..search_spaces.schema import RowOrder, SearchSpace
from .capacity import row_mix
from .paper_costs import TENTHS, PaperCosts
from .paper_shares import climb
from .patterns import COMPUTE, MEMORY, NETWORK, split_batches
from .search import SearchResult, search
from .simulator import predict

NUM_GPUS = 8
TOKENS = 2048
FIRST = 768
"""Rows of the first nano-batch in figure 6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperFigures:
    """Measured in the paper, tokens/s/GPU; None where it prints none."""

    nanoflow: float | None
    """Figure 7."""
    nanoflow_ablation: float
    """Figure 9, the same set-up; the two differ in the paper."""
    nano_only: float
    """Figure 9: nano-batches without overlap."""
    non_overlap: float
    """Figure 9: the same kernels, one after the other."""


def _figures(
    nanoflow: float | None, ablation: float, nano_only: float, non_overlap: float
) -> PaperFigures:
    return PaperFigures(
        nanoflow=nanoflow,
        nanoflow_ablation=ablation,
        nano_only=nano_only,
        non_overlap=non_overlap,
    )


MEASURED = {
    (512.0, 0.0): _figures(None, 1446.0, 1171.0, 1273.0),
    (512.0, 512.0): _figures(1286.0, 1323.0, 982.0, 1106.0),
    (1024.0, 512.0): _figures(1263.0, 1291.0, 958.0, 1092.0),
    (512.0, 1024.0): _figures(1212.0, 1277.0, 952.0, 1048.0),
}
"""By mean prompt and generated tokens."""

SPACE = SearchSpace(
    name="paper",
    dense_batch_tokens=(TOKENS,),
    token_granularity=128,
    max_nano_batches=2,
    row_orders=("decodes_first", "interleaved"),
    sm_shares=tuple(range(1, TENTHS)),
    network_sm_shares=(1, 2, 3, 4, 5),
    milp_time_limit_s=20.0,
    milp_relative_gap=0.01,
    simulator_trials=200,
    hardware_trials=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperResult:
    """Periods under the paper's cost model, in us of one iteration."""

    workload: str
    decode_tokens: float
    sequential_us: float
    figure_6_us: float
    search_us: float
    """The winner of the main job's search, once the shares of its structures were climbed."""
    search_plan: str
    shares_us: float
    """Figure 6's structure with our shares."""
    measured: PaperFigures | None
    """None for workloads that the paper has no figures of."""
    bound_us: float = 0.0
    """What no plan of one to four nano-batches, all ops cut at the same rows, can beat."""

    @property
    def found_us(self) -> float:
        """The better of our two."""
        return min(self.search_us, self.shares_us)


def figure_6(graph: OpGraph, mix: RowMix) -> Schedule:
    """The paper's pipeline as a schedule; shares are tenths of R.

    From the figure and its text: 768 and 1280 rows; KQV and decode attention in four parts, the
    last collective in three, prefill attention in one; all-gathers around the first nano-batch's
    output projection, an all-reduce behind the second one's; R of each. Not in it, and chosen here:
    where the parts are cut (halves of each nano-batch), and where the decode rows are: in
    proportion, or in the first nano-batch as far as it goes, what is faster in the cost model. In
    the second case the first all-gather waits for the last decode attention, beside which and
    prefill attention the R of all three would not fit.
    """
    drawn = [_drawn(graph, mix, order) for order in SPACE.row_orders]
    costs = PaperCosts()
    return min(drawn, key=lambda schedule: predict(schedule, graph, costs, mix).period_us)


def _drawn(graph: OpGraph, mix: RowMix, row_order: RowOrder) -> Schedule:
    batches = split_batches((FIRST, TOKENS - FIRST), row_order, mix)
    first, second = (batch.tokens for batch in batches)
    is_first_decodes = batches[0].decode_tokens == batches[0].num_tokens
    quarters = [half for batch in batches for half in _halves(batch.tokens, batch.num_tokens)]
    decodes = [half for batch in batches for half in _halves(batch.tokens, batch.decode_tokens)]
    nano_ops: list[NanoOp] = []

    def run(
        names: str, tokens: tuple[int, int], lane: str, tenths: int, after: tuple[str, ...] = ()
    ) -> None:
        for name in names.split():
            nano_ops.append(
                NanoOp(
                    op=name,
                    tokens=tokens,
                    lane=lane,
                    num_sms=tenths,
                    variant="paper",
                    after=after,
                )
            )

    for rows, decode_rows in zip(quarters, decodes, strict=True):
        run("attn_norm kqv rope_append", rows, COMPUTE, 4)
        run("decode_attention", decode_rows, MEMORY, 4)
    for rows in (first, second) if is_first_decodes else ((0, TOKENS),):  # none in the first
        run("prefill_attention", rows, COMPUTE, 6)
    last_decodes = ("decode_attention.3",) if is_first_decodes else ()
    run("attn_all_gather", first, NETWORK, 2, last_decodes)
    run("o_proj_columns", first, COMPUTE, 6)
    run("o_all_gather", first, NETWORK, 2)
    run("o_proj", second, COMPUTE, 8)
    run("attn_all_reduce", second, NETWORK, 1)
    run("ffn_norm up_gate down", first, COMPUTE, 9)
    run("ffn_all_reduce", first, NETWORK, 1)
    run("ffn_norm up_gate down", second, COMPUTE, 9)
    for rows in quarters[2:]:
        run("ffn_all_reduce", rows, NETWORK, 2)
    schedule = Schedule(name="figure_6", nano_batches=batches, nano_ops=tuple(nano_ops))
    # R has no places on the GPU: only the sum of what can run at once counts.
    assert not share_conflicts(schedule, concurrent_pairs(schedule, graph), TENTHS)
    return schedule


def _halves(tokens: tuple[int, int], rows: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """A range cut behind the first half of its first `rows` rows."""
    start, end = tokens
    middle = start + max(1, rows // 2)
    return (start, middle), (middle, end)


def run_paper(
    workload_name: str,
    *,
    seed: int,
    on_progress: Callable[[str], None],
    space: SearchSpace = SPACE,
) -> PaperResult:
    """Predict sequential, figure 6, our shares on its structure, and our own search.

    Args:
        workload_name: as of `load_workload`.
        seed: of the search.
        on_progress: told what happens, in words.
        space: of the search.

    Raises:
        ValueError: unknown workload.
    """
    workload, costs = load_workload(workload_name), PaperCosts()
    graph = OpGraph.build(load_model("llama2-70b"), NUM_GPUS)
    mix = row_mix(workload, TOKENS)
    drawn = figure_6(graph, mix)
    found = search(graph, costs, costs.hardware, space, mix, seed=seed, on_progress=on_progress)
    best = found.winner.schedule
    best_us = found.winner.predicted.period_us
    for schedule in best_of_each_kind(found):
        climbed = climb(schedule, graph, costs, mix)
        us = predict(climbed, graph, costs, mix).period_us
        on_progress(f"shares of {schedule.name}: {us / 1e3:.1f} ms")
        if us < best_us:
            best, best_us = climbed, us
    return PaperResult(
        workload=workload.name,
        decode_tokens=mix.decode_tokens,
        sequential_us=found.sequential.predicted.period_us,
        figure_6_us=predict(drawn, graph, costs, mix).period_us,
        search_us=best_us,
        search_plan=best.name,
        bound_us=found.space_bound.bound_us,
        shares_us=predict(climb(drawn, graph, costs, mix), graph, costs, mix).period_us,
        measured=MEASURED.get((workload.prompt_tokens, workload.decode_tokens)),
    )


def best_of_each_kind(found: SearchResult) -> list[Schedule]:
    """The fastest overlapped schedule of each name."""
    best: dict[str, Schedule] = {}
    for candidate in sorted(found.race, key=lambda c: c.predicted.period_us):
        if candidate.schedule.is_overlapped:
            best.setdefault(candidate.schedule.name, candidate.schedule)
    return list(best.values())


def tokens_per_s_per_gpu(period_us: float) -> float:
    """Prompt and generated tokens together, as the paper counts."""
    return TOKENS / period_us * 1e6 / NUM_GPUS


def paper_document(result: PaperResult) -> dict[str, Any]:
    """The JSON line of `--paper`; throughput in tokens/s/GPU."""
    periods = {
        "sequential": result.sequential_us,
        "figure_6": result.figure_6_us,
        "search": result.search_us,
        "figure_6_our_shares": result.shares_us,
    }
    return {
        "model": "llama2-70b",
        "hardware": "a100-80",
        "num_gpus": NUM_GPUS,
        "workload": result.workload,
        "dense_batch_tokens": TOKENS,
        "decode_tokens": result.decode_tokens,
        "source": "predicted, cost model of arXiv 2408.12757",
        "period_us": {name: round(us, 1) for name, us in periods.items()},
        "tokens_per_s_per_gpu": {
            name: round(tokens_per_s_per_gpu(us), 1) for name, us in periods.items()
        },
        "search_plan": result.search_plan,
        "bound_us": round(result.bound_us, 1),
        "search_over_figure_6": round(result.search_us / result.figure_6_us, 4),
        "found_over_figure_6": round(result.found_us / result.figure_6_us, 4),
        "paper_measured": asdict(result.measured) if result.measured else None,
    }


def paper_rows(result: PaperResult) -> list[tuple[str, str, str]]:
    """(what, ms of an iteration, tokens/s/GPU) as people read them: predicted, then measured."""
    predicted = (
        ("sequential, predicted", result.sequential_us),
        ("the paper's figure 6, predicted", result.figure_6_us),
        (f"our search ({result.search_plan.replace('_', ' ')}), predicted", result.search_us),
        ("our shares on figure 6, predicted", result.shares_us),
    )
    rows = [(what, f"{us / 1e3:.1f}", f"{tokens_per_s_per_gpu(us):,.0f}") for what, us in predicted]
    if result.measured is None:
        return rows
    measured = (
        ("the paper, non-overlap, measured (figure 9)", result.measured.non_overlap),
        ("the paper, nano-batches only, measured (figure 9)", result.measured.nano_only),
        ("the paper, NanoFlow, measured (figure 9)", result.measured.nanoflow_ablation),
        ("the paper, NanoFlow, measured (figure 7)", result.measured.nanoflow),
    )
    return rows + [
        (what, f"{TOKENS / NUM_GPUS / rate * 1e3:.1f}", f"{rate:,.0f}")
        for what, rate in measured
        if rate is not None
    ]
