"""About how long a search takes yet, on a clock that is set by hand."""

from __future__ import annotations

import io

from rich.console import Console

from nanoflow_tune.autotune.search_progress import (
    ON_GPU,
    SearchClock,
    Stage,
    search_bar,
    usual_s,
)
from nanoflow_tune.search_spaces.loader import load_space

USUAL_S = {Stage.BASELINES: 2.0, Stage.STRUCTURE: 4.0, Stage.TRIALS: 10.0, Stage.RACE: 30.0}


class Clock:
    """Seconds that pass when told to."""

    now_s = 0.0

    def __call__(self):
        return self.now_s


def search_clock():
    now = Clock()
    return now, SearchClock(usual_s=USUAL_S, milp_limit_s=20.0, now=now)


def test_at_first_the_usual_times():
    _, told = search_clock()
    assert told.left_s == 46.0


def test_finished_stages_set_the_pace_of_their_kind():
    now, told = search_clock()
    now.now_s = 6.0  # three times as long as usual
    told.tell(Stage.STRUCTURE)
    assert told.left_s == 3 * (4.0 + 10.0) + 30.0  # the GPU's pace is not known yet


def test_a_stage_that_overruns_slows_the_later_ones():
    now, told = search_clock()
    now.now_s = 2.0  # as usual
    told.tell(Stage.STRUCTURE)
    now.now_s = 6.0
    assert told.left_s == 10.0 + 30.0
    now.now_s = 12.0  # 12 s for what usually takes 6 s
    assert told.left_s == 2 * 10.0 + 30.0


def test_trials_set_their_own_pace():
    now, told = search_clock()
    told.tell(Stage.TRIALS)
    told.tell(Stage.TRIALS, 0, 60)
    now.now_s = 5.0
    told.tell(Stage.TRIALS, 20, 60)
    assert told.text.endswith("trials on the simulator, 20 of 60")
    assert told.left_s == 10.0 + 30.0


def test_a_stage_that_overruns_is_about_to_end():
    now, told = search_clock()
    told.tell(Stage.RACE)
    now.now_s = 500.0
    assert told.left_s == 0.0


def test_the_bar_never_goes_back():
    now, told = search_clock()
    now.now_s, parts = 1.0, []
    parts.append(told.part)
    now.now_s = 20.0
    told.tell(Stage.STRUCTURE)  # ten times slower than thought
    parts.append(told.part)
    assert 0 < parts[0] <= parts[1] <= 1


def test_the_milp_says_its_limit():
    _, told = search_clock()
    told.tell(Stage.STRUCTURE)
    assert "at most 0:40" in told.text


def test_stages_of_the_gpu_come_with_a_gpu_alone():
    quick, full = load_space("quick"), load_space("full")
    assert not set(ON_GPU) & set(usual_s(quick, has_gpu=False))
    assert set(usual_s(quick, has_gpu=True)) == set(Stage)
    assert usual_s(full, has_gpu=False)[Stage.TRIALS] > usual_s(quick, has_gpu=False)[Stage.TRIALS]


def test_nothing_is_drawn_where_nobody_looks():
    console = Console(file=io.StringIO(), force_terminal=False)
    with search_bar(console, load_space("quick"), has_gpu=False) as told:
        told(Stage.LOCAL)
    assert console.file.getvalue() == ""


def test_the_last_state_is_cleared_from_a_terminal(monkeypatch):
    monkeypatch.delenv("NANOFLOW_NO_BARS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with search_bar(console, load_space("quick"), has_gpu=False) as told:
        told(Stage.LOCAL)
    text = console.file.getvalue()
    assert "local search" in text
    assert "about" in text
    assert text.endswith("\x1b[2K")  # the line is erased
