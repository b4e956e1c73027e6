"""What it costs that a book has grid points: the plan it chooses against a fresh search.

    regret  time of the chosen plan, padding included / the best found for exactly this batch - 1
    choice  time of the chosen plan / the best found for the batch with its padding - 1

The plan is chosen as the engine chooses it (`runtime/plan_choice.py`): a winner that is near, or
the sequential schedule in a size that fits closely. Batches are drawn between the points: sizes and
KV lengths evenly by their logarithm, decode parts evenly. A fresh search takes the fastest
prediction, without the margin that a winner needs. All of it is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from random import Random
from statistics import median

from ..runtime.op_graph import RowMix
from ..runtime.plan import Bucket, Plan
from ..runtime.plan_choice import PlanBook
from ..runtime.plan_lookup import bucket_for, with_decodes
from .book_grid import ROW_GRANULARITY, BookGrid, Traffic
from .point_search import PointSearch

_DRAWS = 40
"""Batches drawn for each one that fits into the memory, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegretSample:
    """One batch between the points."""

    tokens: int
    decode_tokens: int
    decode_context_tokens: float
    chosen: str
    """Name of the schedule that was chosen for it."""
    chosen_tokens: int
    """Its rows, padding included."""
    chosen_us: float
    fresh_us: float
    """Of the best schedule for exactly this batch."""
    padded_us: float
    """Of the best schedule for the batch with that padding."""

    @property
    def percent(self) -> float:
        """What the book costs, padding included."""
        return 100 * (self.chosen_us / self.fresh_us - 1)

    @property
    def choice_percent(self) -> float:
        """What the choice of the schedule costs, on the rows that run."""
        return 100 * (self.chosen_us / self.padded_us - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """Over all sampled batches."""

    samples: tuple[RegretSample, ...]

    @property
    def worst(self) -> RegretSample:
        """The batch that the book serves worst."""
        return max(self.samples, key=lambda sample: sample.percent)

    @property
    def median_percent(self) -> float:
        """Padding included."""
        return median(sample.percent for sample in self.samples)

    @property
    def median_choice_percent(self) -> float:
        """Of the choice alone."""
        return median(sample.choice_percent for sample in self.samples)

    @property
    def worst_choice_percent(self) -> float:
        """Of the choice alone."""
        return max(sample.choice_percent for sample in self.samples)


def find_regret(
    plan: Plan,
    search: PointSearch,
    traffic: Traffic,
    grid: BookGrid,
    *,
    seed: int,
) -> Regret | None:
    """Sample batches between the points; None where the grid asks for none or none fits."""
    batches = list(_batches(plan.buckets, traffic, Random(seed), grid.regret_samples))
    if not batches:
        return None
    choices = PlanBook.from_plan(search.graph, plan, search.cost_model.hardware)
    return Regret(samples=tuple(_sample(rows, plan, choices, search) for rows in batches))


def _batches(
    buckets: Sequence[Bucket], traffic: Traffic, rng: Random, count: int
) -> Iterator[RowMix]:
    sizes = [bucket.dense_batch_tokens for bucket in buckets]
    if len(set(sizes)) < 2:
        return
    contexts = [bucket.decode_context_tokens for bucket in buckets]
    parts = [bucket.decode_tokens / bucket.dense_batch_tokens for bucket in buckets]
    found = 0
    for _ in range(_DRAWS * count):
        if found == count:
            return
        size = exp(rng.uniform(log(min(sizes)), log(max(sizes))))
        tokens = max(1, round(size / ROW_GRANULARITY)) * ROW_GRANULARITY
        context = round(exp(rng.uniform(log(min(contexts)), log(max(contexts)))))
        rows = traffic.rows(tokens, rng.uniform(min(parts), max(parts)), context)
        if traffic.fits(rows):
            found += 1
            yield rows


def _sample(rows: RowMix, plan: Plan, choices: PlanBook, search: PointSearch) -> RegretSample:
    decodes, prefills = round(rows.decode_tokens), round(rows.prefill_tokens)
    context = rows.decode_context_tokens
    choice = choices.choose(decodes, prefills, context if decodes else 0.0).choice
    padded = _padded(rows, choice.rows)
    chosen = search.predicted(with_decodes(choice.schedule, decodes), padded)
    chosen_us = chosen.predicted.period_us
    nearest = bucket_for(plan, decodes, prefills, context)

    def best_us(batch: RowMix) -> float:
        seeds = [other.best_overlapped.schedule for other in (nearest, plan.buckets[0])]
        return search.solve(batch, seeds, ()).fastest_us

    return RegretSample(
        tokens=decodes + prefills,
        decode_tokens=decodes,
        decode_context_tokens=rows.decode_context_tokens,
        chosen=choice.schedule.name,
        chosen_tokens=choice.rows,
        chosen_us=chosen_us,
        fresh_us=best_us(rows),
        padded_us=min(chosen_us, best_us(padded)),
    )


def _padded(rows: RowMix, tokens: int) -> RowMix:
    """The batch with rows of padding that attend to nothing: the keys of all rows stay as many."""
    prefills = tokens - rows.decode_tokens
    keys = rows.prefill_tokens * rows.prefill_context_tokens
    return replace(
        rows,
        prefill_tokens=prefills,
        prefill_context_tokens=max(1.0, keys / prefills) if prefills else 1.0,
    )
