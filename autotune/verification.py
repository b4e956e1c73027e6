"""Verifies a plan: on the GPU where there is one, else scaled down on CPU ranks.

The parent stays free of torch; the ranks are processes of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..profiler.progress import Advance, nothing
from ..profiler.rank_jobs import IterationCase
from ..runtime.launch import RankGroup
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Bucket, Plan
from ..runtime.plan_io import check_plan, load_plan
from ..runtime.verify import verify_plan
from ..search_spaces.loader import load_hardware, load_model
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .document import verification_rows
from .gpu_stage import GpuStage, find_devices, find_stage

CPU_TIMEOUT_S = 300.0
"""A CPU rank that answers later than this hangs."""


def verify(
    plan: Plan,
    model: ModelSpec,
    hardware: HardwareSpec,
    seed: int,
    stage: GpuStage | None,
    advance: Advance = nothing,
) -> Plan:
    """The plan with a record of each schedule that was verified.

    On a GPU the main bucket, which alone was measured there; on a CPU also a sample of the book.

    Args:
        plan: all its buckets are checked.
        model: the real one.
        hardware: what the plan is for.
        seed: of weights, cache, tokens and random orders.
        stage: runs at real widths; None: scaled down on CPU ranks.
        advance: told how many buckets are verified.

    Raises:
        IllegalScheduleError: a schedule of any bucket that must not run.
        VerificationError: a schedule computes something else.
    """
    check_plan(plan, OpGraph.build(model, plan.num_gpus), hardware)
    chosen = [0] if stage is not None else [0, *sample(plan)]
    buckets = list(plan.buckets)
    with (
        RankGroup(plan.num_gpus, device="cpu", timeout_s=CPU_TIMEOUT_S)
        if stage is None
        else nullcontext() as ranks
    ):
        for done, index in enumerate(chosen):
            advance(done, len(chosen))
            part = replace(plan, buckets=(buckets[index],))
            if stage is not None:
                part = stage.verify(part, model, seed)
            elif ranks is not None:
                part = verify_plan(part, model, hardware, ranks, seed=seed)
            (buckets[index],) = part.buckets
    return replace(plan, buckets=tuple(buckets))


def sample(plan: Plan) -> list[int]:
    """Buckets of the book to verify: the smallest one of each mix, which takes the least time.

    What a small bucket shows of a structure, its order and its ranges, a large one does not show
    better; mixes differ in which ops have rows at all.
    """
    smallest: dict[str, int] = {}
    for index, bucket in enumerate(plan.buckets):
        if index == 0:
            continue
        known = smallest.setdefault(bucket.mix, index)
        if bucket.dense_batch_tokens < plan.buckets[known].dense_batch_tokens:
            smallest[bucket.mix] = index
    return sorted(smallest.values())


def verify_file(
    path: Path,
    model_name: str | None,
    seed: int,
    say: Callable[[str], None],
    advance: Advance = nothing,
) -> dict[str, Any]:
    """Check and verify a plan on disk.

    Args:
        path: the YAML.
        model_name: the model's spec; the plan's own name when None.
        seed: of weights, cache, tokens and random orders.
        say: progress, one line at a time.
        advance: told how many buckets are verified.

    Raises:
        ValueError: the file breaks a rule, or a schedule must not run.
        VerificationError: a schedule computes something else.
    """
    started = time.monotonic()
    plan = load_plan(path)
    model, hardware = load_model(model_name or plan.model), load_hardware(plan.hardware)
    check_plan(plan, OpGraph.build(model, plan.num_gpus), hardware, str(path))
    case = IterationCase(
        model=model, hardware=hardware, tp_degree=plan.num_gpus, mix=_mix(plan.buckets[0])
    )
    stage = find_stage(find_devices(), case, command="verify", say=say)
    with closing(stage) if stage else nullcontext():
        plan = verify(plan, model, hardware, seed, stage, advance)
    return {
        "plan": str(path),
        "model": plan.model,
        "hardware": plan.hardware,
        "num_gpus": plan.num_gpus,
        "verified": True,
        "verification": verification_rows(plan),
        "elapsed_s": round(time.monotonic() - started, 1),
    }


def _mix(bucket: Bucket) -> RowMix:
    return RowMix(
        decode_tokens=bucket.decode_tokens,
        prefill_tokens=bucket.dense_batch_tokens - bucket.decode_tokens,
        decode_context_tokens=bucket.decode_context_tokens,
        prefill_context_tokens=bucket.prefill_context_tokens,
    )
