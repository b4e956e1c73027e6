"""Does a plan compute what the unsplit model computes? Runs it and compares.

On a CPU the plan's structure (every nano-op, exact token ranges, all ranks) runs on a scaled-down
model in fp32; on CUDA the real widths, kernels and partitions run with a few layers. What is
compared is in `verify_rank.py`, what each nano-op may write in `audit.py`.

This module imports no torch: the parent of the ranks stays light.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..search_spaces.schema import Dtype, HardwareSpec, ModelSpec
from .gpu_failures import memory_for
from .launch import RankContext, RankGroup
from .op_graph import OpGraph, OpKind
from .plan import Bucket, NanoBatch, NanoOp, Plan, Schedule, Verification
from .plan_io import check_plan

if TYPE_CHECKING:
    from .executor import Resources

MakeResources = Callable[[RankContext, Sequence[Schedule]], "Resources"]
"""Makes a rank's partitions and process groups for some schedules; a module-level function."""

TOLERANCE: dict[Dtype, float] = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}
"""Largest ||a-b|| / ||b|| of a layer's output between planned and sequential run."""

_TORCH_VARIANTS: dict[OpKind, str] = {
    "grouped_gemm": "torch_grouped",
    "grouped_gemm_silu": "torch_grouped",
}
"""PyTorch's variants on CUDA that are not called `torch`; on a CPU names do not matter."""
_NO_MEMORY = (
    "end what else runs on the GPU, or verify scaled down without it (CUDA_VISIBLE_DEVICES= )"
)
_HEAD_DIM = 8
_CPU_CONTEXTS = (28.0, 11.0)
"""Mean keys of a decode row and of a prefill row in a CPU run: two or three pages a request."""


class VerificationError(RuntimeError):
    """A run differs from what it must equal; names where, by how much, and the tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One schedule to verify, with everything a rank needs to know."""

    model: ModelSpec
    """What is run: the real model, or its scaled-down form."""
    tp_degree: int
    num_layers: int
    schedule: Schedule
    sequential: Schedule
    """Unsplit, on one lane, to compare with."""
    decode_context_tokens: float
    prefill_context_tokens: float
    page_size: int = 16
    seed: int = 0
    num_random_orders: int = 3


