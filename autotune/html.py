"""`report.html`: one self-contained page, rendered from the document of `report.json`.

No scripts, no network: the style is inline and the pictures are embedded. It follows the reader's
light or dark preference and reads on a phone.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink:#1b1f24; --muted:#57606a; --paper:#ffffff; --card:#f6f8fa; --line:#d8dee4;
  --accent:#0072b2; --good:#00775a; --bad:#b34700; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6edf3; --muted:#9da7b1; --paper:#0f1419;
  --card:#1a2129; --line:#2f3842; --accent:#63b8ea; --good:#4cc9a3; --bad:#ff9a5c; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); line-height:1.5;
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
main { max-width:68rem; margin:0 auto; padding:2rem 1.1rem 4rem; }
header p.job { color:var(--muted); margin:0 0 .35rem; }
h1 { font-size:clamp(1.25rem,3.2vw,1.7rem); line-height:1.35; margin:0 0 .6rem; text-wrap:balance; }
h2 { font-size:1.12rem; margin:2.6rem 0 .6rem; }
p { margin:.4rem 0; max-width:60rem; }
.muted, figcaption { color:var(--muted); font-size:.92rem; }
.numbers { display:grid; grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr)); gap:.7rem;
  margin:1.4rem 0 0; }
.numbers div { background:var(--card); border:1px solid var(--line); border-radius:.55rem;
  padding:.65rem .8rem; }
.numbers b { display:block; font-size:1.3rem; font-variant-numeric:tabular-nums; }
.numbers span { color:var(--muted); font-size:.84rem; }
.badge { display:inline-block; border:1px solid currentColor; border-radius:1rem;
  padding:.02rem .6rem; font-size:.84rem; margin-right:.4rem; }
.good { color:var(--good); } .bad { color:var(--bad); } .accent { color:var(--accent); }
figure { margin:.4rem 0 0; }
figure div { overflow-x:auto; border:1px solid var(--line); border-radius:.55rem; background:#fff; }
figure img { display:block; width:100%; min-width:44rem; height:auto; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:.92rem; font-variant-numeric:tabular-nums; }
th, td { padding:.34rem .65rem; border-bottom:1px solid var(--line); text-align:right;
  white-space:nowrap; }
th { color:var(--muted); font-weight:600; }
th:first-child, td:first-child, .text { text-align:left; }
tr.winner td { font-weight:650; background:var(--card); }
.facts td:last-child { text-align:left; white-space:normal; overflow-wrap:anywhere; }
.facts td:first-child { color:var(--muted); }
details { margin:.5rem 0; } summary { cursor:pointer; color:var(--accent); padding:.2rem 0; }
code { font-size:.92em; }
</style>
</head>
<body><main>
$body
</main></body>
</html>
""")

Cell = str | int | float | None


