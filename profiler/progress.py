"""Progress on the screen of long steps: a bar with the time left, or a clock where no end is known.

Drawn on a terminal only, and gone when the step is over: what stays are the lines that a job says.
`HandBar` starts no thread and draws only when it is told to, for ranks that time kernels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console

NO_BARS = "NANOFLOW_NO_BARS"
"""Environment variable: anything in it keeps this process and its ranks from drawing bars."""
REDRAWN_AFTER_S = 1.0
"""A bar that is drawn by hand waits this long in between: drawing takes a millisecond or two."""
_BAR_COLUMNS = 30

Advance = Callable[[int, int], None]
"""Told how many of how many parts are done."""


def nothing(_done: int, _total: int) -> None:
    """Progress nobody sees."""


def shows_bars(console: Console) -> bool:
    """Whether somebody looks at a terminal and wants bars."""
    return console.is_terminal and not os.environ.get(NO_BARS)


def stderr_console() -> Console:
    """Of standard error."""
    from rich.console import Console

    return Console(stderr=True)


def minutes(seconds: float) -> str:
    """`2:05`; never below zero."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"


def left_s(elapsed_s: float, done: float, total: float) -> float | None:
    """Seconds left at the pace so far; None before anything is done."""
    return elapsed_s * (total - done) / done if done > 0 else None


def line(text: str, part: float, elapsed_s: float, note: str) -> Any:  # noqa: ANN401 - of rich
    """What is done, a bar, the time that has passed, and the time left in words.

    Args:
        text: what takes so long.
        part: of the whole that is done, 0 to 1.
        elapsed_s: since the start.
        note: how long the rest takes, as far as that is known.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    row = Table.grid(padding=(0, 1))
    row.add_column(no_wrap=True, overflow="ellipsis")
    row.add_column(width=_BAR_COLUMNS)
    row.add_column(no_wrap=True)
    row.add_column(no_wrap=True)
    done = ProgressBar(total=1.0, completed=min(1.0, max(0.0, part)), width=_BAR_COLUMNS)
    row.add_row(text, done, minutes(elapsed_s), note)
    return row


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
        BarColumn(bar_width=_BAR_COLUMNS),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    if not shows_bars(console):
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

    if not shows_bars(console):
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(title, total=None)
        yield


class HandBar:
    """One line that changes only when told to; lines that are said stay above it."""

    def __init__(self, console: Console | None, now: Callable[[], float] = time.monotonic) -> None:
        """Draw nothing yet.

        Args:
            console: of standard error; None: neither bar nor lines, for ranks above 0.
            now: seconds, of any origin.
        """
        self._console, self._now = console, now
        self.started_s, self._drawn_s = now(), float("-inf")
        self._live: Any = None

    @property
    def is_shown(self) -> bool:
        """Whether there is a terminal to draw on; elsewhere lines have to do."""
        return self._console is not None and shows_bars(self._console)

    @property
    def elapsed_s(self) -> float:
        """Since the bar was made."""
        return self._now() - self.started_s

    def __enter__(self) -> Self:
        if self._console is not None and self.is_shown:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
            self._console.show_cursor(True)  # a rank may be killed, and leaves the terminal so
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def draw(self, text: str, part: float, note: str, *, is_urgent: bool = False) -> None:
        """Show this state, unless another one was drawn a moment ago.

        Args:
            text: what takes so long.
            part: of the whole that is done, 0 to 1.
            note: how long the rest takes.
            is_urgent: show it all the same.
        """
        if self._live is None:
            return
        if is_urgent or self._now() - self._drawn_s >= REDRAWN_AFTER_S:
            self._live.update(line(text, part, self.elapsed_s, note), refresh=True)
            self._drawn_s = self._now()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass(slots=True, kw_only=True)
class BudgetBar:
    """A run of a given time in stages: its bar is the time that is used up."""

    bar: HandBar
    seconds: float
    """Of the whole run."""
    stage: str = ""
    unit: str = "rows"
    num_done: int = 0

    def enter(self, stage: str, unit: str = "rows") -> None:
        """Begin a stage; what it does is counted in `unit`."""
        self.stage, self.unit, self.num_done = stage, unit, 0
        self._draw(is_urgent=True)

    def count(self) -> None:
        """One more is done."""
        self.num_done += 1
        self._draw(is_urgent=False)

    def _draw(self, *, is_urgent: bool) -> None:
        text = f"{self.stage}, {self.num_done} {self.unit}" if self.num_done else self.stage
        elapsed_s = self.bar.elapsed_s
        left = f"at most {minutes(self.seconds - elapsed_s)} left"
        if elapsed_s > self.seconds:
            left = "its time is over, the last stage ends"
        self.bar.draw(f"profile   {text}", elapsed_s / self.seconds, left, is_urgent=is_urgent)


@dataclass(slots=True, kw_only=True)
class TokenBar:
    """Runs one after the other that serve a known number of tokens in all."""

    bar: HandBar
    num_tokens: int
    """Of all runs."""
    num_served: int = 0
    """Of the runs that are over."""
    served_s: float = 0.0
    """Time of the runs that are over, without what lies between them."""

    def before(self, text: str) -> None:
        """What is made before anything is served; how long that takes is not known."""
        self.bar.draw(f"serving   {text}", 0.0, "", is_urgent=True)

    def during(self, name: str, num_tokens: int, run_s: float) -> None:
        """A run is under way and has served so many tokens in so many seconds."""
        done, serving_s = self.num_served + num_tokens, self.served_s + run_s
        left = left_s(serving_s, done, self.num_tokens)
        self.bar.draw(
            f"serving   {name}, {done:,} of {self.num_tokens:,} tokens",
            done / self.num_tokens,
            "" if left is None else f"about {minutes(left)} left",
        )

    def after(self, num_tokens: int, run_s: float) -> None:
        """A run is over."""
        self.num_served += num_tokens
        self.served_s += run_s
