"""The JSON of a report: what `report.json` holds and `report.html` shows.

The last line of stdout abridges it to `REQUIRED_KEYS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..runtime.op_graph import OpGraph
from ..runtime.plan import Candidate, Plan
from .book_page import book_values
from .report import Report, caveats, next_step, verdict
from .search import overlaps

REQUIRED_KEYS = (
    "plan",
    "model",
    "hardware",
    "num_gpus",
    "dense_batch_tokens",
    "source",
    "period_us",
    "sequential_us",
    "best_overlapped_us",
    "speedup",
    "lower_bound_us",
    "power_limit_us",
    "bound",
    "tokens_per_s_per_gpu",
    "joules_per_token",
    "percent_of_optimal",
    "verified",
    "watts",
    "sm_clock_mhz",
    "break_even_tokens",
    "commit",
    "elapsed_s",
)
"""Keys of the last line of stdout, in order. Null: `watts` and `sm_clock_mhz` unless measured,
`joules_per_token` and `power_limit_us` without an energy model, `verified` when not asked for,
`break_even_tokens` where overlap pays at no size of the plan book, or there is no book."""


def document(report: Report) -> dict[str, Any]:
    """The whole of `report.json`."""
    return {
        **summary(report),
        "verdict": verdict(report),
        "next_step": next_step(report),
        "reasons": caveats(report),
        "profile": report.profile,
        "optimal_reference": asdict(report.gemm_peak),
        "power_limit_error": _digits(report.power_limit_error),
        "prediction_error": _prediction_error(report.bucket.winner),
        "workload": report.plan.workload,
        "batch": _batch(report),
        "race": [_race_row(report, candidate) for candidate in report.race],
        "certificate": dict(report.certificate),
        "history": [[number, name, round(us, 1)] for number, name, us in report.history],
        "sensitivity": report.sensitivity.as_dict() if report.sensitivity else None,
        "what_ifs": [what_if.as_dict() for what_if in report.what_ifs],
        "ops": {role: [asdict(row) for row in rows] for role, rows in report.op_tables.items()},
        "book": book_values(report.book) if report.book else None,
        "verification": verification_rows(report.plan),
        "provenance": dict(report.provenance),
    }


def summary(report: Report) -> dict[str, Any]:
    """The required keys."""
    bucket, tokens = report.bucket, report.bucket.dense_batch_tokens
    won = report.timing(bucket.winner)
    sequential_us = report.timing(bucket.sequential).period_us
    gpus = report.plan.num_gpus
    needed_flops = 2.0 * report.model.num_active_parameters * tokens
    optimal_us = needed_flops / (gpus * report.gemm_peak.flops_per_s) * 1e6
    values: dict[str, Any] = {
        "plan": report.plan_path,
        "model": report.plan.model,
        "hardware": report.plan.hardware,
        "num_gpus": gpus,
        "dense_batch_tokens": tokens,
        "source": "measured" if report.is_measured else won.source,
        "period_us": round(won.period_us, 1),
        "sequential_us": round(sequential_us, 1),
        "best_overlapped_us": round(report.timing(bucket.best_overlapped).period_us, 1),
        "speedup": round(sequential_us / won.period_us, 4),
        "lower_bound_us": round(bucket.lower_bound_us, 1),
        "power_limit_us": round(bucket.power_limit_us, 1) or None,
        "bound": bucket.bound,
        "tokens_per_s_per_gpu": round(tokens / (won.period_us * 1e-6) / gpus, 1),
        "joules_per_token": _digits(won.joules / tokens) or None,
        "percent_of_optimal": round(100 * optimal_us / won.period_us, 2),
        "verified": report.verified,
        "watts": round(won.watts, 1) if report.is_measured else None,
        "sm_clock_mhz": round(won.sm_clock_mhz) if report.is_measured else None,
        "break_even_tokens": report.plan.break_even[0].tokens if report.plan.break_even else None,
        "commit": report.commit,
        "elapsed_s": round(report.elapsed_s, 1),
    }
    assert tuple(values) == REQUIRED_KEYS
    return values


def json_line(values: Mapping[str, Any]) -> str:
    """The required keys of a document as one compact line."""
    later = {"break_even_tokens": None}  # reports from before it was in them are still shown
    known = {**later, **values}
    return json.dumps({key: known[key] for key in REQUIRED_KEYS}, separators=(",", ":"))


def race_table(values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The race as a rich table, from a document."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("plan")
    for heading in ("nano-batches", "lanes", "ms/iteration", "speedup", "tokens/s/GPU"):
        table.add_column(heading, justify="right")
    table.add_column("source")
    for row in values["race"]:
        tokens_per_s = values["dense_batch_tokens"] / row["period_us"] * 1e6 / values["num_gpus"]
        table.add_row(
            row["name"].replace("_", " ") + (" *" if row["is_winner"] else ""),
            str(row["num_nano_batches"]),
            lanes(row),
            f"{row['period_us'] / 1e3:.3f}",
            speedup(values, row),
            f"{tokens_per_s:,.0f}",
            row["source"],
            style="bold" if row["is_winner"] else "",
        )
    return table


def speedup(values: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Of a row of the race, from its period: `speedup` is rounded, and rounding twice misleads."""
    return f"{values['sequential_us'] / row['period_us']:.3f}x"


