"""Progress on the screen of long steps: a bar with the time left, or a clock where no end is known.

Drawn on a terminal only, and gone when the step is over: what stays are the lines that a job says.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int, int], None]
"""Told how many of how many parts are done."""


def nothing(_done: int, _total: int) -> None:
    """Progress nobody sees."""


@contextmanager
def bar(console: Console, title: str) -> Generator[Advance]:
    """A bar that appears with the first part, and says how long the rest will take.

    Args:
        console: of standard error.
        title: what takes so long.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    if not console.is_terminal:
        yield nothing
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


@contextmanager
def clock(console: Console, title: str) -> Generator[None]:
    """A spinner with the time that has passed."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(title, total=None)
        yield
