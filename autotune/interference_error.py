"""How far the cost model is off for kernels side by side, on rows it was not given.

Pairs: fitted on every other measured pair, predicted for the rest. Triples: predicted as the
product of two pairwise slowdowns (what the simulator does with three lanes), from all pairs. Only
measured rows are compared. `nanoflow-tune profile --errors` writes the section into the README
beside the profile.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..profiler.interference import place_of
from ..profiler.profile import Point, Profile
from ..runtime.op_graph import Op, OpKind
from ..runtime.op_shapes import op_of_shape
from ..search_spaces.schema import DTYPE_BYTES, Dtype, HardwareSpec
from .interference import Interference, Place

START, END = "<!-- co-runs: written by `nanoflow-tune profile --errors` -->", "<!-- co-runs end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """One slowdown: measured, and predicted without its row."""

    kinds: tuple[str, ...]
    """The kernel's own kind, then those it ran beside."""
    place: str
    """Kernels and SMs, in words."""
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1

    @property
    def ignored_error(self) -> float:
        """The error of a model without interference."""
        return 1 / self.measured - 1


def held_out_pairs(profile: Profile, hardware: HardwareSpec) -> list[Miss]:
    """Slowdowns of every other measured pair, predicted from the rest."""
    measured = [pair for pair in profile.pairs if pair.source == "measured"]
    measured.sort(key=lambda pair: repr(place_of((pair.a, pair.b))))
    model, dtype = Interference(measured[0::2], hardware), profile.dtype
    return [
        miss
        for pair in measured[1::2]
        for miss in _misses(model, dtype, (pair.a, pair.b), (pair.slowdown_a, pair.slowdown_b))
    ]


def triples_from_pairs(profile: Profile, hardware: HardwareSpec) -> list[Miss]:
    """Slowdowns of the measured triples, predicted as products of pairwise ones."""
    model = Interference(profile.pairs, hardware)
    return [
        miss
        for row in profile.triples
        if row.source == "measured"
        for miss in _misses(
            model,
            profile.dtype,
            (row.a, row.b, row.c),
            (row.slowdown_a, row.slowdown_b, row.slowdown_c),
        )
    ]


def _misses(
    model: Interference, dtype: str, points: Sequence[Point], slowdowns: Sequence[float]
) -> list[Miss]:
    dtype_bytes = DTYPE_BYTES[cast(Dtype, dtype)]
    ops: list[Op] = [op_of_shape(cast(OpKind, p.kind), p.shape, dtype_bytes) for p in points]
    places = [Place(op, p.num_sms, p.variant) for op, p in zip(ops, points, strict=True)]
    found: list[Miss] = []
    for index, (point, measured) in enumerate(zip(points, slowdowns, strict=True)):
        others = [number for number in range(len(points)) if number != index]
        predicted = 1.0
        for other in others:
            predicted *= model.slowdown(places[index], places[other])
        found.append(
            Miss(
                kinds=(point.kind, *(points[other].kind for other in others)),
                place=" beside ".join(_words(points[number]) for number in (index, *others)),
                measured=measured,
                predicted=predicted,
            )
        )
    return found


def _words(point: Point) -> str:
    return f"{point.kind} {point.variant} on {point.num_sms}"


def report_section(profile: Profile, hardware: HardwareSpec) -> str:
    """The section as Markdown; only what was measured is in it."""
    pairs, triples = held_out_pairs(profile, hardware), triples_from_pairs(profile, hardware)
    text = [
        START,
        "## Error of predicted co-runs",
        "",
        "A slowdown is the time of a kernel beside others over its time alone on the same SMs, "
        "here as measured; the cost model takes out of those of compute-bound kernels what the "
        "clocks fall by. For "
        "a pair that was not measured the cost model takes the measured pairs of the same two "
        "kinds, of the same kernel where memory binds it, with the nearest shares (by ratio), else "
        "those of the same two resources, whatever their shapes; without any it takes 1, or for "
        "two memory-bound kernels, and beside copy engines, what sharing the bandwidth costs. "
        "Three lanes get the product of "
        "their pairwise slowdowns.",
        "",
        f"Pairs: every other one of {len(profile.pairs)} was left out and predicted from the rest.",
        "",
        *_table(pairs),
        "",
        f"Triples ({len(profile.triples)} spot checks) against the product of pairwise slowdowns:",
        "",
        *_table(triples),
        END,
    ]
    return "\n".join(text) + "\n"


def _table(misses: Iterable[Miss]) -> list[str]:
    groups = defaultdict[tuple[str, ...], list[Miss]](list)
    for miss in misses:
        groups[miss.kinds].append(miss)
    if not groups:
        return ["None was measured."]
    lines = [
        "| slowdown of | beside | n | measured | median error | worst error | if ignored |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for kinds, mine in sorted(groups.items()):
        worst = max(mine, key=lambda miss: abs(miss.error))
        span = f"{min(m.measured for m in mine):.2f} to {max(m.measured for m in mine):.2f}"
        lines.append(
            f"| {kinds[0]} | {', '.join(kinds[1:])} | {len(mine)} | {span} | "
            f"{_median_error(mine):.1%} | {worst.error:+.1%} | "
            f"{statistics.median(abs(miss.ignored_error) for miss in mine):.1%} |"
        )
    return lines


def _median_error(misses: Sequence[Miss]) -> float:
    return statistics.median(abs(miss.error) for miss in misses)


def write_section(path: Path, profile: Profile, hardware: HardwareSpec) -> dict[str, Any]:
    """Put the section into a README, in place of its former one; returns the figures.

    Raises:
        ValueError: the profile has fewer than two measured pairs.
    """
    if len(profile.pairs) < 2:
        raise ValueError(
            f"the error of pairs needs at least two measured pairs, but the profile has "
            f"{len(profile.pairs)}; measure some with `nanoflow-tune profile --parts pairs`"
        )
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Profile of {hardware.name}\n"
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2].lstrip("\n")
    section = report_section(profile, hardware)
    whole = before.rstrip("\n") + "\n\n" + section + (f"\n{after}" if after else "")
    path.write_text(whole, encoding="utf-8")
    pairs, triples = held_out_pairs(profile, hardware), triples_from_pairs(profile, hardware)
    values: Mapping[str, Sequence[Miss]] = {"pair": pairs, "triple": triples}
    figures = {
        f"median_{name}_error": round(_median_error(misses), 4)
        for name, misses in values.items()
        if misses
    }
    return {
        "readme": str(path),
        "pairs": len(profile.pairs),
        "triples": len(profile.triples),
    } | figures
