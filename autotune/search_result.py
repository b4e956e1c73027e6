"""What a search hands on: winner, baselines, the race, bounds, and how it came to them."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.plan import Candidate
from .certificate import SpaceBound
from .milp import Certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What the search found for one dense-batch size and mix."""

    winner: Candidate
    sequential: Candidate
    best_overlapped: Candidate
    race: tuple[Candidate, ...]
    """Sequential first, then by best known time."""
    certificate: Certificate
    space_bound: SpaceBound
    """What no plan of the declared space is predicted to beat."""
    lower_bound_us: float
    power_limit_us: float
    """0 where no energy model is known."""
    bound: str
    """`compute`, `memory`, `network` or `power`."""
    history: tuple[tuple[int, str, float], ...]
    """(number, schedule name, period in us) of everything tried, in order."""
    stages: tuple[str, ...]
    """What each stage decided and rejected, and why."""
    seed: int


def best_of_each_kind(result: SearchResult) -> tuple[Candidate, ...]:
    """The fastest candidate of each name, sequential first; measured ones go before predicted."""
    best: dict[str, Candidate] = {"sequential": result.sequential}
    ranked = sorted(
        result.race,
        key=lambda candidate: (candidate.measured is None, candidate.best_known.period_us),
    )
    for candidate in (result.winner, result.best_overlapped, *ranked):
        best.setdefault(candidate.schedule.name, candidate)
    return tuple(
        sorted(
            best.values(),
            key=lambda c: (c.schedule.name != "sequential", c.best_known.period_us),
        )
    )
