"""The roofline of a GPU with the ops of a plan on it: what each could reach, and what it reaches.

Ops without a byte of device memory or without FLOPs, such as collectives, have no place on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..runtime.op_graph import OpKind
from ..search_spaces.schema import HardwareSpec
from .figure_style import GRID, INK, MUTED, PALETTE, STYLE, draw_header, op_class, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, kw_only=True)
class RoofPoint:
    """One op, with its time on the SMs that it has."""

    name: str
    kind: OpKind
    flops: float
    memory_bytes: float
    us: float

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.flops / self.memory_bytes

    @property
    def flops_per_s(self) -> float:
        """What it reaches."""
        return self.flops / (self.us * 1e-6)


def roof(intensity: float, peak_flops_per_s: float, bytes_per_s: float) -> float:
    """FLOP/s that peak and bandwidth allow at an intensity in FLOP/byte."""
    return min(peak_flops_per_s, intensity * bytes_per_s)


def roofline_png(
    points: Iterable[RoofPoint],
    hardware: HardwareSpec,
    dtype: str,
    *,
    sustained_flops_per_s: float,
    sustained: str,
    title: str,
    subtitle: str,
) -> bytes | None:
    """The figure; None where no op has both FLOPs and bytes.

    Args:
        points: ops of a schedule.
        hardware: gives the roof.
        dtype: of the peak.
        sustained_flops_per_s: what GEMMs reach, as a second roof.
        sustained: what to call it.
        title: what the figure shows, and of which GPU.
        subtitle: how to read it.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [point for point in points if min(point.flops, point.memory_bytes, point.us) > 0]
    if not shown:
        return None
    peak, bytes_per_s = hardware.peak(dtype), hardware.memory_bytes_per_s
    ridge = peak / bytes_per_s
    low = min(ridge, *(point.intensity for point in shown)) / 3
    high = max(ridge, *(point.intensity for point in shown)) * 5
    lowest = min(point.flops_per_s for point in shown) / 2.5
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 5.2), dpi=150, facecolor="white")
        draw_header(figure, title, subtitle)
        axes = figure.add_axes((0.065, 0.115, 0.915, 0.735))
        axes.set(xscale="log", yscale="log")
        axes.set(xlim=(low, high), ylim=(lowest / 1e12, peak / 1e12 * 2))
        edges = (low, ridge, high)
        heights = [roof(x, peak, bytes_per_s) / 1e12 for x in edges]
        axes.plot(edges, heights, color=INK, linewidth=1.6)
        second = sustained_flops_per_s / 1e12
        axes.axhline(second, color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)))
        left = low * 1.1
        axes.text(left, second * 1.07, f"{sustained}: {second:.0f} TFLOP/s", **_SMALL)
        axes.text(ridge, peak / 1e12 * 1.1, f"{dtype} peak: {peak / 1e12:.0f} TFLOP/s", **_SMALL)
        start = max(low, lowest / bytes_per_s) * 1.25
        text = f"{bytes_per_s / 1e12:.1f} TB/s  "
        axes.text(start, start * bytes_per_s / 1e12 * 1.5, text, ha="center", **_SMALL)
        _draw_points(axes, shown, peak, bytes_per_s, second)
        axes.set_xlabel("FLOP / byte of device memory")
        axes.set_ylabel("TFLOP/s")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, which="both")
        return png(figure)


_SMALL: Any = {"size": 8.5, "color": MUTED}
_LINE = 1.27
"""Ratio of the heights of two names, in TFLOP/s, that do not touch."""
_CLOSE = 3.0
"""Ops within this ratio of each other, both ways, have their names in one column."""


def _draw_points(
    axes: Axes, points: Sequence[RoofPoint], peak: float, bytes_per_s: float, sustained: float
) -> None:
    """A mark for each op, a thin line up to its roof, and its name with the part reached.

    Args:
        axes: logarithmic both ways.
        points: what to draw.
        peak: FLOP/s of the roof.
        bytes_per_s: of the roof.
        sustained: height of the dashed line, on which no name may lie, in TFLOP/s.
    """
    for group in groups_of(points):
        x = max(point.intensity for point in group) * 1.12
        height = max(point.flops_per_s for point in group) / 1e12
        if 1 / _LINE < height / sustained < _LINE:
            height = sustained / _LINE
        for point in sorted(group, key=lambda point: -point.intensity):
            colour, y = PALETTE[op_class(point.kind)], point.flops_per_s / 1e12
            top = roof(point.intensity, peak, bytes_per_s)
            line: Any = {"color": colour, "linewidth": 0.8, "alpha": 0.6}
            axes.plot([point.intensity] * 2, [y, top / 1e12], **line)
            axes.plot(
                point.intensity, y, "o", color=colour, markersize=6.5, markeredgecolor="white"
            )
            axes.annotate(
                f"{point.name}: {y:.0f} TFLOP/s, {100 * point.flops_per_s / top:.0f} %",
                (point.intensity, y),
                xytext=(x, height),
                textcoords="data",
                va="center",
                size=8.5,
                color=INK,
                arrowprops={"arrowstyle": "-", **line, "shrinkB": 4, "relpos": (0, 0.5)},
            )
            height /= _LINE


def groups_of(points: Iterable[RoofPoint]) -> list[list[RoofPoint]]:
    """Points that lie close to each other, directly or by others between them."""
    groups: list[list[RoofPoint]] = []
    for point in points:
        near = [group for group in groups if any(_is_close(point, other) for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append([point, *(other for group in near for other in group)])
    return groups


def _is_close(a: RoofPoint, b: RoofPoint) -> bool:
    ratios = a.intensity / b.intensity, a.flops_per_s / b.flops_per_s
    return all(1 / _CLOSE < ratio < _CLOSE for ratio in ratios)
