"""`bench --dry-run`: what an offline run would take, by the scheduler and the plan's times alone.

No GPU and no model: a second or two for each book. Everything here is predicted, whatever the
times in the plan are from, and the rows say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..profiler.serving_case import Contender, ServingCase
from ..profiler.serving_forecast import Forecast, forecast
from ..runtime.plan import Plan

FORECAST_COLUMNS = {
    "tokens/s/GPU": "tokens_per_s_per_gpu",
    "s": "elapsed_s",
    "steps": "steps",
    "rows": "mean_rows",
    "% full": "percent_full",
    "padding": "padding_rows",
    "% pages": "mean_pages_percent",
    "% peak": "peak_pages_percent",
    "swapped": "preemptions",
}
"""Of the table, by heading; rows, padding and pages are of the steps."""


def forecast_rows(
    case: ServingCase, plan: Plan, contenders: Sequence[Contender]
) -> list[dict[str, Any]]:
    """One row a book, for the table and the JSON line.

    Raises:
        ValueError: the model leaves no room for a KV cache.
    """
    return [_row(item.name, forecast(case, plan, item.book)) for item in contenders]


def described(workload: str, num_requests: int, row: dict[str, Any]) -> str:
    """A row in a sentence."""
    return (
        f"{workload}, {num_requests} requests, {row['book']}: predicted "
        f"{row['tokens_per_s_per_gpu']:.0f} tokens/s/GPU in {row['elapsed_s']:.1f} s; "
        f"{row['steps']} steps of {row['mean_rows']:.0f} rows, {row['percent_full']:.0f} % full, "
        f"{row['padding_rows']} rows of padding; pages {row['peak_pages_percent']:.0f} % at most, "
        f"{row['mean_pages_percent']:.0f} % on average, {row['preemptions']} preemptions"
    )


def replaced_remarks(contenders: Sequence[Contender]) -> list[str]:
    """Where the plan's times are of attention that an engine on a GPU puts another in place of."""
    return [
        f"{item.name}: the plan's times are of attention that plans on the host, which an engine "
        "on a GPU replaces"
        for item in contenders
        if any(not choice.is_capturable for choice in item.book.choices.values())
    ]


def _row(book: str, found: Forecast) -> dict[str, Any]:
    return {
        "book": book,
        "source": "predicted",
        "tokens_per_s_per_gpu": round(found.tokens_per_s_per_gpu, 1),
        "elapsed_s": round(found.elapsed_s, 3),
        "steps": found.steps,
        "mean_rows": round(found.mean_rows, 1),
        "percent_full": round(100 * found.full_steps / found.steps, 1),
        "padding_rows": found.padding_rows,
        "peak_pages_percent": round(100 * found.peak_pages, 1),
        "mean_pages_percent": round(100 * found.mean_pages, 1),
        "preemptions": found.preemptions,
    }
