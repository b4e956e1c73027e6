"""Two sections of `report.html` from the document: energy by op, and what each step brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

Table = Callable[[Iterable[str], Iterable[Sequence[str]]], str]
"""Headings and rows to HTML."""

_STEPS = {
    "sequential": "one op after the other, best kernels",
    "nano_only": "and split into nano-batches, still one after the other",
    "equal_split": "side by side, halves of batch and SMs",
}
"""What a plan of each name adds; all others are searched."""


def energy_by_op(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(op, joules of a layer on one GPU, seconds alone) where joules are known, largest first."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        joules, alone_s = found.get(row["op"], (0.0, 0.0))
        found[row["op"]] = joules + row.get("joules", 0.0), alone_s + row["alone_us"] * 1e-6
    known = [(op, joules, alone_s) for op, (joules, alone_s) in found.items() if joules > 0]
    return sorted(known, key=lambda held: -held[1])


def energy_section(values: Mapping[str, Any], table: Table) -> str:
    """Joules of each of the winner's ops; empty without an energy model or in older reports."""
    held = energy_by_op(values["ops"].get("winner", ()))
    total = sum(joules for _, joules, _ in held)
    if not total:
        return ""
    tokens = values["dense_batch_tokens"]
    rows = [
        (
            op.replace("_", " "),
            f"{1e3 * joules:.1f}",
            f"{100 * joules / total:.1f} %",
            f"{joules / seconds:.0f}" if seconds else "-",
            f"{1e6 * joules / tokens:.1f}",
        )
        for op, joules, seconds in held
    ]
    rows.append(("all", f"{1e3 * total:.1f}", "", "", f"{1e6 * total / tokens:.1f}"))
    heads = ("op", "mJ a layer", "part", "W alone", "uJ a token")
    note = (
        "One GPU, static watts included, each op alone on its SMs; from rows of the profile with "
        "measured joules, fitted elsewhere. Ops above the power cap run at lower clocks when they "
        "are kept up, so their watts alone are those of a burst."
    )
    return f'<h2>Energy of one layer</h2>{table(heads, rows)}<p class="muted">{escape(note)}</p>'


def steps_section(values: Mapping[str, Any], table: Table) -> str:
    """What splitting, sharing the GPU and searching bring, from the race; empty with one plan."""
    race = {row["name"]: row for row in values["race"]}
    searched = [row for name, row in race.items() if name not in _STEPS and row["is_concurrent"]]
    order = [(name, race[name]) for name in _STEPS if name in race]
    if searched:
        best = min(searched, key=lambda row: row["period_us"])
        order.append((best["name"], best))
    if len(order) < 2:
        return ""
    base_us = order[0][1]["period_us"]
    rows = [
        (
            _STEPS.get(name, "side by side, with searched rows, shares, order and kernels"),
            name.replace("_", " "),
            f"{row['period_us'] / 1e3:.3f}",
            f"{100 * (base_us / row['period_us'] - 1):+.1f} %",
            row["source"],
        )
        for name, row in order
    ]
    heads = ("step", "plan", "ms", "tokens/s", "source")
    return f"<h2>What each step brings</h2>{table(heads, rows)}"
