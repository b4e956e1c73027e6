"""Who is in the race and wins it: what is measured, the margin of a winner, the best overlapped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..runtime.op_graph import OpGraph
from ..runtime.plan import Candidate, Schedule
from ..runtime.plan_lookup import MEASURED_MARGIN, PREDICTED_MARGIN
from ..runtime.schedule import IllegalScheduleError, concurrent_pairs, output_forms

MEASURED_FROM_SIMULATOR = 4
"""Best refined schedules of the simulator that are measured."""
BASELINES = "nano_only", "equal_split"
"""Schedules that need no search, beside the sequential one."""


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Each schedule once, under its first name, with its latest measurement."""
    found: dict[object, Candidate] = {}
    for candidate in candidates:
        key = candidate.schedule.nano_batches, candidate.schedule.nano_ops
        known = found.get(key)
        if known is None:
            found[key] = candidate
        elif candidate.measured is not None:
            found[key] = replace(known, measured=candidate.measured)
    return list(found.values())


def racers(tried: Iterable[Candidate]) -> list[Candidate]:
    """What is measured first, all together: every named schedule and the best few refined ones."""
    race = distinct(tried)
    refined = [c for c in race if c.schedule.name == "overlapped_refined"]
    refined.sort(key=lambda candidate: candidate.predicted.period_us)
    named = [c for c in race if c.schedule.name != "overlapped_refined"]
    return named + refined[:MEASURED_FROM_SIMULATOR]


def finalists(tried: Iterable[Candidate]) -> list[Candidate]:
    """Sequential and the fastest few that were measured: once more, in one run, they decide."""
    measured = [c for c in distinct(tried) if c.measured is not None]
    base = next(c for c in measured if c.schedule.name == "sequential")
    others = [c for c in measured if c is not base]
    others.sort(key=lambda candidate: candidate.best_known.period_us)
    overlapped = [c for c in others if c.schedule.is_overlapped]
    return distinct([base, *others[:2], *overlapped[:3]])


def reference_of(base: Candidate, others: Sequence[Candidate]) -> Candidate:
    """What has to be beaten: the sequential plan or, predicted, a faster baseline without search.

    Measured, only the sequential plan counts: the others repeat to no better than the margin.
    """
    if base.measured is not None:
        return base
    known = [c for c in others if c.schedule.name in BASELINES and c.measured is None]
    return min((base, *known), key=lambda c: c.best_known.period_us)


def pick_winner(base: Candidate, others: Sequence[Candidate]) -> Candidate:
    """The fastest candidate that is allowed to win against the baselines, or the best of those."""
    has_measured = base.measured is not None
    margin = MEASURED_MARGIN if has_measured else PREDICTED_MARGIN
    reference = reference_of(base, others)
    limit_us = reference.best_known.period_us * (1 - margin)
    rivals = [c for c in others if (c.measured is not None) == has_measured]
    best = min(rivals, key=lambda c: c.best_known.period_us, default=base)
    return best if best.best_known.period_us < limit_us else reference


def why_it_won(base: Candidate, others: Sequence[Candidate]) -> str:
    """The winner against the sequential plan and the fastest of the others, in words."""
    winner = pick_winner(base, others)
    ranked = [c for c in others if c is not winner]
    best = min(ranked, key=lambda c: c.best_known.period_us, default=base)
    ratio = best.best_known.period_us / winner.best_known.period_us
    text = f"{winner.schedule.name} wins; the next, {best.schedule.name}, takes {ratio:.3f} times"
    if ratio < 1:
        margin = MEASURED_MARGIN if base.measured is not None else PREDICTED_MARGIN
        text += f" as long, within the {100 * margin:.1f} % by which it would have to be faster"
        return text
    return f"{text} as long"


def forms_in_words(schedule: Schedule, graph: OpGraph) -> str:
    """How the nano-batches join the attention's output: `all-gathers`, or by number where mixed."""
    by_form: dict[str, list[str]] = {}
    for number, forms in enumerate(output_forms(schedule, graph), 1):
        for form in forms:
            by_form.setdefault(f"{form.replace('_', '-')}s", []).append(str(number))
    if len(by_form) == 1:
        return next(iter(by_form))
    parts = (f"{name} in nano-batch {', '.join(held)}" for name, held in by_form.items())
    return " and ".join(parts)


def best_overlapped(candidates: Sequence[Candidate], graph: OpGraph) -> Candidate:
    """The fastest with two lanes of which some ops can run at once.

    Measured ones come first when there are any.
    """
    overlapped = [c for c in candidates if c.schedule.is_overlapped]
    measured = [c for c in overlapped if c.measured is not None] or overlapped
    ranked = sorted(measured, key=lambda c: c.best_known.period_us)
    return next((c for c in ranked if overlaps(c.schedule, graph)), ranked[0])


def overlaps(schedule: Schedule, graph: OpGraph) -> bool:
    """Whether any two nano-ops can run at the same time."""
    try:
        return bool(concurrent_pairs(schedule, graph))
    except IllegalScheduleError:
        return False


def summary(candidates: Sequence[Candidate]) -> str:
    """The best period of each kind of schedule, in one line."""
    best: dict[str, float] = {}
    for candidate in candidates:
        name, us = candidate.schedule.name, candidate.best_known.period_us
        best[name] = min(us, best.get(name, us))
    return ", ".join(f"{name} {us / 1000:.2f} ms" for name, us in best.items())
