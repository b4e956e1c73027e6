"""Verifies a plan: on the GPU where there is one, else scaled down on CPU ranks.

The parent stays free of torch; the ranks are processes of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

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
    plan: Plan, model: ModelSpec, hardware: HardwareSpec, seed: int, stage: GpuStage | None
) -> Plan:
    """The plan with a record of each schedule that was verified.

    Raises:
        VerificationError: a schedule computes something else.
    """
    if stage is not None:
        return stage.verify(plan, model, seed)
    with RankGroup(plan.num_gpus, device="cpu", timeout_s=CPU_TIMEOUT_S) as ranks:
        return verify_plan(plan, model, hardware, ranks, seed=seed)


def verify_file(
    path: Path, model_name: str | None, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check and verify a plan on disk.

    Args:
        path: the YAML.
        model_name: the model's spec; the plan's own name when None.
        seed: of weights, cache, tokens and random orders.
        say: progress, one line at a time.

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
        plan = verify(plan, model, hardware, seed, stage)
    return {
        "plan": str(path),
        "model": plan.model,
        "hardware": plan.hardware,
        "num_gpus": plan.num_gpus,
        "verified": True,
        "verification": [row for bucket in plan.buckets for row in verification_rows(bucket)],
        "elapsed_s": round(time.monotonic() - started, 1),
    }


def _mix(bucket: Bucket) -> RowMix:
    return RowMix(
        decode_tokens=bucket.decode_tokens,
        prefill_tokens=bucket.dense_batch_tokens - bucket.decode_tokens,
        decode_context_tokens=bucket.decode_context_tokens,
        prefill_context_tokens=bucket.prefill_context_tokens,
    )
