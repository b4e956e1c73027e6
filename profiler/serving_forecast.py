"""What an offline run would take, from the scheduler alone: no GPU, no torch, a second or so.

The engine's own scheduler forms every step, with its admission, chunks and pages; nothing is
computed. A step's time is that of the sequential plan, where what does not depend on the KV cache
scales with rows, and decode attention with the keys that are read, at `KV_BANDWIDTH` of the memory
bandwidth; an overlapped schedule takes less by the gain for which the engine chooses it. So steps,
rows and pages are exact for requests that run to their full lengths, and the time is as good as the
plan's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..runtime.page_pool import PagePool
from ..runtime.plan import Bucket, Plan
from ..runtime.plan_choice import PlanBook
from ..runtime.plan_lookup import nearest
from ..runtime.scheduler import Scheduler
from ..runtime.scheduler_records import Step
from ..runtime.sequence import Event, GenerationRequest, SamplingParams
from .serving_case import RESERVED_BYTES, ServingCase

KV_BANDWIDTH = 0.9
"""Of the datasheet's, that decode attention reaches on an H200 (results/figures.csv)."""
MIN_TIME = 0.15
"""Of a bucket's time: what a step of few rows takes at least, since all weights are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A run that did not take place."""

    elapsed_s: float
    num_tokens: int
    num_gpus: int
    steps: int
    mean_rows: float
    full_steps: int
    """With all rows of the constant dense batch."""
    padding_rows: int
    preemptions: int
    peak_pages: float
    """Most pages in use, of all."""
    mean_pages: float

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Prompt and generated tokens, ramps included."""
        return self.num_tokens / self.elapsed_s / self.num_gpus


def fitting_pages(case: ServingCase) -> int:
    """Pages of the KV cache that a GPU of the datasheet has room for beside the weights.

    Raises:
        ValueError: none.
    """
    model = case.model
    embedding = model.vocab_size * model.hidden_size * model.dtype_bytes
    weights = embedding + (model.weight_bytes - embedding) // case.tp_degree
    room = case.hardware.memory_bytes - weights - RESERVED_BYTES
    page_bytes = model.kv_bytes_per_token * case.page_size // case.tp_degree
    if room < page_bytes:
        raise ValueError(
            f"{model.name} must fit {case.tp_degree} x {case.hardware.name} beside a KV cache, but "
            f"its weights take {weights / 1e9:.1f} GB of {case.hardware.memory_bytes / 1e9:.1f}"
        )
    return room // page_bytes


def forecast(case: ServingCase, plan: Plan, book: PlanBook) -> Forecast:
    """Run a case's requests through the scheduler, all of them there from the start."""
    num_pages = case.num_pages or fitting_pages(case)
    scheduler = _scheduler(case, book, num_pages)
    rows: list[int] = []
    pages: list[int] = []
    elapsed_us, padding = 0.0, 0
    before: Step | None = None
    while scheduler.has_work:
        step = scheduler.schedule(max(book.target_rows, len(scheduler.running)))
        if before is not None:
            scheduler.update(before, [0] * len(before.predicting), None)
        before = step
        if step is not None:
            size, time_us = _step_us(case, plan, book, step)
            elapsed_us += time_us
            padding += size - step.num_rows
            rows.append(step.num_rows)
            pages.append(scheduler.pool.num_used)
    return Forecast(
        elapsed_s=elapsed_us * 1e-6,
        num_tokens=case.num_tokens,
        num_gpus=case.tp_degree,
        steps=len(rows),
        mean_rows=float(np.mean(rows)),
        full_steps=sum(count >= book.target_rows for count in rows),
        padding_rows=padding,
        preemptions=scheduler.totals.preemptions,
        peak_pages=max(pages) / num_pages,
        mean_pages=float(np.mean(pages)) / num_pages,
    )


def _scheduler(case: ServingCase, book: PlanBook, num_pages: int) -> Scheduler:
    scheduler = Scheduler(case.limits(book), PagePool(num_pages, case.page_size))
    for index, (prompt, answer) in enumerate(case.lengths):
        request = GenerationRequest(
            request_id=str(index),
            prompt_token_ids=(0,) * prompt,
            sampling=SamplingParams(max_tokens=answer, ignore_eos=True),
        )
        scheduler.check(request)
        scheduler.add(request, _nobody)
    return scheduler


def _nobody(event: Event) -> None:
    """Takes no event."""


def _step_us(case: ServingCase, plan: Plan, book: PlanBook, step: Step) -> tuple[int, float]:
    """Rows of the step's dense batch, and its time."""
    positions_R = step.inputs.decode_positions_R
    decodes, keys = len(positions_R), int(positions_R.sum()) + len(positions_R)
    mean = keys / decodes if decodes else 0.0
    chosen = book.choose(decodes, step.num_rows - decodes, mean)
    rows = chosen.choice.rows
    bucket = _bucket(plan, rows, decodes / step.num_rows, mean)
    known_us = bucket.sequential.best_known.period_us
    key_us = _key_us(case)
    own_us = min(known_us, bucket.decode_tokens * bucket.decode_context_tokens * key_us)
    part = max(MIN_TIME, rows / bucket.dense_batch_tokens)
    return rows, ((known_us - own_us) * part + keys * key_us) / (1 + chosen.gain)


def _bucket(plan: Plan, rows: int, decode_fraction: float, mean_keys: float) -> Bucket:
    size = min((b.dense_batch_tokens for b in plan.buckets), key=lambda size: abs(size - rows))
    alike = [bucket for bucket in plan.buckets if bucket.dense_batch_tokens == size]
    return nearest(alike, decode_fraction, mean_keys)


def _key_us(case: ServingCase) -> float:
    """Time to read a key and its value of one token, all layers, on one rank."""
    num_bytes = case.model.kv_bytes_per_token / case.tp_degree
    return 1e6 * num_bytes / (KV_BANDWIDTH * case.hardware.memory_bytes_per_s)
