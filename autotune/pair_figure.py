"""The pair-interference heat map: how much two kernels slow each other on disjoint SMs.

One row for each pair of kinds, one column for each division of the SMs; each half of a cell is one
of the two. Only measured pairs are drawn; where several kernels were measured, their median.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from ..profiler.profile import PairRow
from ..runtime.op_graph import OpKind
from .figure_style import GRID, INK, MUTED, STYLE, draw_header, op_class, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES: dict[str, str] = {
    "gemm": "GEMM",
    "gemm_silu": "up/gate + SiLU",
    "grouped_gemm": "grouped GEMM",
    "grouped_gemm_silu": "grouped up/gate + SiLU",
    "decode_attention": "DecAttn",
    "prefill_attention": "PfAttn",
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "norm": "norm",
    "rope_append": "rope",
}
_CLASSES = ("GEMM", "prefill attention", "decode attention", "collective", "norm, rotary")
_HARMLESS, _WORST = 1.0, 1.5
"""Ends of the colour scale: no slowdown, and one that eats what overlap can give."""


@dataclass(frozen=True, slots=True)
class PairCell:
    """Median slowdowns of some pairs of kinds at one division of the SMs."""

    slowdown_a: float
    slowdown_b: float
    num_kernels: int


Cells = dict[tuple[tuple[str, str], tuple[int, int]], PairCell]


def pair_cells(pairs: Iterable[PairRow]) -> Cells:
    """Cells by (kind A, kind B) and (SMs of A, SMs of B), of measured pairs only.

    A is the kind that comes first in the order of classes, compute before the rest.
    """
    found: defaultdict[tuple[tuple[str, str], tuple[int, int]], list[tuple[float, float]]]
    found = defaultdict(list)
    for pair in pairs:
        if pair.source != "measured":
            continue
        ends = [(pair.a, pair.slowdown_a), (pair.b, pair.slowdown_b)]
        ends.sort(key=lambda end: (_rank(end[0].kind), end[0].kind))
        (a, slow_a), (b, slow_b) = ends
        found[(a.kind, b.kind), (a.num_sms, b.num_sms)].append((slow_a, slow_b))
    return {
        key: PairCell(median(a for a, _ in values), median(b for _, b in values), len(values))
        for key, values in found.items()
    }


def _rank(kind: str) -> int:
    return _CLASSES.index(op_class(cast(OpKind, kind)))


def pairs_png(pairs: Iterable[PairRow], *, title: str, subtitle: str) -> bytes | None:
    """The heat map; None where no pair was measured.

    Args:
        pairs: of the profile.
        title: what the figure shows, and of which GPU.
        subtitle: how to read it.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    cells = pair_cells(pairs)
    if not cells:
        return None
    kinds = sorted({key[0] for key in cells}, key=lambda k: (_rank(k[0]), k[0], _rank(k[1]), k[1]))
    divisions = sorted({key[1] for key in cells}, reverse=True)
    inches = 0.8 + 0.52 * len(kinds) + 0.62
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, inches), dpi=150, facecolor="white")
        draw_header(figure, title, subtitle)
        width = min(0.79, 0.105 * len(divisions))
        axes = figure.add_axes((0.185, 0.62 / inches, width, 0.52 * len(kinds) / inches))
        _draw_cells(axes, cells, kinds, divisions)
        return png(figure)


def _draw_cells(
    axes: Axes,
    cells: Cells,
    kinds: Sequence[tuple[str, str]],
    divisions: Sequence[tuple[int, int]],
) -> None:
    from matplotlib.patches import Rectangle

    for row, kind in enumerate(kinds):
        for column, division in enumerate(divisions):
            cell = cells.get((kind, division))
            if cell is None:
                axes.add_patch(Rectangle((column, row), 1, 1, facecolor="white", edgecolor=GRID))
                continue
            for half, slowdown in enumerate((cell.slowdown_a, cell.slowdown_b)):
                left = column + half / 2
                colour = _colour(slowdown)
                axes.add_patch(Rectangle((left, row), 0.5, 1, facecolor=colour, edgecolor="white"))
                axes.text(
                    left + 0.25,
                    row + 0.5,
                    f"{slowdown:.2f}",
                    ha="center",
                    va="center",
                    size=8.5,
                    color="white" if _part(slowdown) > 0.6 else INK,
                )
    names = [f"{_name(a)} | {_name(b)}" for a, b in kinds]
    axes.set(xlim=(0, len(divisions)), ylim=(len(kinds), 0))
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], names)
    labels = [f"{a or 'no'} | {b or 'no'}" for a, b in divisions]
    axes.set_xticks([column + 0.5 for column in range(len(divisions))], labels)
    axes.set_xlabel("SMs of the first | of the second", color=MUTED)
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _name(kind: str) -> str:
    return _NAMES.get(kind, kind.replace("_", " "))


def _part(slowdown: float) -> float:
    return min(1.0, max(0.0, (slowdown - _HARMLESS) / (_WORST - _HARMLESS)))


def _colour(slowdown: float) -> Any:  # noqa: ANN401 - RGBA
    """White where nothing is slowed, a strong orange where the gain of overlap is gone."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("slowdown", ["#f3f5f7", "#f3b27a", "#a63c00"])
    return scale(_part(slowdown))
