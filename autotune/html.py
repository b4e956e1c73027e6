"""`report.html`: one self-contained page, rendered from the document of `report.json`.

No scripts, no network: the style is inline and the pictures are embedded. It follows the reader's
light or dark preference and reads on a phone.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .book_page import book_section
from .document import lanes, speedup
from .page_template import PAGE
from .report_sections import (
    audit_section,
    energy_section,
    error_section,
    sensitivity_section,
    steps_section,
    what_ifs_section,
)

Cell = str | int | float | None


def render(values: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The page of a document.

    Args:
        values: the document, as in `report.json`.
        images: PNG bytes by name, `timeline` and `sm_curves`; a missing one is left out.
    """
    parts = [
        _header(values),
        _figure("Timeline", images.get("timeline"), _timeline_caption(values)),
        _race(values),
        steps_section(values, _table),
        _bounds(values),
        what_ifs_section(values, _table),
        sensitivity_section(values, _table),
        book_section(values.get("book"), _table),
        _ops(values),
        error_section(values, _table),
        _figure("Throughput against SM share", images.get("sm_curves"), _CURVES_CAPTION),
        _figure("Roofline", images.get("roofline"), _ROOFLINE_CAPTION),
        _figure("Two kernels side by side", images.get("pairs"), _PAIRS_CAPTION),
        energy_section(values, _table),
        _figure("Search history", images.get("history"), _history_caption(values)),
        audit_section(values, _table),
        _verification(values),
        _provenance(values),
    ]
    title = f"{values['model']} on {values['num_gpus']} x {values['hardware']}: nanoflow-tune"
    return PAGE.substitute(title=escape(title), body="\n".join(parts))


_TIMELINE_CAPTION = (
    "Two layers in steady state. Each row is a lane: its nano-ops run one after the other, lanes "
    "run side by side on disjoint SMs. Below: SMs held at each moment."
)
_EVENTS_CAPTION = (
    " As it ran: eager runs with CUDA events around every nano-op, so those tracks are longer than "
    "the iteration in their title, which is a CUDA graph without events."
)
_CURVES_CAPTION = (
    "Lines: the whole dense batch with the best kernel at each share. Marks: nano-ops as planned, "
    "on their own rows, so a mark of a split op lies off its line."
)

_ROOFLINE_CAPTION = (
    "What compute peak and memory bandwidth allow, and what each op reaches. Collectives have no "
    "place on it."
)
_HISTORY_CAPTION = (
    "What lies between the best plan and the bound of the space is either not found or not "
    "possible: no plan of the declared space is predicted to take less than the bound."
)
_FINAL_CAPTION = (
    " The finalists ran once more, longer and in turns: those times, not the shortest here, are in "
    "the race."
)
_PAIRS_CAPTION = (
    "All measured pairs of the profile. What one of the two loses here is what overlap cannot give "
    "back; plans price each pair with it."
)


def _timeline_caption(values: Mapping[str, Any]) -> str:
    rows = [row for table in values["ops"].values() for row in table]
    has_run = any(row.get("measured_us") for row in rows)
    return _TIMELINE_CAPTION + (_EVENTS_CAPTION if has_run else "")


def _history_caption(values: Mapping[str, Any]) -> str:
    return _HISTORY_CAPTION + (_FINAL_CAPTION if values["source"] == "measured" else "")


def _header(values: Mapping[str, Any]) -> str:
    job = (
        f"{values['model']} · {values['num_gpus']} x {values['hardware']} · workload "
        f"{values['workload']} · {values['dense_batch_tokens']} tokens a batch"
    )
    badge, text = _badge(values)
    first, _, rest = values["verdict"].partition("; ")
    rest = rest.removeprefix(f"{values['source']}.").strip()  # the badge says it
    known = f"{rest[:1].upper()}{rest[1:]} {values['next_step']}".strip()
    return (
        f'<header><p class="job">{escape(job)}</p><h1>{escape(first)}.</h1>'
        f'<p><span class="badge accent">{escape(values["source"])}</span>'
        f'<span class="badge {badge}">{escape(text)}</span></p>'
        f"<p>{_with_code(known)}</p>"
        f"{_reasons(values['reasons'])}</header>"
        f"{_numbers(values)}"
    )