def lanes(row: Mapping[str, Any]) -> str:
    """How many lanes a row of the race has, and whether they ever run at once."""
    in_turn = row["num_lanes"] > 1 and not row["is_concurrent"]
    return f"{row['num_lanes']} in turn" if in_turn else str(row["num_lanes"])


def _race_row(report: Report, candidate: Candidate) -> dict[str, Any]:
    timing, schedule = report.timing(candidate), candidate.schedule
    tokens = report.bucket.dense_batch_tokens
    sequential_us = report.timing(report.bucket.sequential).period_us
    return {
        "name": schedule.name,
        "num_nano_batches": len(schedule.nano_batches),
        "num_lanes": len(schedule.lanes),
        "is_concurrent": overlaps(schedule, OpGraph.build(report.model, report.plan.num_gpus)),
        "period_us": round(timing.period_us, 1),
        "p10_us": round(timing.p10_us, 1),
        "p90_us": round(timing.p90_us, 1),
        "speedup": round(sequential_us / timing.period_us, 4),
        "source": timing.source,
        "predicted_us": round(candidate.predicted.period_us, 1),
        "prediction_error": _prediction_error(candidate),
        "joules_per_token": _digits(timing.joules / tokens) or None,
        "watts": round(timing.watts, 1),
        "sm_clock_mhz": round(timing.sm_clock_mhz),
        "is_winner": schedule == report.bucket.winner.schedule,
    }


def verification_rows(plan: Plan) -> list[dict[str, Any]]:
    """The records, each with the plan that it is about: of the main bucket, then of the book."""
    rows: list[dict[str, Any]] = []
    for place, bucket in enumerate(plan.buckets):
        schedules = dict.fromkeys((bucket.winner.schedule, bucket.best_overlapped.schedule))
        mix = f"{bucket.mix.replace('_', ' ')}, {bucket.decode_context_tokens:.0f} keys"
        where = f", {bucket.dense_batch_tokens} tokens, {mix}" if place else ""
        rows += [
            {"plan": f"{schedule.name.replace('_', ' ')}{where}", **asdict(record)}
            for schedule, record in zip(schedules, bucket.verification, strict=False)
        ]
    return rows


def _batch(report: Report) -> dict[str, Any]:
    bucket, memory = report.bucket, report.batch.memory
    return {
        "decode_tokens": bucket.decode_tokens,
        "prefill_tokens": bucket.dense_batch_tokens - bucket.decode_tokens,
        "decode_context_tokens": bucket.decode_context_tokens,
        "prefill_context_tokens": bucket.prefill_context_tokens,
        "row_order": bucket.row_order,
        **asdict(memory),
    }


def _prediction_error(candidate: Candidate) -> float | None:
    """(predicted - measured) / measured; None without a measurement."""
    if candidate.measured is None:
        return None
    return _digits(candidate.predicted.period_us / candidate.measured.period_us - 1)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
