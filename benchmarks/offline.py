"""Offline throughput of the engine: a plan's schedules against its sequential ones.

    python benchmarks/offline.py --plan results/reports/llama3-8b-h200-tp1/plan.yaml \
        --model llama3-8b --workload 512/512 --requests 2048
    python benchmarks/offline.py --plan ... --workload 512/512,sharegpt --requests 2048,4000
    python benchmarks/offline.py --plan ... --model llama3-8b --trace trace.csv
    python benchmarks/offline.py --tiny                        on the CPU, with a tiny model

All requests are known at the start and run to their full lengths; the whole run counts, ramps
included. Lengths are constant, log-normal with a workload's moments (ShareGPT, LMSYS, Splitwise as
in table 4 of arXiv 2408.12757), or those of a CSV with the columns ContextTokens and
GeneratedTokens.
`--dry-run` needs no GPU: the scheduler alone runs, and the plan says what each step takes.
`--books` is the ablation: `sequential`, `nano_only` (split, one lane), `overlapped` (the best one),
`winner` (the plan as it is), `offload` (the winner, finished requests' pages kept). Every row has
tokens/s, joules/token, watts and clocks. Percent of optimal is 2 P FLOPs a token at the sustained
GEMM peak that the profile measured, and at the datasheet's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from ab import recorded_command
from figures import FIGURES, FigureRow, spread_of, summary, write_figures
from tiny_serving import tiny_model, tiny_plan

from nanoflow_tune.autotune.ablation import (
    BOOKS,
    check_books,
    contender,
    eager_warnings,
    percent_of_optimal,
    table_row,
    trace_lengths,
    workload_lengths,
)
from nanoflow_tune.autotune.bench_command import serve_all
from nanoflow_tune.autotune.bench_forecast import described, forecast_rows, replaced_remarks
from nanoflow_tune.autotune.op_table import gemm_peak
from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.profiler.serving_case import Contender, ServingCase, ServingRun
from nanoflow_tune.profiler.store import load_profile, profile_files
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Plan
from nanoflow_tune.runtime.plan_io import load_plan
from nanoflow_tune.search_spaces.loader import load_hardware, load_model, load_workload

TINY_ROWS, TINY_PAGES = 64, 400
REACHES = {
    ("llama3-8b", 1): {"e2e": ("e2e_8b", ">= 0.99"), "opt": "opt_8b", "tok": "tok_8b"},
    ("llama2-70b", 2): {
        "e2e": ("e2e_70b_tp2", ">= 1.00"),
        "opt": "opt_70b_tp2",
        "tok": "tok_70b_tp2",
    },
}
LIMITS = {
    ("opt_8b", "1024/512"): ">= 64",
    ("tok_8b", "512/512"): ">= 28000",
    ("opt_70b_tp2", "512/512"): ">= 76",
    ("tok_70b_tp2", "512/512"): ">= 3700",
}
"""What is asked, of the workload that it is asked of."""


def figure_rows(
    runs: Sequence[ServingRun],
    case: ServingCase,
    workload: str,
    peak_flops_per_s: float,
    origin: dict[str, str],
) -> list[FigureRow]:
    """Figures of a model that the table asks for; ratios are formed within each round."""
    known = REACHES.get((case.model.name, case.tp_degree))
    if known is None:
        return []
    by_name: dict[str, list[ServingRun]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    label = f"{workload}, {len(case.lengths)} requests"
    rows: list[FigureRow] = []

    def add(figure_id: str, values: list[float], unit: str, reach: str, name: str) -> None:
        rows.append(
            FigureRow(
                id=figure_id,
                case=f"{label}, {name}",
                value=statistics.median(values),
                unit=unit,
                reach=reach,
                spread=spread_of(values),
                **origin,
            )
        )

    e2e_id, e2e_reach = known["e2e"]
    base = by_name.get("sequential", [])
    for name, mine in by_name.items():
        rates = [run.tokens_per_s / run.num_gpus for run in mine]
        shares = [
            percent_of_optimal(run, case.model.num_active_parameters, peak_flops_per_s)
            for run in mine
        ]
        is_asked = name == "winner"
        for kind, values, unit in (("opt", shares, "%"), ("tok", rates, "tok/s/GPU")):
            figure_id = str(known[kind])
            reach = LIMITS.get((figure_id, workload), "") if is_asked else ""
            add(figure_id, values, unit, reach, name)
        if name != "sequential" and base:
            ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, base, strict=True)]
            add(e2e_id, ratios, "x", e2e_reach if is_asked else "", name)
    return rows


def print_forecasts(
    names: Sequence[str], cases: Sequence[ServingCase], plan: Plan, contenders: Sequence[Contender]
) -> None:
    """What the scheduler and the plan's times say of the runs."""
    for remark in replaced_remarks(contenders):
        print(remark)
    for name, case in zip(names, cases, strict=True):
        for row in forecast_rows(case, plan, contenders):
            print(described(name, len(case.lengths), row))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/offline.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="a tiny model on the CPU, one rank")
    add("--plan", type=Path)
    add("--model", help="default: the plan's")
    add("--gpu", default="h200", help="hardware spec (%(default)s)")
    add("--workload", default="512/512", help="names, or PROMPT/DECODE, by commas (%(default)s)")
    add("--trace", type=Path, metavar="CSV", help="lengths of a trace instead")
    add("--requests", default="2048", help="a number, or one for each workload (%(default)s)")
    add("--max-model-len", type=int, help="longer requests are cut or left out (the model's)")
    add("--books", default="sequential,winner", help=f"of {', '.join(BOOKS)} (%(default)s)")
    add("--dense-batch", type=int, metavar="ROWS", help="constant dense batch (the plan's own)")
    add("--dry-run", action="store_true", help="predict steps and time without a GPU")
    add("--rounds", type=int, default=1, help="interleaved runs of each book (%(default)s)")
    add("--num-pages", type=int, help="of the KV cache (default: what fits)")
    add("--profile", type=Path, default=Path("results/profiles/h200"), help="for the GEMM peak")
    add("--seed", type=int, default=0)
    add("--commit", default="", help="of the source; default: git's")
    add("--out", type=Path, default=FIGURES, help="figures, rows replaced; on a GPU only")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = options.books.split(",")
    try:
        check_books(names)
    except ValueError as err:
        parser.error(str(err))
    if options.tiny == (options.plan is not None):
        parser.error("give --plan, or --tiny for a try on the CPU")
    hardware = load_hardware(options.gpu)
    if options.tiny:
        model = tiny_model()
        plan = tiny_plan(OpGraph.build(model), TINY_ROWS)
    else:
        plan = load_plan(options.plan)
        model = load_model(options.model or plan.model)
    graph = OpGraph.build(model, plan.num_gpus)
    longest = options.max_model_len or model.max_position_embeddings
    num_requests = [int(count) for count in options.requests.split(",")]
    names_of_cases = [options.trace.stem] if options.trace else options.workload.split(",")
    if len(num_requests) == 1:
        num_requests *= len(names_of_cases)
    if len(num_requests) != len(names_of_cases):
        parser.error("--requests must be one number, or one for each workload")
    cases = [
        ServingCase(
            model=model,
            hardware=hardware,
            tp_degree=plan.num_gpus,
            lengths=tuple(
                trace_lengths(options.trace, longest, count)
                if options.trace
                else workload_lengths(load_workload(name), count, longest, options.seed)
            ),
            page_size=plan.page_size,
            num_pages=options.num_pages or (TINY_PAGES if options.tiny else None),
            seed=options.seed,
        )
        for name, count in zip(names_of_cases, num_requests, strict=True)
    ]
    contenders = [contender(name, graph, plan, hardware) for name in names]
    if options.dense_batch is not None:
        for item in contenders:
            item.book.aim_at(options.dense_batch)
    if options.dry_run:
        print_forecasts(names_of_cases, cases, plan, contenders)
        return
    all_runs = serve_all(cases, contenders, options.rounds, is_gpu=not options.tiny)
    profile = None if options.tiny else load_profile(profile_files(options.profile))
    peak = gemm_peak(profile, hardware, model.torch_dtype) if not options.tiny else None
    peaks = {}
    if peak is not None:
        peaks = {"optimal": peak.flops_per_s, "datasheet": hardware.peak(model.torch_dtype)}
        print(f"optimal: {peak.flops_per_s / 1e12:.0f} TFLOP/s, {peak.source}", file=sys.stderr)
    table = [
        {"workload": name, **table_row(run, peaks, model.num_active_parameters)}
        for name, runs in zip(names_of_cases, all_runs, strict=True)
        for run in runs
    ]
    for warning in (line for runs in all_runs for line in eager_warnings(runs)):
        print(warning, file=sys.stderr)
    for row in table:
        print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr)
    if peak is not None:
        from nanoflow_tune.autotune.gpu_stage import find_devices

        origin = {
            "command": recorded_command("offline", arguments or sys.argv[1:]),
            "commit": options.commit or this_commit(),
            "gpu": find_devices().name,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }
        rows = [
            row
            for name, case, runs in zip(names_of_cases, cases, all_runs, strict=True)
            for row in figure_rows(runs, case, name, peak.flops_per_s, origin)
        ]
        write_figures(rows, options.out)
        print(summary(rows))
    print(json.dumps(table, separators=(",", ":")))


if __name__ == "__main__":
    main()
