"""A plan book in a report: what `report.json` holds of it, and its section of `report.html`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from ..runtime.plan import Bucket
from ..runtime.plan_lookup import PREDICTED_MARGIN
from .book import Book
from .break_even import MOST_LISTED, sentence
from .regret import Regret, RegretSample

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def book_values(book: Book) -> dict[str, Any]:
    """The book as plain values, one row a point."""
    return {
        "sentence": _sentence(book),
        "points": [_point(bucket) for bucket in book.buckets],
        "break_even": [{**asdict(found), "text": sentence(found)} for found in book.break_even],
        "regret": _regret(book.regret) if book.regret else None,
        "left_out": [
            {"mix": point.mix, "tokens": key[0], "decode_tokens": key[1], "context_tokens": key[2]}
            for point in book.left_out
            for key in (point.key,)
        ],
    }


def _sentence(book: Book) -> str:
    """The break-even of the workload's own series, and whether others differ."""
    main, *others = book.break_even
    text = f"{sentence(main)[:1].upper()}{sentence(main)[1:]}."
    paying = [sentence(found) for found in others if found.wins_at]
    first = "Also," if main.wins_at else "But"
    if len(paying) > 2:
        which = f"{len(paying)} of the {len(others)}"
        if len(paying) == len(others):
            which = f"all {len(others)}"
        text += (
            f" {first} overlap pays at some sizes of {which} other mixes and KV lengths of the "
            "plan book."
        )
    elif paying:
        text += f" {first} {'; '.join(paying)}."
    elif others and not main.wins_at:
        text += " Nor does it for any other mix or KV length of the plan book."
    return (
        f"{text} {_how_known(book.buckets[0])}; to pay, overlap must be predicted more than "
        f"{100 * PREDICTED_MARGIN:g} % faster."
    )


def _how_known(main: Bucket) -> str:
    """What is measured, and by how much the prediction missed there."""
    if not main.winner.measured:
        return "All points are predicted"
    overlapped, sequential = main.best_overlapped, main.sequential
    text = "The workload's own batch is measured, the others are predicted"
    if overlapped.measured is None or sequential.measured is None:
        return text
    measured = sequential.measured.period_us / overlapped.measured.period_us
    predicted = sequential.predicted.period_us / overlapped.predicted.period_us
    if abs(predicted / measured - 1) <= PREDICTED_MARGIN:
        return text
    return (
        f"{text} and may be as far off: overlap measured {measured:.3f}x there, {predicted:.3f}x "
        "was predicted"
    )


def _point(bucket: Bucket) -> dict[str, Any]:
    sequential, overlapped = bucket.sequential, bucket.best_overlapped
    is_measured = bool(sequential.measured and overlapped.measured)
    sequential_us = (sequential.best_known if is_measured else sequential.predicted).period_us
    overlapped_us = (overlapped.best_known if is_measured else overlapped.predicted).period_us
    return {
        "mix": bucket.mix,
        "tokens": bucket.dense_batch_tokens,
        "decode_tokens": bucket.decode_tokens,
        "context_tokens": bucket.decode_context_tokens,
        "winner": bucket.winner.schedule.name,
        "is_overlapped": bucket.winner.schedule.is_overlapped,
        "sequential_us": sequential_us,
        "best_overlapped_us": overlapped_us,
        "ratio": round(sequential_us / overlapped_us, 4),
        "bound": bucket.bound,
        "source": "measured" if is_measured else sequential.predicted.source,
    }


def _regret(regret: Regret) -> dict[str, Any]:
    return {
        "median_percent": round(regret.median_percent, 2),
        "worst_percent": round(regret.worst.percent, 2),
        "median_choice_percent": round(regret.median_choice_percent, 2),
        "worst_choice_percent": round(regret.worst_choice_percent, 2),
        "samples": [_sample(sample) for sample in regret.samples],
    }


def _sample(sample: RegretSample) -> dict[str, Any]:
    times = {key: round(getattr(sample, key), 1) for key in ("chosen_us", "fresh_us", "padded_us")}
    return {**asdict(sample), **times, "percent": round(sample.percent, 2)}


def book_section(values: Mapping[str, Any] | None, table: Table) -> str:
    """The section of the page; empty without a book, and for reports from before there were any.

    Args:
        values: as `book_values` made them.
        table: headings and rows to HTML.
    """
    if values is None:
        return ""
    sizes = sorted({point["tokens"] for point in values["points"]})
    series: dict[tuple[str, float], dict[int, Mapping[str, Any]]] = {}
    for point in values["points"]:
        series.setdefault((point["mix"], point["context_tokens"]), {})[point["tokens"]] = point
    even = {(row["mix"], row["decode_context_tokens"]): row for row in values["break_even"]}
    rows = [
        (
            f"{mix.replace('_', ' ')}, {context:.0f} keys",
            *(_cell(points.get(size)) for size in sizes),
            _from(even[mix, context]),
        )
        for (mix, context), points in series.items()
    ]
    heads = ("mix, KV length", *map(str, sizes), "pays from")
    note = (
        "Best sequential time / best overlapped time by the size of the dense batch, in tokens. "
        "A star: the overlapped plan wins. A dash: not searched, as its KV cache does not fit."
    )
    return (
        f"<h2>Plan book</h2><p>{escape(values['sentence'])}</p>{table(heads, rows)}"
        f'<p class="muted">{escape(note)}</p>{_regret_text(values["regret"])}'
    )


def _cell(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return "-"
    return f"{point['ratio']:.3f}{'*' if point['is_overlapped'] else ''}"


def _from(found: Mapping[str, Any]) -> str:
    if found["tokens"] is not None:
        return str(found["tokens"])
    if len(found["wins_at"]) > MOST_LISTED:
        return f"at {len(found['wins_at'])} sizes"
    return f"{', '.join(map(str, found['wins_at']))} only" if found["wins_at"] else "never"


def _regret_text(regret: Mapping[str, Any] | None) -> str:
    if regret is None:
        return ""
    text = (
        f"Between the points, over {len(regret['samples'])} random batches, the plan that the book "
        f"chooses takes {regret['median_percent']:.1f} % (median) and at worst "
        f"{regret['worst_percent']:.1f} % longer than the best of a fresh search for exactly that "
        "batch, padding to the next size included. Padding aside, the choice costs "
        f"{regret['median_choice_percent']:.1f} %, at worst {regret['worst_choice_percent']:.1f} %."
    )
    return f"<p>{escape(text)}</p>"
