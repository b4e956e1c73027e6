"""`compare.html` and the table on standard output, from the document of `comparison.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .page_template import PAGE

_UNITS = {
    "period_us": ("ms", 1e-3, "{:.3f}"),
    "tokens_per_s_per_gpu": ("tokens/s/GPU", 1.0, "{:,.0f}"),
    "joules_per_token": ("mJ/token", 1e3, "{:.1f}"),
    "watts": ("W", 1.0, "{:.0f}"),
    "sm_clock_mhz": ("MHz", 1.0, "{:.0f}"),
}


def figure_rows(values: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(plan, figure, A, B, B / A) of what both sides have; the plan is named once."""
    rows: list[tuple[str, str, str, str, str]] = []
    last = ""
    for role, figures in values["figures"].items():
        for key, (unit, factor, form) in _UNITS.items():
            cells = [figures[side][key] for side in ("a", "b")]
            if None in cells:
                continue
            a, b = (form.format(cell * factor) for cell in cells)
            ratio = f"{cells[1] / cells[0]:.3f}"
            rows.append(("" if role == last else role.replace("_", " "), unit, a, b, ratio))
            last = role
    return rows


def table(values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - rich is imported when used
    """The figures as a rich table."""
    from rich import box
    from rich.markup import escape as plain
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in (f"plan ({values['basis']})", "", "A", "B", "B / A"):
        made.add_column(heading, justify="right" if heading in ("A", "B", "B / A") else "left")
    for row in figure_rows(values):
        made.add_row(*map(plain, row))
    return made


def difference_lines(values: Mapping[str, Any]) -> list[str]:
    """What differs between the winners' schedules and inputs, in a few lines."""
    difference = values["schedules"]["winner"]
    differing = [name for name, held in values["inputs"].items() if not held["same"]]
    lines = [f"inputs that differ: {', '.join(differing) or 'none'}"]
    if difference["same"]:
        return [*lines, "winners: the same schedule"]
    text = f"winners: {len(difference['changed'])} nano-ops changed"
    for side in ("a", "b"):
        if difference[f"only_{side}"]:
            text += f", {len(difference[f'only_{side}'])} only in {side.upper()}"
    return [*lines, text + ("" if difference["same_order"] else ", another order")]


def page(values: Mapping[str, Any]) -> str:
    """The self-contained page."""
    warnings = "".join(f'<p class="bad">{escape(text)}</p>' for text in values["warnings"])
    parts = [
        f'<header><p class="job">A: {escape(values["a"])}<br>B: {escape(values["b"])}</p>'
        f"<h1>{escape(values['verdict'])}</h1>"
        f'<p><span class="badge accent">{escape(values["basis"])}</span></p>{warnings}</header>',
        "<h2>Figures</h2>" + _table(("plan", "", "A", "B", "B / A"), figure_rows(values)),
        "<h2>Jobs</h2>" + _table(("", "A", "B"), _pairs(values["facts"]), is_text=True),
        "<h2>Inputs</h2>"
        + _table(("hash of", "A", "B", ""), _inputs(values["inputs"]), is_text=True),
    ]
    for role, difference in values["schedules"].items():
        parts.append(f"<h2>Schedules: {escape(role.replace('_', ' '))}</h2>{_schedule(difference)}")
    return PAGE.substitute(title=escape("Two plans compared: nanoflow-tune"), body="\n".join(parts))


def _pairs(facts: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    for name, held in facts.items():
        yield name, str(held["a"]), "the same" if held["a"] == held["b"] else str(held["b"])


def _inputs(inputs: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    for name, held in inputs.items():
        mark = "same" if held["same"] else "differs"
        yield name, str(held["a"] or "-"), str(held["b"] or "-"), mark


def _schedule(difference: Mapping[str, Any]) -> str:
    if difference["same"]:
        return "<p>The same.</p>"
    facts = [
        (name.replace("_", "-"), *(", ".join(map(_item, side)) for side in difference[name]))
        for name in ("nano_batches", "lanes")
        if difference[name][0] != difference[name][1]
    ]
    if difference["only_a"] or difference["only_b"]:
        only_a, only_b = (", ".join(difference[f"only_{side}"]) or "-" for side in ("a", "b"))
        facts.append(("nano-ops only there", only_a, only_b))
    if not difference["same_order"]:
        facts.append(("issue order", "another", "another"))
    parts = [_table(("", "A", "B"), facts, is_text=True)] if facts else []
    if difference["changed"]:
        names = ("lane", "num_sms", "variant", "stage", "after")
        rows = [
            (row["nano_op"], *(_change(row.get(name)) for name in names))
            for row in difference["changed"]
        ]
        parts.append(_table(("nano-op", "lane", "SMs", "kernel", "stage", "waits for"), rows))
    return "".join(parts)


def _item(value: Any) -> str:  # noqa: ANN401 - a lane, or the rows of a nano-batch
    return value if isinstance(value, str) else f"{value[0]}-{value[1]}"


def _change(change: Sequence[Any] | None) -> str:
    if change is None:
        return ""
    texts = (
        ", ".join(part) or "-" if isinstance(part, list | tuple) else str(part) for part in change
    )
    return " -> ".join(texts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, is_text: bool = False) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    kind = ' class="words"' if is_text else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