def _with_code(text: str) -> str:
    """Escaped; what stands between backticks is code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))


def _badge(values: Mapping[str, Any]) -> tuple[str, str]:
    if values["verified"] is None:
        return "muted", "not verified"
    devices = ", ".join(sorted({record["device"] for record in values["verification"]}))
    return ("good", f"verified on {devices}") if values["verified"] else ("bad", "wrong results")


def _reasons(reasons: Sequence[str]) -> str:
    return "".join(f'<p class="muted">{escape(reason)}</p>' for reason in reasons)


def _numbers(values: Mapping[str, Any]) -> str:
    numbers = [
        (_ms(values["period_us"]), "one iteration"),
        (speedup(values, values), "the best sequential plan"),
        (f"{values['tokens_per_s_per_gpu']:,.0f}", "tokens/s per GPU"),
        (f"{_millijoules(values)} mJ", "per token, all GPUs"),
        (f"{values['percent_of_optimal']:.1f} %", f"of 2P at the {_peak_name(values)}"),
        (_ms(values["lower_bound_us"]), "lower bound at hardware peaks"),
    ]
    if values["watts"] is not None:
        numbers.append((f"{values['watts']:.0f} W", f"a GPU at {values['sm_clock_mhz']} MHz"))
    cells = (
        f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in numbers
    )
    return f'<section class="numbers">{"".join(cells)}</section>'


def _peak_name(values: Mapping[str, Any]) -> str:
    return values["optimal_reference"]["source"].partition(" (")[0]


def _figure(heading: str, png: bytes | None, caption: str) -> str:
    if png is None:
        return ""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<h2>{escape(heading)}</h2><figure><div tabindex="0"><img alt="{escape(heading)}" '
        f'src="data:image/png;base64,{data}"></div><figcaption><span class="hint">Tap to enlarge. '
        f"</span>{escape(caption)}</figcaption></figure>"
    )


def _race(values: Mapping[str, Any]) -> str:
    heads = ("plan", "nano-batches", "lanes", "ms", "speedup", "mJ/token", "W", "predicted ms")
    rows = [
        (
            row["name"].replace("_", " "),
            row["num_nano_batches"],
            lanes(row),
            f"{row['period_us'] / 1e3:.3f}",
            speedup(values, row),
            _millijoules(row),
            f"{row['watts']:.0f}",
            f"{row['predicted_us'] / 1e3:.3f}",
            row["source"],
        )
        for row in values["race"]
    ]
    winners = [row["is_winner"] for row in values["race"]]
    note = (
        "The best of each kind. Sequential may use every kernel that any plan may; speedup is "
        "against it. Lanes in turn never run at once: such a plan splits, but does not overlap."
    )
    if values["prediction_error"] is not None:
        note += f" Predicted against measured, winner: {100 * values['prediction_error']:+.1f} %."
    table = _table((*heads, "source"), rows, winners=winners)
    return f'<h2>The race</h2>{table}<p class="muted">{escape(note)}</p>'


def _bounds(values: Mapping[str, Any]) -> str:
    period_us = values["period_us"]
    bounds = [
        ("lower bound: largest of compute, memory, network at peaks", values["lower_bound_us"])
    ]
    if values["power_limit_us"]:
        error = f"within {100 * values['power_limit_error']:.0f} %"
        name = f"power limit, an estimate: the profile's joules at the cap, {error}"
        bounds.append((name, values["power_limit_us"]))
    space = values["certificate"].get("space")
    if space:
        name = "bound of the declared space: no plan in it is predicted to take less"
        bounds.append((name, space["bound_us"]))
    rows = [(name, f"{us / 1e3:.3f}", f"{100 * us / period_us:.1f} %") for name, us in bounds]
    text = f"{values['bound'].capitalize()} binds. {_certificate(values['certificate'])}"
    if values["source"] == "measured" and period_us < (values["power_limit_us"] or 0.0):
        text = (
            "The winner measured faster than the power limit, which prices kernels by their joules "
            f"in the profile and is no bound; only the first row is one. {text}"
        )
    reference = values["optimal_reference"]
    peak = (
        f"100 % of optimal is 2 FLOP for each parameter and token at "
        f"{reference['flops_per_s'] / 1e12:.0f} TFLOP/s a GPU: {reference['source']}."
    )
    table = _table(("bound", "ms", "of the plan's time"), rows)
    return f'<h2>What binds</h2>{table}<p>{escape(text)}</p><p class="muted">{escape(peak)}</p>'


def _ops(values: Mapping[str, Any]) -> str:
    sections = [
        f"<details{' open' if place == 0 else ''}><summary>{escape(role)}</summary>"
        f"{_op_table(rows)}</details>"
        for place, (role, rows) in enumerate(values["ops"].items())
    ]
    return f"<h2>Nano-ops of one layer</h2>{''.join(sections)}"


def _op_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns of what was measured in the plan only where something was."""
    heads = ["nano-op", "rows", "lane", "SMs", "kernel", "alone us", "in plan us"]
    is_measured = any(row.get("measured_us") for row in rows)
    heads += ["measured us"] if is_measured else []
    cells: list[list[Cell]] = []
    for row in rows:
        measured_us = row.get("measured_us", 0.0)
        cells.append(
            [
                row["name"],
                f"{row['tokens'][0]}-{row['tokens'][1]}",
                row["lane"],
                row["num_sms"],
                row["variant"],
                f"{row['alone_us']:.1f}",
                f"{row['beside_us']:.1f}",
                *([f"{measured_us:.1f}"] if is_measured else []),
                f"{row['throughput']:.3g} {row['unit']}" if row["beside_us"] else "no rows",
                row["source"],
            ]
        )
    return _table([*heads, "reaches", "predicted from" if is_measured else "source"], cells)


