"""Plans as the engine serves them, in parts: what splitting brings, and what overlap brings.

    sequential   the plan's sequential schedules alone
    nano_only    its best overlapped schedules' nano-batches, one after the other on one lane
    overlapped   its best overlapped schedules, also where they lose
    winner       the plan as it is
    offload      the same, pages of finished requests kept in host memory

From a plan to the books that `profiler/serving_case.py` has served, and from its runs to rows of a
table. Percent of optimal is 2 P FLOPs a token at some GEMM rate. No torch here.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..profiler.serving_case import Contender, ServingRun
from ..profiler.traffic import plan_traffic
from ..runtime.op_graph import OpGraph
from ..runtime.plan import Bucket, Plan, Schedule
from ..runtime.plan_choice import PlanBook
from ..search_spaces.records import read_bounded
from ..search_spaces.schema import HardwareSpec, WorkloadSpec

BOOKS = ("sequential", "nano_only", "overlapped", "winner", "offload")
OFFLOADED_BYTES, OFFLOADED_PAGES = 8 << 30, 65_536
"""Most host memory, all ranks together, and most pages of it."""


def check_books(names: Sequence[str]) -> None:
    """Refuse names of no book, and none at all.

    Raises:
        ValueError: says which are known.
    """
    if not names or set(names) - set(BOOKS) or len(set(names)) < len(names):
        raise ValueError(
            f"--books must be some of {', '.join(BOOKS)}, each once, but got {','.join(names)!r}"
        )


def trace_lengths(path: Path, max_tokens: int, limit: int) -> list[tuple[int, int]]:
    """Prompt and generated tokens of the first `limit` requests of a trace that fit the model.

    Raises:
        ValueError: unreadable, a column is missing, a number is none, or nothing fits.
    """
    return [(prompt, answer) for prompt, answer, _ in trace_rows(path, max_tokens, limit)]


def trace_rows(path: Path, max_tokens: int, limit: int) -> list[tuple[int, int, str]]:
    """The same with the text of each request's TIMESTAMP; empty without that column."""
    try:
        text = read_bounded(path).decode("utf-8-sig")
        lines = csv.DictReader(io.StringIO(text, newline=""))
        missing = {"ContextTokens", "GeneratedTokens"} - set(lines.fieldnames or ())
        if missing:
            raise ValueError(f"{path} must have the column(s) {', '.join(sorted(missing))}")
        rows = [
            (
                _whole(line["ContextTokens"], f"{path}, row {number}: ContextTokens"),
                _whole(line["GeneratedTokens"], f"{path}, row {number}: GeneratedTokens"),
                line.get("TIMESTAMP") or "",
            )
            for number, line in enumerate(lines, start=1)
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise ValueError(f"{path}: the trace cannot be read ({err}); check the path") from err
    fitting = [row for row in rows if min(row[:2]) > 0 and sum(row[:2]) <= max_tokens][:limit]
    if not fitting:
        raise ValueError(f"{path} has no request of at most {max_tokens} tokens")
    return fitting


def _whole(text: str | None, where: str) -> int:
    """A cell of a trace; None where a row is too short."""
    if text is None or not re.fullmatch(r"\s*[+-]?[0-9]{1,15}\s*", text):
        raise ValueError(f"{where} must be a whole number, but got {(text or '')[:40]!r}")
    return int(text)


def workload_lengths(
    workload: WorkloadSpec, num_requests: int, max_tokens: int, seed: int
) -> list[tuple[int, int]]:
    """Prompt and generated tokens with a workload's moments."""
    planned = plan_traffic(
        workload,
        num_requests=num_requests,
        rate_per_s=math.inf,
        max_tokens=max_tokens,
        seed=seed,
    )
    return [(request.prompt_tokens, request.decode_tokens) for request in planned]


def contender(name: str, graph: OpGraph, plan: Plan, hardware: HardwareSpec) -> Contender:
    """One book of the ablation.

    Args:
        name: of `BOOKS`.
        graph: of the model that is served, scaled down or not.
        plan: whose schedules run.
        hardware: what the plan is for.

    Raises:
        IllegalScheduleError: a schedule that must not run.
    """
    if name == "sequential":
        book = PlanBook.from_plan(graph, plan, hardware, "sequential alone")
        return Contender(name=name, book=book)
    page_bytes = graph.model.kv_bytes_per_token * plan.page_size
    offloaded = min(OFFLOADED_PAGES, OFFLOADED_BYTES // page_bytes)
    changed = replace(plan, buckets=tuple(_winning(bucket, name) for bucket in plan.buckets))
    return Contender(
        name=name,
        book=PlanBook.from_plan(
            graph, changed, hardware, even_losing=name in ("nano_only", "overlapped")
        ),
        offload_host_pages=offloaded if name == "offload" else 0,
    )


def _winning(bucket: Bucket, name: str) -> Bucket:
    if name in ("winner", "offload"):
        return bucket
    if name == "overlapped":
        return replace(bucket, winner=bucket.best_overlapped)
    split = nano_only(bucket.best_overlapped.schedule, bucket.sequential.schedule)
    winner = replace(bucket.sequential, schedule=split, measured=None)
    return replace(bucket, winner=winner)


def nano_only(overlapped: Schedule, sequential: Schedule) -> Schedule:
    """The overlapped schedule's nano-batches, one after the other with the sequential kernels.

    The attention's output is joined in the sequential schedule's form.
    """
    nano_ops = tuple(
        replace(nano_op, tokens=nano_batch.tokens)
        for nano_op in sequential.nano_ops
        for nano_batch in overlapped.nano_batches
    )
    return replace(overlapped, name="nano_only", nano_ops=nano_ops)


def percent_of_optimal(run: ServingRun, num_parameters: int, flops_per_s: float) -> float:
    """2 P FLOPs a token at a GEMM rate, against the time that the run took."""
    return 100 * 2 * num_parameters * run.tokens_per_s / (run.num_gpus * flops_per_s)


def table_row(run: ServingRun, peaks: Mapping[str, float], num_parameters: int) -> dict[str, Any]:
    """All of one run, for the table and the JSON line.

    Args:
        run: of one book.
        peaks: FLOP/s of one GPU, by what a percentage of it is called.
        num_parameters: that a token meets.
    """
    stats = run.stats
    return {
        "book": run.name,
        "tokens_per_s_per_gpu": round(run.tokens_per_s / run.num_gpus, 1),
        "joules_per_token": _known(run.joules_per_token, 5),
        "watts": _known(run.watts, 1),
        "sm_clock_mhz": _known(run.sm_clock_mhz, 0),
        **{
            f"percent_of_{name}": round(percent_of_optimal(run, num_parameters, peak), 2)
            for name, peak in peaks.items()
        },
        "elapsed_s": round(run.elapsed_s, 3),
        "steps": stats.steps_total,
        "eager_steps": stats.eager_steps_total,
        "eager_why": stats.eager_why,
        "replaced_kernels": "; ".join(stats.replaced_kernels),
        "padding_rows": stats.padding_rows_total,
        "preemptions": stats.preemptions_total,
        "host_s": round(stats.host_s_total, 3),
        "last_plan": stats.plan_in_use,
        **{
            f"{name}_ms_{part}": _known(value, 3)
            for name, parts in run.latencies.items()
            for part, value in parts.items()
        },
    }


def eager_warnings(runs: Sequence[ServingRun]) -> list[str]:
    """What to say of runs with steps that no CUDA graph held, once for each book."""
    return list(
        {
            run.name: f"warning: {run.name} ran {run.stats.eager_steps_total} of "
            f"{run.stats.steps_total} steps without CUDA graphs, which costs throughput "
            f"({run.stats.eager_why})"
            for run in runs
            if run.stats.eager_steps_total
        }.values()
    )


def _known(value: float, digits: int) -> float | None:
    return None if math.isnan(value) else round(value, digits)
