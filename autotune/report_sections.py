"""Sections of `report.html` from the document: energy, steps, errors, audit, what changes it."""

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


def error_section(values: Mapping[str, Any], table: Table) -> str:
    """Predicted against measured, by op, of each shown plan; empty where nothing was measured."""
    parts: list[str] = []
    for role, rows in values["ops"].items():
        held = error_by_op(rows)
        if held:
            cells = [
                (
                    op.replace("_", " "),
                    f"{predicted_us:.1f}",
                    f"{measured_us:.1f}",
                    f"{100 * (predicted_us / measured_us - 1):+.1f} %",
                )
                for op, predicted_us, measured_us in held
            ]
            heads = ("op", "predicted us", "measured us", "error")
            opened = "" if parts else " open"
            summary = f"<summary>{escape(role)}</summary>"
            parts.append(f"<details{opened}>{summary}{table(heads, cells)}</details>")
    if not parts:
        return ""
    note = (
        "Of one layer, all nano-ops of an op together, each beside its neighbours. Measured: CUDA "
        "events around every nano-op of eager runs on a hot card, medians over the runs, means "
        "over the layers. Events and launches add a microsecond or two to each nano-op."
    )
    if values["prediction_error"] is not None:
        note += (
            f" A whole iteration is timed otherwise, as a CUDA graph kept up for seconds: the "
            f"winner's prediction misses it by {100 * values['prediction_error']:+.1f} %."
        )
    return f'<h2>Prediction error by op</h2>{"".join(parts)}<p class="muted">{escape(note)}</p>'


def error_by_op(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(op, predicted us, measured us) of a layer, in the order of the layer, then all together."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        measured_us = row.get("measured_us", 0.0)
        if measured_us:
            before = found.get(row["op"], (0.0, 0.0))
            found[row["op"]] = before[0] + row["beside_us"], before[1] + measured_us
    if not found:
        return []
    ops = [(op, predicted_us, measured_us) for op, (predicted_us, measured_us) in found.items()]
    total = "all, one after the other", sum(row[1] for row in ops), sum(row[2] for row in ops)
    return [*ops, total]


def audit_section(values: Mapping[str, Any], table: Table) -> str:
    """Partitions, clocks, watts and spread behind the times; predicted clocks are said as such."""
    rows = [
        (
            row["name"].replace("_", " "),
            f"{row['watts']:.0f}",
            f"{row['sm_clock_mhz']}",
            f"{row['p10_us'] / 1e3:.3f} to {row['p90_us'] / 1e3:.3f}"
            if row["source"] == "measured"
            else "-",
            row["source"],
        )
        for row in values["race"]
        if row["watts"]
    ]
    if not rows:
        return ""
    provenance = values["provenance"]
    facts = [
        f"SM partitions of the profile, read back from the SMs that ran: {provenance[key]}."
        for key in ("profile: audit",)
        if provenance.get(key)
    ]
    heads = ("plan", "W a GPU", "SM MHz", "ms, p10 to p90", "source")
    words = "".join(f'<p class="muted">{escape(fact)}</p>' for fact in facts)
    return f"<h2>Audit: partitions, clocks, watts</h2>{table(heads, rows)}{words}"


def what_ifs_section(values: Mapping[str, Any], table: Table) -> str:
    """Empty without a power model, and for reports written before this was in them."""
    changes, winner = values.get("what_ifs", ()), _winner(values)
    if not changes or winner is None:
        return ""
    rows = [("nothing changed", f"{winner['predicted_us'] / 1e3:.3f}", "", "")]
    rows += [
        (
            row["change"],
            f"{row['period_us'] / 1e3:.3f}",
            f"{100 * row['gain']:+.1f} %",
            f"{row['sm_clock_mhz']}",
        )
        for row in changes
    ]
    shown = table(("the winner with", "predicted ms", "gain", "MHz"), rows)
    note = ""
    if values["source"] == "measured":
        text = (
            "Gains are against the prediction of the unchanged plan, not against its measured time."
        )
        note = f'<p class="muted">{escape(text)}</p>'
    return f"<h3>What would lift it</h3>{shown}{note}"


def _winner(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Its row of the race."""
    return next((row for row in values["race"] if row["is_winner"]), None)


def sensitivity_section(values: Mapping[str, Any], table: Table) -> str:
    """Empty without a profile, and for reports written before this was in them."""
    moved, winner = values.get("sensitivity"), _winner(values)
    if moved is None:
        return ""
    heads = ("plan", "predicted ms", "p10", "median", "p90")
    rows = [
        (
            f"{row['name'].replace('_', ' ')} ({row['role']})",
            f"{row['period_us'] / 1e3:.3f}",
            *(f"{100 * row[key]:+.2f} %" for key in ("p10", "p50", "p90")),
        )
        for row in moved["movements"]
    ]
    trials = moved["trials"]
    text = (
        f"With each time of the profile off by up to {100 * moved['noise']:.0f} %, independently, "
        f"and each slowdown beside another kernel likewise, the predicted choice "
        f"({moved['choice'].replace('_', ' ')}) changes in {round(moved['flip_share'] * trials)} "
        f"of {trials} trials."
    )
    if values["source"] == "measured" and winner and winner["name"] != moved["choice"]:
        text += (
            f" Measured, {winner['name'].replace('_', ' ')} wins: predictions miss by more than "
            "this noise, so trust the race above."
        )
    return f"<h2>Sensitivity to the profile</h2>{table(heads, rows)}<p>{escape(text)}</p>"
