"""The two pictures of a plan: who runs when on which SMs, and what each op gains from more SMs.

The hue of a bar is the class of its op, the tint its nano-batch. matplotlib is imported when a
figure is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..runtime.op_graph import OpKind
from .figure_style import (
    GRID,
    INK,
    MUTED,
    PALETTE,
    STYLE,
    draw_header,
    mix,
    op_class,
    png,
)
from .trace import Bar, Track, sm_usage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TINT = 0.55
"""How much white is mixed into every second nano-batch."""
SHORT = {
    "kqv": "KQV",
    "decode_attention": "DecAttn",
    "prefill_attention": "PfAttn",
    "o_proj": "O",
    "up_gate": "UpGate",
    "down": "Down",
    "attn_all_reduce": "AR",
    "ffn_all_reduce": "AR",
    "attn_all_gather": "AG",
    "o_proj_columns": "O cols",
    "o_all_gather": "AG",
    "rope_append": "rope",
    "attn_norm": "norm",
    "ffn_norm": "norm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Where a plan runs an op on its curve."""

    num_sms: int
    throughput: float
    schedule: str
    """Name of the schedule that chose it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Throughput of one op against its SM share, best variant at each share."""

    op: str
    kind: OpKind
    unit: str
    """TFLOP/s, TB/s or GB/s."""
    num_sms: tuple[int, ...]
    throughput: tuple[float, ...]
    is_measured: tuple[bool, ...]
    """Whether each point is a row of the profile."""
    is_roofline: bool
    chosen: tuple[Chosen, ...] = ()


