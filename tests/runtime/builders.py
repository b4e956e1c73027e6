"""Small models and hand-made schedules for the runtime's tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Bucket, Candidate, NanoBatch, NanoOp, Schedule
from nanoflow_tune.search_spaces.schema import ModelSpec

NUM_SMS = 132

MEMORY_OPS = ("decode_attention",)
NETWORK_OPS = ("attn_all_reduce", "ffn_all_reduce", "attn_all_gather", "o_all_gather")
GATHER = ("attn_all_gather", "o_proj_columns", "o_all_gather")


def tiny_model(architecture: str = "llama", num_layers: int = 2, **overrides: object) -> ModelSpec:
    fields: dict[str, object] = {
        "name": f"tiny-{architecture}",
        "architecture": architecture,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 61,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    }
    if architecture == "mixtral":
        fields |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return ModelSpec(**(fields | overrides))


def _lane(op: str) -> str:
    if op in MEMORY_OPS:
        return "memory"
    return "network" if op in NETWORK_OPS else "compute"


def _share(op: str) -> int:
    return {"memory": 40, "network": 16, "compute": 76}[_lane(op)]


def sequential(graph: OpGraph, rows: int, decodes: int, variant: str = "torch") -> Schedule:
    return Schedule(
        name="sequential",
        nano_batches=(NanoBatch(tokens=(0, rows), decode_tokens=decodes),),
        nano_ops=tuple(
            NanoOp(op=op, tokens=(0, rows), lane="compute", num_sms=NUM_SMS, variant=variant)
            for op in graph.op_names
        ),
    )


def ping_pong(
    graph: OpGraph, cut: int, rows: int, decodes: tuple[int, int], variant: str = "torch"
) -> Schedule:
    """Two nano-batches half a layer apart: each attends while the other does its GEMMs.

    In a period, A finishes layer l - 1 (stage 1) and starts layer l beside the decode attention of
    B in layer l - 1; then B does the same beside the decode attention of A in layer l.
    """
    a, b = (0, cut), (cut, rows)
    names = graph.op_names
    after_attention = names.index("o_proj")
    front, back = names[:after_attention], names[after_attention:]

    def nano_op(op: str, tokens: tuple[int, int], stage: int) -> NanoOp:
        return NanoOp(
            op=op,
            tokens=tokens,
            lane=_lane(op),
            num_sms=_share(op),
            variant=variant,
            stage=stage,
        )

    return Schedule(
        name="overlapped",
        nano_batches=(
            NanoBatch(tokens=a, decode_tokens=decodes[0]),
            NanoBatch(tokens=b, decode_tokens=decodes[1]),
        ),
        nano_ops=(
            *(nano_op(op, a, 1) for op in back),
            *(nano_op(op, a, 0) for op in front),
            *(nano_op(op, b, 1) for op in back),
            *(nano_op(op, b, 0) for op in front),
        ),
    )


def gathering(schedule: Schedule, gathers: Sequence[bool]) -> Schedule:
    """The schedule with the all-gather form in those of its nano-batches that want it."""
    wanted = {
        batch.tokens for batch, gather in zip(schedule.nano_batches, gathers, strict=True) if gather
    }
    nano_ops: list[NanoOp] = []
    for nano_op in schedule.nano_ops:
        if nano_op.tokens not in wanted or nano_op.op not in ("o_proj", "attn_all_reduce"):
            nano_ops.append(nano_op)
            continue
        for op in GATHER if nano_op.op == "o_proj" else ():
            lane = nano_op.lane if schedule.lanes == (nano_op.lane,) else _lane(op)
            share = nano_op.num_sms if lane == nano_op.lane else _share(op)
            nano_ops.append(replace(nano_op, op=op, lane=lane, num_sms=share))
    return replace(schedule, nano_ops=tuple(nano_ops))


def gathering_bucket(bucket: Bucket) -> Bucket:
    """The bucket with all-gathers in its sequential schedule and in half of its others."""

    def formed(candidate: Candidate) -> Candidate:
        forms = (True, *(False,) * (len(candidate.schedule.nano_batches) - 1))
        return replace(candidate, schedule=gathering(candidate.schedule, forms))

    return replace(
        bucket,
        winner=formed(bucket.winner),
        sequential=formed(bucket.sequential),
        best_overlapped=formed(bucket.best_overlapped),
    )