def _verification(values: Mapping[str, Any]) -> str:
    if not values["verification"]:
        return "<h2>Verification</h2><p>Not run.</p>"
    heads = ("plan", "layers", "error", "against reference", "allowed", "orders", "")
    rows = [
        (
            record["plan"].replace("_", " "),
            record["num_layers"],
            f"{record['max_relative_error']:.1e}",
            f"{record['max_reference_error']:.1e}",
            f"{record['tolerance']:.0e}",
            record["orders_checked"],
            "passed" if record["passed"] else "FAILED",
        )
        for record in values["verification"]
    ]
    runs = {
        f"{record['model']}, {record['dtype']}, on {record['num_ranks']} {record['device']} rank(s)"
        for record in values["verification"]
    }
    note = (
        f"Run as {'; '.join(sorted(runs))}. The planned run against the unsplit sequential run, "
        "same weights and cache: ||a - b|| / ||b|| of every layer's output, in plan order and "
        "random legal orders. Against reference: the sequential run and a plain one in higher "
        "precision. An error of 0 means equal bits: GEMM variants add along K in the same order."
    )
    return f'<h2>Verification</h2>{_table(heads, rows)}<p class="muted">{escape(note)}</p>'


def _provenance(values: Mapping[str, Any]) -> str:
    batch = values["batch"]
    memory = ", ".join(
        f"{name.removesuffix('_bytes')} {batch[name] / 1e9:.1f} GB"
        for name in ("memory_bytes", "weight_bytes", "kv_bytes", "activation_bytes")
    )
    mix = (
        f"{batch['decode_tokens']} decodes at {batch['decode_context_tokens']:.0f} keys, "
        f"{batch['prefill_tokens']} prefill rows, {batch['row_order'].replace('_', ' ')}"
    )
    facts = {"batch": mix, "memory of a GPU": memory, "profile": values["profile"]}
    facts |= values["provenance"]
    facts["elapsed"] = f"{values['elapsed_s']:.1f} s"
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value
    )
    return f'<h2>Provenance</h2><div class="scroll"><table class="facts">{rows}</table></div>'


_WIDE = 9
"""Tables of more columns are set smaller."""


def _table(
    heads: Iterable[str], rows: Iterable[Sequence[Cell]], winners: Sequence[bool] = ()
) -> str:
    heads = list(heads)
    size = ' class="wide"' if len(heads) > _WIDE else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines: list[str] = []
    for place, row in enumerate(rows):
        mark = ' class="winner"' if place < len(winners) and winners[place] else ""
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return (
        f'<div class="scroll"><table{size}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _certificate(proof: Mapping[str, Any]) -> str:
    """What the solver proved, of its own model of one layer."""
    return (
        f"{proof['num_tried']} schedules tried. Structure search ("
        f"{proof['solver']}, {proof['num_binaries']} integers): "
        f"{proof['status'].replace('_', ' ')} in {proof['seconds']:.1f} s; one layer takes "
        f"{proof['period_us']:.1f} us in the solver's model, and no choice in it less than "
        f"{proof['bound_us']:.1f} us (gap {100 * proof['gap']:.1f} %)."
    )


def _millijoules(row: Mapping[str, Any]) -> str:
    """Of one token; a dash where no energy model is known."""
    joules = row["joules_per_token"]
    return "-" if joules is None else f"{1e3 * joules:.1f}"


def _ms(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us < 1e5 else f"{us / 1e3:.1f} ms"