def render(values: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The page of a document.

    Args:
        values: the document, as in `report.json`.
        images: PNG bytes by name, `timeline` and `sm_curves`; a missing one is left out.
    """
    parts = [
        _header(values),
        _figure("Timeline", images.get("timeline"), _TIMELINE_CAPTION),
        _race(values),
        _bounds(values),
        _ops(values),
        _figure("Throughput against SM share", images.get("sm_curves"), _CURVES_CAPTION),
        _verification(values),
        _provenance(values),
    ]
    title = f"{values['model']} on {values['num_gpus']} x {values['hardware']}: nanoflow-tune"
    return _PAGE.substitute(title=escape(title), body="\n".join(parts))


_TIMELINE_CAPTION = (
    "Two layers in steady state. Each row is a lane: its nano-ops run one after the other, lanes "
    "run side by side on disjoint SMs. Below: SMs held at each moment."
)
_CURVES_CAPTION = (
    "Lines: the whole dense batch with the best kernel at each share. Marks: nano-ops as planned, "
    "on their own rows, so a mark of a split op lies off its line."
)


def _header(values: Mapping[str, Any]) -> str:
    job = (
        f"{values['model']} · {values['num_gpus']} x {values['hardware']} · workload "
        f"{values['workload']} · {values['dense_batch_tokens']} tokens a batch"
    )
    badge, text = _badge(values)
    return (
        f'<header><p class="job">{escape(job)}</p><h1>{escape(values["verdict"])}</h1>'
        f'<p><span class="badge accent">{escape(values["source"])}</span>'
        f'<span class="badge {badge}">{escape(text)}</span></p>'
        f"<p>{escape(values['next_step'])}</p>{_reasons(values['reasons'])}</header>"
        f"{_numbers(values)}"
    )


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
        (f"{values['speedup']:.3f}x", "the best sequential plan"),
        (f"{values['tokens_per_s_per_gpu']:,.0f}", "tokens/s per GPU"),
        (f"{values['joules_per_token'] * 1e3:.1f} mJ", "per token, all GPUs"),
        (f"{values['percent_of_optimal']:.1f} %", "of 2P at the sustained GEMM peak"),
        (_ms(values["lower_bound_us"]), "lower bound at hardware peaks"),
    ]
    if values["watts"] is not None:
        numbers.append((f"{values['watts']:.0f} W", f"a GPU at {values['sm_clock_mhz']} MHz"))
    cells = (
        f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in numbers
    )
    return f'<section class="numbers">{"".join(cells)}</section>'


def _figure(heading: str, png: bytes | None, caption: str) -> str:
    if png is None:
        return ""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<h2>{escape(heading)}</h2><figure><div><img alt="{escape(heading)}" '
        f'src="data:image/png;base64,{data}"></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _race(values: Mapping[str, Any]) -> str:
    heads = ("plan", "nano-batches", "lanes", "ms", "speedup", "mJ/token", "W", "predicted ms")
    rows = [
        (
            row["name"].replace("_", " "),
            row["num_nano_batches"],
            row["num_lanes"],
            f"{row['period_us'] / 1e3:.3f}",
            f"{row['speedup']:.3f}x",
            f"{row['joules_per_token'] * 1e3:.1f}",
            f"{row['watts']:.0f}",
            f"{row['predicted_us'] / 1e3:.3f}",
            row["source"],
        )
        for row in values["race"]
    ]
    winners = [row["is_winner"] for row in values["race"]]
    note = "Sequential may use every kernel that any plan may; speedup is against it."
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
        bounds.append(("power limit: joules against the cap (estimate)", values["power_limit_us"]))
    rows = [(name, f"{us / 1e3:.3f}", f"{100 * us / period_us:.1f} %") for name, us in bounds]
    text = f"{values['bound'].capitalize()} binds. {_certificate(values['certificate'])}"
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
    heads = (
        "nano-op",
        "rows",
        "lane",
        "SMs",
        "kernel",
        "alone us",
        "in plan us",
        "reaches",
        "source",
    )
    cells = [
        (
            row["name"],
            f"{row['tokens'][0]}-{row['tokens'][1]}",
            row["lane"],
            row["num_sms"],
            row["variant"],
            f"{row['alone_us']:.1f}",
            f"{row['beside_us']:.1f}",
            f"{row['throughput']:.3g} {row['unit']}" if row["beside_us"] else "no rows",
            row["source"],
        )
        for row in rows
    ]
    return _table(heads, cells)


def _verification(values: Mapping[str, Any]) -> str:
    if not values["verification"]:
        return "<h2>Verification</h2><p>Not run.</p>"
    heads = (
        "model",
        "device",
        "layers",
        "ranks",
        "dtype",
        "largest error",
        "allowed",
        "orders",
        "",
    )
    rows = [
        (
            record["plan"],
            record["model"],
            record["device"],
            record["num_layers"],
            record["num_ranks"],
            record["dtype"],
            f"{record['max_relative_error']:.2e}",
            f"{record['tolerance']:.0e}",
            record["orders_checked"],
            "passed" if record["passed"] else "FAILED",
        )
        for record in values["verification"]
    ]
    note = (
        "The planned run against the unsplit sequential run, same weights and cache: "
        "||a - b|| / ||b|| of every layer's output, in plan order and random legal orders."
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


def _table(
    heads: Iterable[str], rows: Iterable[Sequence[Cell]], winners: Sequence[bool] = ()
) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines: list[str] = []
    for place, row in enumerate(rows):
        mark = ' class="winner"' if place < len(winners) and winners[place] else ""
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _certificate(proof: Mapping[str, Any]) -> str:
    """What the solver proved, of its own model of one layer."""
    return (
        f"Structure search ({proof['solver']}, {proof['num_binaries']} integers): "
        f"{proof['status'].replace('_', ' ')} in {proof['seconds']:.1f} s; one layer takes "
        f"{proof['period_us']:.1f} us in the solver's model, and no choice in it less than "
        f"{proof['bound_us']:.1f} us (gap {100 * proof['gap']:.1f} %)."
    )


def _ms(us: float) -> str:
    return f"{us / 1e3:.2f} ms"
