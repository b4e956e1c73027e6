"""Colours, type and page frame that the figures share.

Colours are the Okabe-Ito palette (safe for colour-blind readers): the hue is the class of the op.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ..runtime.op_graph import OpKind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = {
    "GEMM": "#0072B2",
    "decode attention": "#D55E00",
    "prefill attention": "#E69F00",
    "collective": "#009E73",
    "norm, rotary": "#7F7F7F",
}
"""Colour of each class of ops, in the order of the legend."""
INK, MUTED, GRID = "#1b1f24", "#57606a", "#d8dee4"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "hatch.linewidth": 0.6,
}


def op_class(kind: OpKind) -> str:
    """Class of an op kind in `PALETTE`."""
    classes: dict[OpKind, str] = {
        "gemm": "GEMM",
        "gemm_silu": "GEMM",
        "grouped_gemm": "GEMM",
        "grouped_gemm_silu": "GEMM",
        "decode_attention": "decode attention",
        "prefill_attention": "prefill attention",
        "all_reduce": "collective",
        "all_gather": "collective",
    }
    return classes.get(kind, "norm, rotary")


def draw_header(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle at the top left."""
    inches = figure.get_figheight()
    figure.text(0.012, 1 - 0.14 / inches, title, size=13, weight="bold", va="top")
    figure.text(0.012, 1 - 0.40 / inches, subtitle, size=9.5, color=MUTED, va="top")


def mix(colour: str, white: float) -> str:
    """The colour with a share of white."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * white):02x}" for c in channels)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
