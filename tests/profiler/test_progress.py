"""Bars on a terminal that is a string, on a clock that is set by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nanoflow_tune.profiler.progress import (
    NO_BARS,
    BudgetBar,
    HandBar,
    TokenBar,
    bar,
    left_s,
    minutes,
    shows_bars,
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture(autouse=True)
def _wants_bars(monkeypatch):
    monkeypatch.delenv(NO_BARS, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def terminal(is_terminal=True):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120)


@pytest.mark.parametrize(("seconds", "text"), [(125.4, "2:05"), (59.6, "1:00"), (-3.0, "0:00")])
def test_minutes(seconds, text):
    assert minutes(seconds) == text


def test_time_left_keeps_the_pace():
    assert left_s(10.0, 1, 4) == 30.0
    assert left_s(10.0, 0, 4) is None


def test_a_budget_counts_down_and_says_what_is_done():
    clock, console = Clock(), terminal()
    with HandBar(console, clock) as hand:
        budget = BudgetBar(bar=hand, seconds=120.0)
        budget.enter("curves")
        clock.now_s += 30.0
        budget.count()
        clock.now_s += 100.0
        budget.enter("co-runs", "of 7")
    text = console.file.getvalue()
    assert "profile   curves" in text
    assert "curves, 1 rows" in text
    assert "at most 2:00 left" in text
    assert "at most 1:30 left" in text
    assert "its time is over" in text


def test_a_bar_by_hand_is_not_drawn_at_every_row():
    clock, console = Clock(), terminal()
    with HandBar(console, clock) as hand:
        budget = BudgetBar(bar=hand, seconds=60.0)
        budget.enter("curves")
        for _ in range(50):
            budget.count()  # no time passes
        assert "rows" not in console.file.getvalue()
        clock.now_s += 1.0
        budget.count()
    assert "51 rows" in console.file.getvalue()


def test_a_bar_by_hand_leaves_the_cursor_on_the_screen():
    console = terminal()
    with HandBar(console, Clock()):
        text = console.file.getvalue()
        assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # a rank may be killed here


def test_tokens_of_runs_that_are_over_count():
    clock, console = Clock(), terminal()
    with HandBar(console, clock) as hand:
        tokens = TokenBar(bar=hand, num_tokens=4000)
        tokens.during("winner", 0, 0.0)
        assert "left" not in console.file.getvalue()  # nothing is known yet
        clock.now_s += 10.0
        tokens.after(1000, 10.0)
        tokens.during("sequential", 1000, 10.0)
    text = console.file.getvalue()
    assert "sequential, 2,000 of 4,000 tokens" in text
    assert "about 0:20 left" in text


def test_lines_alone_where_there_is_no_terminal():
    console = terminal(is_terminal=False)
    with HandBar(console, Clock()) as hand:
        BudgetBar(bar=hand, seconds=60.0).enter("curves")
        hand.say("profile   [every] curve is known")
    assert console.file.getvalue() == "profile   [every] curve is known\n"


def test_ranks_above_0_are_silent(capfd):
    with HandBar(None) as hand:
        BudgetBar(bar=hand, seconds=60.0).enter("curves")
        hand.say("said by rank 0 alone")
    assert capfd.readouterr() == ("", "")


def test_bars_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(NO_BARS, "1")
    console = terminal()
    assert not shows_bars(console)
    with bar(console, "verifying") as advance, HandBar(console, Clock()) as hand:
        advance(1, 2)
        BudgetBar(bar=hand, seconds=60.0).enter("curves")
    assert console.file.getvalue() == ""
