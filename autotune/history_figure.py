"""The picture of a search: what was tried, in which order, and how far from the bounds it ended.

matplotlib is imported when the figure is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from .figure_style import GRID, INK, MUTED, STYLE, draw_header, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STAGES = (
    ("sequential", "#1b1f24", "s"),
    ("nano batches alone", "#7F7F7F", "v"),
    ("equal split", "#7F7F7F", "x"),
    ("patterns", "#009E73", "^"),
    ("MILP", "#D55E00", "D"),
    ("refined (Optuna)", "#0072B2", "o"),
)
"""Name, colour and mark of each kind of schedule, in the order of the legend."""
_BEST = "best trial"
_MOST_OF_BEST = 1.6
"""Slower schedules are drawn at the upper edge."""


def stage_of(name: str) -> str:
    """Kind of schedule of a name, as in the legend."""
    known = {
        "sequential": "sequential",
        "nano_only": "nano batches alone",
        "equal_split": "equal split",
    }
    parts = {"milp": "MILP", "refined": "refined (Optuna)"}
    found = (stage for part, stage in parts.items() if part in name)
    return known.get(name) or next(found, "patterns")


def history_png(
    history: Sequence[tuple[int, str, float]],
    *,
    winner: str,
    levels: Mapping[str, float],
    title: str,
    subtitle: str,
) -> bytes | None:
    """The figure; None without a history.

    Args:
        history: (number, schedule name, period in us), in order.
        winner: name of the schedule that won.
        levels: periods in us to hold it against, by name.
        title: what the figure shows, and of which GPU.
        subtitle: how to read it.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tried = [(number, name, us / 1e3) for number, name, us in history if us > 0]
    if not tried:
        return None
    best_ms = min(ms for _, _, ms in tried)
    top = min(_MOST_OF_BEST * best_ms, 1.03 * max(ms for _, _, ms in tried))
    near = {name: us / 1e3 for name, us in levels.items() if us / 1e3 < top}
    bottom = min(best_ms, *near.values()) if near else best_ms
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.6), dpi=150, facecolor="white")
        draw_header(figure, title, f"{subtitle}; winner: {winner.replace('_', ' ')}")
        axes = figure.add_axes((0.06, 0.115, 0.655, 0.69))
        for stage, colour, mark in _STAGES:
            mine = [(n, min(ms, top)) for n, name, ms in tried if stage_of(name) == stage]
            if mine:
                xs, ys = zip(*mine, strict=True)
                style: Any = {"color": colour, "markersize": 4.5, "clip_on": False, "zorder": 3}
                axes.plot(xs, ys, mark, label=stage, **style)
        numbers = [number for number, _, _ in tried]
        best = list(accumulate((ms for _, _, ms in tried), min))
        axes.step(numbers, best, where="post", color=INK, linewidth=1.2, zorder=2)
        axes.set(xlim=(min(numbers) - 1, max(numbers) + 1), ylim=(bottom - 0.06 * top, top))
        _draw_levels(axes, near, best_ms, top - bottom)
        axes.set_xlabel("schedule tried, in order")
        axes.set_ylabel("ms an iteration")
        axes.grid(color=GRID, linewidth=0.6, axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        figure.legend(
            loc="upper left",
            bbox_to_anchor=(0.004, 1 - 0.56 / figure.get_figheight()),
            ncols=len(_STAGES),
            frameon=False,
            fontsize=8.5,
            handletextpad=0.2,
            columnspacing=1.4,
        )
        return png(figure)


def _draw_levels(axes: Axes, levels: Mapping[str, float], best_ms: float, span: float) -> None:
    """A dashed line for each level, its name at the right; names keep their distance."""
    height, step = float("-inf"), 0.085 * span
    named = sorted((*levels.items(), (_BEST, best_ms)), key=lambda held: held[1])
    for name, ms in named:
        height = max(ms, height + step)
        colour = INK if name == _BEST else MUTED
        if name != _BEST:
            axes.axhline(ms, color=colour, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        gap = f" ({100 * (ms / best_ms - 1):+.1f} %)" if name != _BEST else ""
        axes.annotate(
            f"{name}: {ms:.2f} ms{gap}",
            (1.0, ms),
            xycoords=("axes fraction", "data"),
            xytext=(1.02, height),
            textcoords=("axes fraction", "data"),
            va="center",
            size=8.5,
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )
