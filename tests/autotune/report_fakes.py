"""Hand-made schedules, events and timings: a small model with no search behind it."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Candidate, NanoBatch, NanoOp, Schedule, Timing
from nanoflow_tune.search_spaces.schema import (
    HardwareSpec,
    ModelSpec,
    SearchSpace,
    WorkloadSpec,
)

DURATIONS_US = {
    "gemm": 100.0,
    "gemm_silu": 100.0,
    "decode_attention": 120.0,
    "prefill_attention": 30.0,
}


def model(name: str = "llama3-8b") -> ModelSpec:
    sizes = {
        "llama3-8b": (4096, 14336, 32, 32, 8, 128256),
        "llama2-70b": (8192, 28672, 80, 64, 8, 32000),
    }[name]
    return ModelSpec(
        name=name,
        architecture="llama",
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_hidden_layers=sizes[2],
        num_attention_heads=sizes[3],
        num_key_value_heads=sizes[4],
        head_dim=128,
        vocab_size=sizes[5],
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
    )


def h200() -> HardwareSpec:
    return HardwareSpec(
        name="h200",
        device_name="NVIDIA H200",
        num_sms=132,
        sm_granularity=8,
        peak_flops_per_s={"bfloat16": 989e12},
        memory_bytes=150_800_000_000,
        memory_bytes_per_s=4.8e12,
        l2_bytes=60_000_000,
        link_bytes_per_s=450e9,
        max_link_gpus=8,
        power_cap_w=700.0,
    )


def workload(prompt: float = 512, decode: float = 512) -> WorkloadSpec:
    return WorkloadSpec(name=f"{prompt}/{decode}", prompt_tokens=prompt, decode_tokens=decode)


def space() -> SearchSpace:
    return SearchSpace(
        name="fake",
        dense_batch_tokens=(256, 512, 1024, 2048),
        token_granularity=128,
        max_nano_batches=4,
        row_orders=("decodes_first", "interleaved"),
        sm_shares=(32, 64, 100),
        network_sm_shares=(16,),
        milp_time_limit_s=1.0,
        milp_relative_gap=0.01,
        simulator_trials=1,
        hardware_trials=0,
    )


def sequential(graph: OpGraph, tokens: int = 2048) -> Schedule:
    whole = (0, tokens)
    return Schedule(
        name="sequential",
        nano_batches=(NanoBatch(tokens=whole, decode_tokens=tokens // 2),),
        nano_ops=tuple(
            NanoOp(op=op.name, tokens=whole, lane="main", num_sms=132, variant="cublas")
            for op in graph.layer
        ),
    )


def overlapped(graph: OpGraph, tokens: int = 2048) -> Schedule:
    half = tokens // 2
    shares = {"compute": 100, "memory": 32, "network": 32}
    return Schedule(
        name="overlapped",
        nano_batches=(
            NanoBatch(tokens=(0, half), decode_tokens=half),
            NanoBatch(tokens=(half, tokens), decode_tokens=0),
        ),
        nano_ops=tuple(
            NanoOp(
                op=op.name,
                tokens=tokens_range,
                lane=op.resource,
                num_sms=shares[op.resource],
                variant="triton_128x256",
            )
            for tokens_range in ((0, half), (half, tokens))
            for op in graph.layer
        ),
    )


@dataclass(frozen=True)
class FakeEvent:
    index: int
    layer: int
    lane: str
    num_sms: int
    start_us: float
    end_us: float
    slowdown: float


def events(schedule: Schedule, graph: OpGraph, num_layers: int = 6) -> tuple[FakeEvent, ...]:
    """Lanes run side by side, each as fast as it can; good enough to draw."""
    clock = dict.fromkeys(schedule.lanes, 0.0)
    played: list[FakeEvent] = []
    for layer in range(num_layers):
        for index, nano_op in enumerate(schedule.nano_ops):
            rows = nano_op.num_tokens
            duration = DURATIONS_US.get(graph.op(nano_op.op).kind, 10.0) * rows / 2048
            duration *= (132 / nano_op.num_sms) ** 0.5
            start = clock[nano_op.lane]
            clock[nano_op.lane] = start + duration
            played.append(
                FakeEvent(
                    index, layer, nano_op.lane, nano_op.num_sms, start, start + duration, 1.05
                )
            )
        level = max(clock.values())
        clock = dict.fromkeys(clock, level)
    return tuple(played)


def candidate(
    schedule: Schedule,
    period_us: float,
    measured_us: float | None = None,
    source: str = "predicted",
) -> Candidate:
    return Candidate(
        schedule=schedule,
        predicted=Timing(period_us=period_us, source=source, joules=30.0, watts=690.0),
        measured=None
        if measured_us is None
        else Timing(
            period_us=measured_us,
            source="measured",
            p10_us=measured_us * 0.99,
            p90_us=measured_us * 1.01,
            joules=31.0,
            watts=689.0,
            sm_clock_mhz=1515.0,
        ),
    )
