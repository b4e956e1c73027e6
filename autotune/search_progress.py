"""How far a search is, and about how long the rest takes.

Stages have no known end, but a usual length; how long the finished ones took says how much faster
or slower this machine is. Stages on the host and on the GPU have paces of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from ..profiler.progress import left_s, line, minutes, shows_bars
from ..search_spaces.schema import SearchSpace

if TYPE_CHECKING:
    from rich.console import Console


class Stage(Enum):
    """Parts of a search, in order; the values are shown."""

    BASELINES = "baselines"
    STRUCTURE = "structure MILP"
    LOCAL = "local search"
    BOUND = "bound of the space"
    TRIALS = "trials on the simulator"
    RACE = "measuring the race"
    GPU_TRIALS = "trials on the GPU"
    FINALISTS = "measuring the finalists"


ON_GPU = (Stage.RACE, Stage.GPU_TRIALS, Stage.FINALISTS)
_USUAL_S = {
    Stage.BASELINES: 3.0,
    Stage.STRUCTURE: 2.0,
    Stage.LOCAL: 12.0,
    Stage.BOUND: 16.0,
    Stage.TRIALS: 12.0,
    Stage.RACE: 30.0,
    Stage.GPU_TRIALS: 30.0,
    Stage.FINALISTS: 15.0,
}
"""Of llama3-8b with quick effort on two cores; only their proportions matter after the first."""
_QUICK_TRIALS, _QUICK_GPU_TRIALS = 60, 8
_LEAST_PACE, _MOST_PACE = 0.1, 10.0


class StageTold(Protocol):
    """Told which stage a search is in, and how many of how many parts of it are done."""

    def __call__(self, stage: Stage, done: int = 0, total: int = 0, /) -> None:
        """It begins where `total` is 0 and another one was told before."""
        ...


def unseen(_stage: Stage, _done: int = 0, _total: int = 0, /) -> None:
    """Stages nobody follows."""


def usual_s(space: SearchSpace, *, has_gpu: bool) -> dict[Stage, float]:
    """Seconds that each stage usually takes; stages that do not come are left out."""
    effort = space.simulator_trials / _QUICK_TRIALS
    scales = {
        Stage.LOCAL: effort,
        Stage.BOUND: effort,
        Stage.TRIALS: effort,
        Stage.GPU_TRIALS: space.hardware_trials / _QUICK_GPU_TRIALS,
    }
    stages = [stage for stage in Stage if has_gpu or stage not in ON_GPU]
    return {stage: _USUAL_S[stage] * scales.get(stage, 1.0) for stage in stages}


@dataclass(slots=True, kw_only=True)
class SearchClock:
    """What a search has done, against the usual times."""

    usual_s: dict[Stage, float]
    milp_limit_s: float
    """Of one MILP; there are up to two."""
    now: Callable[[], float] = time.monotonic
    stage: Stage = Stage.BASELINES
    done: int = 0
    total: int = 0
    took_s: dict[Stage, float] = field(default_factory=dict[Stage, float])
    """Of the stages that are over."""
    started_s: float = field(init=False)
    entered_s: float = field(init=False)
    _part: float = 0.0

    def __post_init__(self) -> None:
        self.started_s = self.entered_s = self.now()

    def tell(self, stage: Stage, done: int = 0, total: int = 0, /) -> None:
        """A stage begins, or goes on."""
        if stage is not self.stage:
            self.took_s[self.stage] = self.now() - self.entered_s
            self.stage, self.entered_s = stage, self.now()
        self.done, self.total = done, total

    @property
    def elapsed_s(self) -> float:
        """Since the search began."""
        return self.now() - self.started_s

    @property
    def left_s(self) -> float:
        """Seconds that the rest is expected to take."""
        in_stage_s = self.now() - self.entered_s
        own_s = left_s(in_stage_s, self.done, self.total)
        if own_s is None:
            own_s = max(0.0, self._expected_s(self.stage) - in_stage_s)
        order = list(self.usual_s)
        at = order.index(self.stage) + 1 if self.stage in order else len(order)
        return own_s + sum(map(self._expected_s, order[at:]))

    @property
    def part(self) -> float:
        """Of the whole that is done, 0 to 1; never falls."""
        elapsed_s = self.elapsed_s
        whole_s = elapsed_s + self.left_s
        self._part = max(self._part, elapsed_s / whole_s if whole_s > 0 else 0.0)
        return self._part

    @property
    def text(self) -> str:
        """The stage, with its parts or its limit where it has any."""
        text = f"search    {self.stage.value}"
        if self.total:
            return f"{text}, {self.done} of {self.total}"
        if self.stage is Stage.STRUCTURE:
            return f"{text}, at most {minutes(2 * self.milp_limit_s)}"
        return text

    def _expected_s(self, stage: Stage) -> float:
        """The usual time at this machine's pace."""
        alike = {s: took_s for s, took_s in self.took_s.items() if s in self.usual_s}
        pace = self._pace(stage, alike)
        if stage is not self.stage and self.stage in self.usual_s:
            in_stage_s = self.now() - self.entered_s
            if in_stage_s > self.usual_s[self.stage] * self._pace(self.stage, alike):
                pace = self._pace(stage, {**alike, self.stage: in_stage_s})  # it overruns
        return self.usual_s.get(stage, 0.0) * pace

    def _pace(self, stage: Stage, took_s: dict[Stage, float]) -> float:
        """How many times as long as usual these stages took, of those where the given one runs."""
        alike = [s for s in took_s if (s in ON_GPU) == (stage in ON_GPU)]
        usual = sum(self.usual_s[s] for s in alike)
        pace = sum(took_s[s] for s in alike) / usual if usual > 0 else 1.0
        return min(_MOST_PACE, max(_LEAST_PACE, pace))


@contextmanager
def search_bar(console: Console, space: SearchSpace, *, has_gpu: bool) -> Generator[StageTold]:
    """A bar over the stages of a search.

    Args:
        console: of standard error.
        space: how long the search may think.
        has_gpu: whether stages on the GPU come.
    """
    if not shows_bars(console):
        yield unseen
        return
    from rich.live import Live

    told = SearchClock(
        usual_s=usual_s(space, has_gpu=has_gpu), milp_limit_s=space.milp_time_limit_s
    )

    def drawn() -> Any:  # noqa: ANN401 - of rich
        left = told.left_s
        note = f"about {minutes(left)} left" if left >= 1 else "about to end"
        return line(told.text, told.part, told.elapsed_s, note)

    with Live(get_renderable=drawn, console=console, refresh_per_second=4, transient=True):
        yield told.tell