def timeline_png(tracks: Sequence[Track], *, title: str, subtitle: str, num_sms: int) -> bytes:
    """A Gantt of each track, with the SMs it holds over time below it.

    Args:
        tracks: windows that start at time 0, drawn on one time axis.
        title: model, GPU and batch.
        subtitle: where the times come from.
        num_sms: SMs of the GPU.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    inches = _HEADER_IN + sum(_track_inches(played) for played in tracks) + 0.2
    end_us = max(bar.end_us for played in tracks for bar in played.bars)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH_IN, inches), dpi=150, facecolor="white")
        draw_header(figure, title, subtitle)
        _draw_classes_legend(figure, tracks)
        top = inches - _HEADER_IN
        for played in tracks:
            lanes_in = _LANE_IN * len(played.lanes)
            top -= _HEADING_IN + lanes_in
            lanes = figure.add_axes(_box(top, lanes_in, inches))
            top -= 0.1 + _SHARES_IN
            shares = figure.add_axes(_box(top, _SHARES_IN, inches))
            top -= _BELOW_IN
            _draw_lanes(lanes, played, end_us)
            _draw_shares(shares, played, end_us, num_sms)
            if played is tracks[-1]:
                shares.set_xlabel("time, ms: two layers in steady state")
        return png(figure)


_WIDTH_IN, _HEADER_IN, _HEADING_IN, _LANE_IN, _SHARES_IN, _BELOW_IN = (
    12.5,
    0.95,
    0.3,
    0.4,
    0.8,
    0.38,
)


def _track_inches(played: Track) -> float:
    return _HEADING_IN + _LANE_IN * len(played.lanes) + 0.1 + _SHARES_IN + _BELOW_IN


def _box(bottom_in: float, height_in: float, inches: float) -> tuple[float, float, float, float]:
    return (0.07, bottom_in / inches, 0.915, height_in / inches)


def _draw_lanes(axes: Axes, played: Track, end_us: float) -> None:
    axes.set(xlim=(0, end_us / 1e3), ylim=(len(played.lanes) - 0.4, -0.6))
    axes.set_yticks(range(len(played.lanes)), played.lanes)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=False, length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    for place, lane in enumerate(played.lanes):
        if not any(bar.lane == lane and bar.duration_us > 0 for bar in played.bars):
            text = "no rows: what this lane would run is empty in this batch"
            axes.text(0, place, text, va="center", size=7.5, color=MUTED)
    for bar in played.bars:
        lane = played.lanes.index(bar.lane)
        axes.barh(
            lane,
            bar.duration_us / 1e3,
            left=bar.start_us / 1e3,
            height=0.82,
            color=_tint(bar),
            edgecolor="white",
            linewidth=0.7,
        )
        _label(axes, bar, lane, end_us)
    length_us = max(bar.end_us for bar in played.bars)
    axes.axvline(length_us / 1e3, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    is_measured = played.source == "measured"
    heading = f"{played.title}: {played.period_us / 1e3:.2f} ms an iteration"
    heading += f" ({'as it ran' if is_measured else 'as planned'}, {played.source})"
    if played.measured_us:
        heading += f", {played.measured_us / 1e3:.2f} ms measured"
    axes.set_title(heading, loc="left", size=10, weight="bold", pad=5)


def _label(axes: Axes, bar: Bar, lane: int, end_us: float) -> None:
    width_chars = bar.duration_us / end_us * 170
    short = SHORT.get(bar.op, bar.op)
    suffix = str(bar.nano_batch + 1)
    share = f"{bar.num_sms or 'no'} SMs"
    for text in (f"{short} {suffix} · {share}", f"{short} {suffix}", short):
        if len(text) + 0.8 <= width_chars:
            middle = (bar.start_us + bar.end_us) / 2e3
            ink = "white" if bar.nano_batch % 2 == 0 else INK
            axes.text(middle, lane, text, ha="center", va="center", size=7.5, color=ink)
            return


def _draw_shares(axes: Axes, played: Track, end_us: float, num_sms: int) -> None:
    classes = list(PALETTE)
    steps = sm_usage(played.bars, lambda bar: op_class(bar.kind), classes)
    times = [time_us / 1e3 for time_us, _ in steps]
    stacks = [[usage[name] for _, usage in steps] for name in classes]
    axes.stackplot(times, stacks, step="post", colors=list(PALETTE.values()), linewidth=0)
    axes.axhline(num_sms, color=INK, linewidth=0.8)
    axes.set(xlim=(0, end_us / 1e3), ylim=(0, num_sms * 1.08), ylabel="SMs")
    axes.set_yticks([num_sms // 2, num_sms])  # 0 would touch the 0.0 of the time axis
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)


def _draw_classes_legend(figure: Figure, tracks: Sequence[Track]) -> None:
    from matplotlib.patches import Patch

    bars = [bar for played in tracks for bar in played.bars]
    present = {op_class(bar.kind) for bar in bars}
    handles = [Patch(color=PALETTE[name], label=name) for name in PALETTE if name in present]
    if any(bar.nano_batch for bar in bars):
        label = "light: even nano-batches"
        handles.append(Patch(color=mix(PALETTE["GEMM"], _TINT), label=label))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.56 / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
    )


def sm_curves_png(curves: Sequence[Curve], *, title: str, subtitle: str) -> bytes:
    """One small plot per op: throughput against SM share, with the plan's choices marked."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = 5 if len(curves) > 8 else 4
    rows = -(-len(curves) // columns)
    inches = 1.9 * rows + 1.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, inches), dpi=150, facecolor="white")
        grid = figure.add_gridspec(
            rows,
            columns,
            left=0.05,
            right=0.985,
            top=1 - 0.95 / inches,
            bottom=0.42 / inches,
            hspace=0.45,
            wspace=0.3,
        )
        for place, curve in enumerate(curves):
            axes = figure.add_subplot(grid[place // columns, place % columns])
            _draw_curve(axes, curve)
            if place >= len(curves) - columns:
                axes.set_xlabel("SMs")
        draw_header(figure, title, subtitle)
        _draw_marks_legend(figure, curves, 1 - 0.08 / inches)
        return png(figure)


_MARKS = {"winner": ("o", INK), "best overlapped": ("D", "white"), "sequential": ("s", "white")}


def _draw_curve(axes: Axes, curve: Curve) -> None:
    colour = PALETTE[op_class(curve.kind)]
    dashed = (0, (4, 2)) if curve.is_roofline else "solid"
    axes.plot(curve.num_sms, curve.throughput, color=colour, linewidth=1.8, linestyle=dashed)
    axes.fill_between(curve.num_sms, curve.throughput, color=colour, alpha=0.10, linewidth=0)
    dots = [
        point
        for *point, measured in zip(curve.num_sms, curve.throughput, curve.is_measured, strict=True)
        if measured
    ]
    axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=colour, markersize=3.2)
    for chosen in curve.chosen:
        marker, face = _MARKS[chosen.schedule]
        axes.plot(
            chosen.num_sms,
            chosen.throughput,
            marker=marker,
            markersize=5.8,
            markerfacecolor=face,
            markeredgecolor=INK,
            markeredgewidth=1.1,
            clip_on=False,
            zorder=3,
        )
    top = max([*curve.throughput, *(chosen.throughput for chosen in curve.chosen)])
    axes.set(xlim=(0, max(curve.num_sms)), ylim=(0, top * 1.12 or 1.0))
    axes.set_title(curve.op.replace("_", " "), loc="left", size=10, weight="bold", pad=4)
    axes.set_title(curve.unit, loc="right", size=8, color=MUTED, pad=4)
    axes.set_xticks([tick for tick in (0, 32, 64, 96) if tick < max(curve.num_sms) - 12])
    axes.set_xticks([*axes.get_xticks(), max(curve.num_sms)])
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _draw_marks_legend(figure: Figure, curves: Iterable[Curve], top: float) -> None:
    from matplotlib.lines import Line2D

    used = {chosen.schedule for curve in curves for chosen in curve.chosen}
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            markerfacecolor=face,
            markeredgecolor=INK,
            label=f"chosen by {name}",
        )
        for name, (marker, face) in _MARKS.items()
        if name in used
    ]
    if handles:
        figure.legend(
            handles=handles,
            loc="upper right",
            bbox_to_anchor=(0.99, top),
            ncols=len(handles),
            frameon=False,
            fontsize=8.5,
        )


def _tint(bar: Bar) -> str:
    return mix(PALETTE[op_class(bar.kind)], _TINT * (bar.nano_batch % 2))
