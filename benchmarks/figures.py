"""The rows of `results/figures.csv`: one figure of one case, with what it should reach.

Every benchmark writes its rows here through `write_figures`, which replaces rows of the same id and
case and keeps all others; `worst` is the case that decides. Needs no GPU and no torch.

    python benchmarks/figures.py                 show the worst case of each figure
    python benchmarks/figures.py OTHER.csv ...   first take over the rows of other files
"""

from __future__ import annotations

import csv
import os
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

FIGURES = Path("results/figures.csv")
_REACH = re.compile(r"(>=|<=) (\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureRow:
    """One figure of one case, measured in one run."""

    id: str
    """Which figure, e.g. `gemm_full`."""
    case: str
    """What it was measured on, in words: shape, tokens, SM share."""
    value: float
    unit: str
    """`x` (ratio), `B/clk` or `TB/s`."""
    reach: str
    """`>= 0.97` or `<= 0.5`; "" where nothing is asked of it."""
    spread: str
    """Lowest and highest round, e.g. `0.981-1.012`."""
    command: str
    commit: str
    gpu: str
    date: str

    def __post_init__(self) -> None:
        if self.reach and _REACH.fullmatch(self.reach) is None:
            raise ValueError(
                f"`reach` must read '>= NUMBER' or '<= NUMBER', but got {self.reach!r} for "
                f"{self.id}; leave it empty where nothing is asked"
            )

    @property
    def is_at_most(self) -> bool:
        """Whether smaller is better: the reach is an upper bound."""
        return self.reach.startswith("<=")

    @property
    def limit(self) -> float | None:
        """The number in `reach`; None without one."""
        return float(self.reach[3:]) if self.reach else None

    @property
    def is_reached(self) -> bool:
        """Whether the value is on the right side of the reach; True without one."""
        if self.limit is None:
            return True
        return self.value <= self.limit if self.is_at_most else self.value >= self.limit


COLUMNS = tuple(field.name for field in fields(FigureRow))


def spread_of(values: Sequence[float]) -> str:
    """Lowest and highest of the rounds, as `FigureRow.spread` holds them."""
    return f"{min(values):.3f}-{max(values):.3f}"


def worst(rows: Iterable[FigureRow]) -> FigureRow:
    """The case that decides: the lowest value, or the highest where the reach is an upper bound.

    Raises:
        ValueError: no rows.
    """
    return min(rows, key=lambda row: -row.value if row.is_at_most else row.value)


def summary(rows: Iterable[FigureRow]) -> str:
    """One line for each id with a reach: its worst case, its median, how many cases reach it."""
    by_id: dict[str, list[FigureRow]] = {}
    for row in rows:
        if row.reach:
            by_id.setdefault(row.id, []).append(row)
    lines: list[str] = []
    for figure_id, mine in by_id.items():
        decides = worst(mine)
        reached = sum(row.is_reached for row in mine)
        median = statistics.median(row.value for row in mine)
        lines.append(
            f"{figure_id}: worst {decides.value:.3f} {decides.unit} ({decides.case}), median "
            f"{median:.3f}; {reached} of {len(mine)} cases reach {decides.reach}"
        )
    return "\n".join(lines)


def read_figures(path: Path = FIGURES) -> list[FigureRow]:
    """The rows of a figures file; none when it does not exist.

    Raises:
        ValueError: other columns, or a value that is no number.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        columns = tuple(next(lines, ()))
        if columns != COLUMNS:
            raise ValueError(
                f"{path} must have the columns {','.join(COLUMNS)}, but has {','.join(columns)}: "
                "move it away and measure again"
            )
        return [_row(dict(zip(COLUMNS, cells, strict=True))) for cells in lines]


def _row(cells: dict[str, str]) -> FigureRow:
    text = {name: cell for name, cell in cells.items() if name != "value"}
    return FigureRow(value=float(cells["value"]), **text)


def write_figures(rows: Iterable[FigureRow], path: Path = FIGURES) -> None:
    """Put rows into a figures file, sorted by id and case; former rows of a case are replaced.

    The file is replaced in one step, so that a killed run leaves the former one whole.
    """
    kept = {(row.id, row.case): row for row in read_figures(path)}
    kept.update({(row.id, row.case): row for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key in sorted(kept):
            cells = astuple(kept[key])
            writer.writerow([f"{c:.4f}" if isinstance(c, float) else c for c in cells])
    aside.replace(path)


def main() -> None:
    for name in sys.argv[1:]:
        if not Path(name).exists():
            sys.exit(f"{name} does not exist: pass files that benchmarks wrote with --out")
        write_figures(read_figures(Path(name)))
    print(summary(read_figures()))


if __name__ == "__main__":
    main()
