"""How far periods and the choice between plans move when the profile is a little wrong.

The schedules that a search found are predicted again under disturbed copies of its profile, with
no new search: the question is whether the plan in hand stays the right one, not what else there is.

    time of each row        x f,  f uniform in [1 - noise, 1 + noise], drawn for each row
    slowdown s of a pair -> 1 + (s - 1) x f, drawn for each kernel of the pair

Errors are independent, as those of repeated measurements are, so that they partly cancel in a
period; one that all rows share (a clock, say) would move every plan alike and the choice hardly.
Where power binds, periods move less than the rows: joules are not disturbed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from statistics import quantiles
from typing import Any

from ..profiler.profile import Profile
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Candidate, Schedule
from .cost_model import CostModel
from .search import pick_winner
from .simulator import predict

NOISE = 0.05
"""Largest relative error of one row: larger than the spread of repeated runs on one card, so that
it also covers another card of the same kind."""
TRIALS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """How the period of one plan moves: disturbed / undisturbed - 1, over the trials."""

    role: str
    """`sequential`, `best overlapped`, `winner`; joined by a comma where they are one schedule."""
    name: str
    """Of the schedule."""
    period_us: float
    """Undisturbed prediction."""
    p10: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What noise in the profile does to one search's plans."""

    noise: float
    trials: int
    seed: int
    movements: tuple[Movement, ...]
    choice: str
    """Schedule that the undisturbed predictions choose; a measured winner may be another."""
    flip_share: float
    """Part of the trials in which the predictions choose another one."""

    def as_dict(self) -> dict[str, Any]:
        """As in `report.json`: periods to 0.1 us, movements to 0.01 %."""
        movements = [
            {
                **asdict(movement),
                "period_us": round(movement.period_us, 1),
                **{key: round(getattr(movement, key), 4) for key in ("p10", "p50", "p90")},
            }
            for movement in self.movements
        ]
        return {**asdict(self), "movements": movements}


def disturbed(profile: Profile, noise: float, rng: Random) -> Profile:
    """The profile with each time and each pair's excess scaled by a factor of its own."""

    def factor() -> float:
        return rng.uniform(1 - noise, 1 + noise)

    def excess(slowdown: float) -> float:
        return 1 + (slowdown - 1) * factor()

    return replace(
        profile,
        rows=tuple(replace(row, median_us=row.median_us * factor()) for row in profile.rows),
        pairs=tuple(
            replace(pair, slowdown_a=excess(pair.slowdown_a), slowdown_b=excess(pair.slowdown_b))
            for pair in profile.pairs
        ),
    )


def sensitivity(
    cost_model: CostModel,
    graph: OpGraph,
    mix: RowMix,
    plans: Mapping[str, Schedule],
    *,
    seed: int,
    noise: float = NOISE,
    trials: int = TRIALS,
) -> Sensitivity | None:
    """Predict found schedules again under disturbed profiles.

    The choice follows the rule of the search for predictions, `pick_winner`, its margin included.

    Args:
        cost_model: of the search.
        graph: of one tensor-parallel rank.
        mix: rows of the dense batch.
        plans: schedules by role, the sequential one first.
        seed: of the noise.
        noise: largest relative error of a row.
        trials: disturbed profiles, at least 2.

    Returns:
        None without a profile: datasheet times have no measurement error.
    """
    profile = cost_model.profile
    if profile is None:
        return None
    roles: dict[Schedule, list[str]] = {}
    for role, schedule in plans.items():
        roles.setdefault(schedule, []).append(role)

    def predicted(costs: CostModel) -> list[Candidate]:
        return [Candidate(schedule=s, predicted=predict(s, graph, costs, mix)) for s in roles]

    calm, rng = predicted(cost_model), Random(seed)
    choice, flips = _choice(calm), 0
    moved = [list[float]() for _ in calm]
    for _ in range(trials):
        shaken = predicted(cost_model.with_times(disturbed(profile, noise, rng)))
        flips += _choice(shaken) != choice
        for movements, before, after in zip(moved, calm, shaken, strict=True):
            movements.append(after.predicted.period_us / before.predicted.period_us - 1)
    return Sensitivity(
        noise=noise,
        trials=trials,
        seed=seed,
        movements=tuple(
            _movement(roles[candidate.schedule], candidate, movements)
            for candidate, movements in zip(calm, moved, strict=True)
        ),
        choice=choice.name,
        flip_share=flips / trials,
    )


def _choice(candidates: Sequence[Candidate]) -> Schedule:
    """What the predictions choose; the first candidate is the sequential one."""
    return pick_winner(candidates[0], candidates[1:]).schedule


def _movement(roles: Sequence[str], candidate: Candidate, movements: Sequence[float]) -> Movement:
    deciles = quantiles(movements, n=10, method="inclusive")
    return Movement(
        role=", ".join(roles),
        name=candidate.schedule.name,
        period_us=candidate.predicted.period_us,
        p10=deciles[0],
        p50=deciles[4],
        p90=deciles[8],
    )