def scaled_down(model: ModelSpec, tp_degree: int, num_layers: int) -> ModelSpec:
    """The same architecture with few small heads: same head ratio, divisible by `tp_degree`."""
    kv_heads = tp_degree * min(2, max(1, model.num_key_value_heads // tp_degree))
    ratio = model.num_attention_heads // model.num_key_value_heads
    return replace(
        model,
        name=f"{model.name} (scaled down)",
        hidden_size=64,
        intermediate_size=48 * tp_degree,
        num_hidden_layers=num_layers,
        num_attention_heads=kv_heads * ratio,
        num_key_value_heads=kv_heads,
        head_dim=_HEAD_DIM,
        vocab_size=96 * tp_degree - 1,  # the last rank has fewer entries
        max_position_embeddings=256,
        torch_dtype="float32",
    )


def sequential_schedule(graph: OpGraph, schedule: Schedule, num_sms: int = 1) -> Schedule:
    """One nano-batch on one lane with PyTorch's kernels: the unsplit form of `schedule`."""
    total = schedule.dense_batch_tokens
    decodes = sum(nano_batch.decode_tokens for nano_batch in schedule.nano_batches)
    return Schedule(
        name="sequential",
        nano_batches=(NanoBatch(tokens=(0, total), decode_tokens=decodes),),
        nano_ops=tuple(
            NanoOp(
                op=op.name,
                tokens=(0, total),
                lane="sequential",
                num_sms=num_sms,
                variant=_TORCH_VARIANTS.get(op.kind, "torch"),
            )
            for op in graph.layer
        ),
    )


def cpu_case(
    model: ModelSpec,
    schedule: Schedule,
    tp_degree: int = 1,
    *,
    page_size: int = 16,
    seed: int = 0,
) -> Case:
    """The schedule on a scaled-down model with short contexts, in fp32."""
    num_layers = max(2, schedule.max_stage + 2)
    small = scaled_down(model, tp_degree, num_layers)
    return Case(
        model=small,
        tp_degree=tp_degree,
        num_layers=num_layers,
        schedule=schedule,
        sequential=sequential_schedule(OpGraph.build(small, tp_degree), schedule),
        decode_context_tokens=_CPU_CONTEXTS[0],
        prefill_context_tokens=_CPU_CONTEXTS[1],
        page_size=page_size,
        seed=seed,
    )


def device_case(
    model: ModelSpec,
    schedule: Schedule,
    tp_degree: int,
    num_sms: int,
    decode_context_tokens: float,
    prefill_context_tokens: float,
    *,
    sequential: Schedule | None = None,
    page_size: int = 16,
    seed: int = 0,
) -> Case:
    """The schedule at real widths and contexts with as few layers as show its stages.

    Args:
        model: the real model.
        schedule: what to verify.
        tp_degree: ranks.
        num_sms: SMs of the whole GPU.
        decode_context_tokens: mean keys of a decode row.
        prefill_context_tokens: mean keys of a prefill row.
        sequential: unsplit schedule with one's own kernels; by default the torch kernels.
        page_size: tokens of a cache page.
        seed: of weights, cache, tokens and random orders.
    """
    graph = OpGraph.build(model, tp_degree)
    return Case(
        model=model,
        tp_degree=tp_degree,
        num_layers=min(model.num_hidden_layers, max(2, schedule.max_stage + 2)),
        schedule=schedule,
        sequential=sequential or sequential_schedule(graph, schedule, num_sms),
        decode_context_tokens=decode_context_tokens,
        prefill_context_tokens=prefill_context_tokens,
        page_size=page_size,
        seed=seed,
    )


def verify_schedule(
    ctx: RankContext, case: Case, make_resources: MakeResources | None = None
) -> Verification:
    """Verify one schedule on this rank; every rank must call it.

    Raises:
        VerificationError: something differs.
        OutOfMemoryError: the schedule's widths, contexts and layers need more than is free.
    """
    from .verify_rank import verify_on_rank

    what = f"verifying schedule {case.schedule.name!r} on {case.num_layers} layers"
    with memory_for(what, _NO_MEMORY):
        return verify_on_rank(ctx, case, make_resources)


def verify_plan(
    plan: Plan,
    model: ModelSpec,
    hardware: HardwareSpec,
    ranks: RankGroup,
    *,
    make_resources: MakeResources | None = None,
    seed: int = 0,
) -> Plan:
    """Verify winner and best overlapped schedule of each bucket; the plan with its record.

    Args:
        plan: its `num_gpus` must be the number of ranks.
        model: the real model; ranks on a CPU run its scaled-down form.
        hardware: what the plan is for; shares it lacks are refused.
        ranks: running, see `RankGroup`.
        make_resources: partitions and groups of a rank; by default none, and one group per lane.
        seed: of weights, cache, tokens and random orders.

    Raises:
        ValueError: the plan is for another number of ranks.
        IllegalScheduleError: a schedule that must not run.
        VerificationError: something differs.
    """
    if plan.num_gpus != ranks.world_size:
        raise ValueError(
            f"the plan is for {plan.num_gpus} GPUs, but {ranks.world_size} ranks run: start "
            f"RankGroup({plan.num_gpus})"
        )
    check_plan(plan, OpGraph.build(model, plan.num_gpus), hardware)

    def verified(bucket: Bucket) -> Bucket:
        records: list[Verification] = []
        for schedule in dict.fromkeys((bucket.winner.schedule, bucket.best_overlapped.schedule)):
            if ranks.device == "cpu":
                case = cpu_case(model, schedule, plan.num_gpus, page_size=plan.page_size, seed=seed)
            else:
                case = device_case(
                    model,
                    schedule,
                    plan.num_gpus,
                    hardware.num_sms,
                    bucket.decode_context_tokens,
                    bucket.prefill_context_tokens,
                    sequential=bucket.sequential.schedule,
                    page_size=plan.page_size,
                    seed=seed,
                )
            results = ranks.call(verify_schedule, case, make_resources)
            records.append(max(results, key=lambda result: result.max_relative_error))
        return replace(bucket, verification=tuple(records))

    return replace(plan, buckets=tuple(verified(bucket) for bucket in plan.buckets))
