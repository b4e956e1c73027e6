"""The table that `bench` prints: one row a book; other columns of dry runs and runs at a rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bench_forecast import FORECAST_COLUMNS

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = {
    "tokens/s/GPU": "tokens_per_s_per_gpu",
    "J/token": "joules_per_token",
    "W": "watts",
    "MHz": "sm_clock_mhz",
    "% sustained": "percent_of_optimal",
    "% datasheet": "percent_of_datasheet",
}
"""Of the table, by heading."""
_LATENCY_COLUMNS = {
    "TTFT ms": "ttft_ms_p50",
    "p99": "ttft_ms_p99",
    "TPOT ms": "tpot_ms_p50",
    "p99 ": "tpot_ms_p99",
    "ms/token": "normalised_ms_mean",
    "p99  ": "normalised_ms_p99",
}
"""Of the table of runs at a rate, behind tokens/s: medians but for the last two, a mean and p99."""


def table(values: dict[str, Any]) -> Table:
    """One row a book, medians over the rounds; a dry run's have what is predicted."""
    from rich import box
    from rich.table import Table

    device = f"{values['hardware']}, predicted" if "dry_run" in values else values["device"]
    head = f"{values['model']}, {values['num_gpus']} x {device}, {values['workload']}"
    title = f"{head}, {values['num_requests']} requests"
    shown = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    shown.add_column("book")
    columns = FORECAST_COLUMNS if "dry_run" in values else _COLUMNS
    if values.get("rate_per_s") is not None:
        first = "tokens/s/GPU"
        columns = {first: _COLUMNS[first], **_LATENCY_COLUMNS, "J/token": "joules_per_token"}
    for heading in columns:
        shown.add_column(heading, justify="right")
    for row in values["books"]:
        cells = (row.get(column) for column in columns.values())
        shown.add_row(row["book"].replace("_", " "), *map(_digits, cells))
    return shown


def _digits(cell: float | None) -> str:
    """Four digits, whole numbers from 1000 on, a dash for what is not known."""
    if cell is None:
        return "-"
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
