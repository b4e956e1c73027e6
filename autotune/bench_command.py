"""The verb `bench`: a plan served offline by the engine, book against book, whole runs.

    nanoflow-tune bench plan.yaml --workload 512/512 --requests 2048 --rounds 3
    nanoflow-tune bench plan.yaml --weights ./llama3-8b --books sequential,nano_only,winner
    nanoflow-tune bench plan.yaml --workload sharegpt --rate 40
    nanoflow-tune bench plan.yaml --dry-run                  what to expect of the plan's GPUs

All requests are known at the start and run to their full lengths; ramps count. With `--rate` they
come when they are due, and latencies are told: time to first token, per token, normalised (whole
time over generated tokens). On a machine without the plan's GPUs a scaled-down model with short
requests runs on CPU ranks: that shows that the plan is served, and says nothing about speed. No
torch here: ranks serve.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..profiler.serving_case import Contender, ServingCase, ServingRun, serve_contenders
from ..profiler.store import load_profile, profile_files, shipped_profile
from ..runtime.kv_sizes import pages_for
from ..runtime.launch import RankGroup
from ..runtime.op_graph import OpGraph
from ..runtime.plan import Bucket, Plan
from ..runtime.plan_io import check_plan, load_plan
from ..runtime.plan_match import LiveGpus, match_plan
from ..runtime.verify import scaled_down
from ..search_spaces.loader import load_hardware, load_model, load_workload
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .ablation import (
    check_books,
    contender,
    eager_warnings,
    table_row,
    trace_lengths,
    workload_lengths,
)
from .arrivals import poisson_arrivals, trace_arrivals
from .bench_forecast import forecast_rows, replaced_remarks
from .gpu_stage import find_devices, has_gpus, why_not
from .op_table import gemm_peak

RANDOM = "random"
TIMEOUT_S = 6 * 3600.0
"""A rank that serves for longer counts as hung."""
GPU_REQUESTS, CPU_REQUESTS = 2048, 64
CPU_TOKENS = 48
"""Mean tokens of a request on the CPU, prompt and answer."""
CPU_LONGEST = 256
"""Tokens of the longest; a scaled-down model has no more positions."""
CPU_WEIGHT_BYTES = 4e9
"""A checkpoint that is larger is not run on a CPU."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the model is made of."""

    folder: Path | None
    """A Hugging Face folder; None: random weights."""
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Weights:
        """`random`, `random:SEED`, or a folder.

        Raises:
            ValueError: neither.
        """
        name, _, seed = text.partition(":")
        if name == RANDOM:
            if seed and not seed.isdigit():
                raise ValueError(f"--weights {RANDOM}:SEED needs a number, but got {seed!r}")
            return cls(folder=None, seed=int(seed or 0))
        if not Path(text).is_dir():
            raise ValueError(f"--weights must be `{RANDOM}[:SEED]` or a folder, not {text!r}")
        return cls(folder=Path(text).resolve())


def bench(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Serve the plan as the flags ask; returns the values of the JSON line.

    Raises:
        ValueError: a bad flag, an unreadable file, a plan for another model, or one whose
            schedules must not run.
    """
    started = time.monotonic()
    names = options.books.split(",")
    check_books(names)
    weights, plan = Weights.parse(options.weights), load_plan(options.plan)
    model, hardware = _model(options, plan, weights), load_hardware(plan.hardware)
    check_plan(plan, OpGraph.build(model, plan.num_gpus), hardware, str(options.plan))
    if options.dry_run:
        return _dry_run(options, plan, model, hardware, weights, say) | {
            "elapsed_s": round(time.monotonic() - started, 1)
        }
    devices = find_devices()
    is_gpu = has_gpus(devices, hardware, plan.num_gpus)
    remarks = list(
        match_plan(
            plan,
            model,
            hardware,
            plan.num_gpus,
            LiveGpus(name=devices.name, count=devices.count, num_sms=hardware.num_sms)
            if is_gpu
            else None,
        ).remarks
    )
    peaks = _peaks(options.profile, hardware, model) if is_gpu else {}
    if not is_gpu:
        remarks += filter(None, [why_not(devices, hardware, plan.num_gpus)])
    case, shown = _case(options, plan, model, hardware, weights, is_gpu=is_gpu)
    if case.model is not model:
        remarks.append(
            f"a scaled-down {model.name} serves requests of about {CPU_TOKENS} tokens: the figures "
            "show that the plan is served, not how fast a GPU would be"
        )
    for remark in remarks:
        say(remark)
    graph = OpGraph.build(case.model, plan.num_gpus)
    contenders = _contenders(options, graph, shown, hardware)
    runs = serve(case, contenders, options.rounds, is_gpu=is_gpu)
    for remark in (warnings := eager_warnings(runs)):
        say(remark)
    remarks += warnings
    rates = {name: peak["flops_per_s"] for name, peak in peaks.items()}
    rows = [table_row(run, rates, model.num_active_parameters) for run in runs]
    return {
        "plan": str(options.plan),
        "model": model.name,
        "hardware": hardware.name,
        "num_gpus": plan.num_gpus,
        "device": devices.name if is_gpu else "cpu",
        "is_scaled_down": case.model is not model,
        "workload": str(options.trace or options.workload),
        "weights": options.weights,
        "num_requests": len(case.lengths),
        "num_tokens": case.num_tokens,
        "rounds": options.rounds,
        "rate_per_s": options.rate,
        "books": [_median(rows, name) for name in names],
        "runs": rows,
        "peaks": peaks,
        "remarks": remarks,
        "elapsed_s": round(time.monotonic() - started, 1),
    }


def _dry_run(
    options: argparse.Namespace,
    plan: Plan,
    model: ModelSpec,
    hardware: HardwareSpec,
    weights: Weights,
    say: Say,
) -> dict[str, Any]:
    """The run that GPUs would make, from the scheduler and the plan's times; nothing is served."""
    case, _ = _case(options, plan, model, hardware, weights, is_gpu=True)
    contenders = _contenders(options, OpGraph.build(model, plan.num_gpus), plan, hardware)
    for remark in (remarks := replaced_remarks(contenders)):
        say(remark)
    rows = forecast_rows(case, plan, contenders)
    return {
        "plan": str(options.plan),
        "model": model.name,
        "hardware": hardware.name,
        "num_gpus": plan.num_gpus,
        "dry_run": True,
        "source": "predicted",
        "workload": str(options.trace or options.workload),
        "num_requests": len(case.lengths),
        "num_tokens": case.num_tokens,
        "books": rows,
        "peaks": {},
        "remarks": remarks,
    }


def _contenders(
    options: argparse.Namespace, graph: OpGraph, plan: Plan, hardware: HardwareSpec
) -> list[Contender]:
    found = [contender(name, graph, plan, hardware) for name in options.books.split(",")]
    if options.dense_batch is not None:
        for item in found:
            item.book.aim_at(options.dense_batch)
    return found


def serve(
    case: ServingCase, contenders: Sequence[Contender], rounds: int, *, is_gpu: bool
) -> list[ServingRun]:
    """Serve a case with each book, in interleaved rounds, on ranks of this machine."""
    return serve_all([case], contenders, rounds, is_gpu=is_gpu)[0]


def serve_all(
    cases: Sequence[ServingCase], contenders: Sequence[Contender], rounds: int, *, is_gpu: bool
) -> list[list[ServingRun]]:
    """`serve` cases that differ in their requests, one after the other, on the same ranks."""
    device = "cuda" if is_gpu else "cpu"
    with RankGroup(cases[0].tp_degree, device=device, timeout_s=TIMEOUT_S) as ranks:
        return ranks.call(serve_contenders, list(cases), list(contenders), rounds)[0]


def _model(options: argparse.Namespace, plan: Plan, weights: Weights) -> ModelSpec:
    if weights.folder is None:
        return load_model(options.model or plan.model)
    if options.model is not None:
        raise ValueError("--model goes with --weights random alone; a folder names its model")
    return load_model(weights.folder)


def _peaks(profile: str, hardware: HardwareSpec, model: ModelSpec) -> dict[str, Any]:
    """FLOP/s of one GPU and where they are from; `optimal` only where it was measured."""
    found = shipped_profile(hardware.name)
    if profile != "shipped":
        if not Path(profile).exists():
            raise ValueError(f"--profile must be shipped or a path, but {profile!r} does not exist")
        found = load_profile(profile_files(Path(profile)))
        if found.hardware != hardware.name:
            raise ValueError(
                f"--profile must be of the plan's GPU, {hardware.name}, but {profile} is of "
                f"{found.hardware}"
            )
    datasheet = hardware.peak(model.torch_dtype)
    peaks = {"datasheet": {"flops_per_s": datasheet, "source": "datasheet peak"}}
    peak = gemm_peak(found, hardware, model.torch_dtype)
    if peak.source == peaks["datasheet"]["source"]:
        return peaks
    return {"optimal": {"flops_per_s": peak.flops_per_s, "source": peak.source}, **peaks}


def _case(
    options: argparse.Namespace,
    plan: Plan,
    model: ModelSpec,
    hardware: HardwareSpec,
    weights: Weights,
    *,
    is_gpu: bool,
) -> tuple[ServingCase, Plan]:
    """What is served, and the plan with contexts as long as those of its requests."""
    num_requests = options.requests or (GPU_REQUESTS if is_gpu else CPU_REQUESTS)
    longest = options.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        raise ValueError(
            f"--max-model-len must be at most the model's {model.max_position_embeddings} "
            f"positions, but is {longest}"
        )
    due_s = _due_s(options, num_requests, longest)
    lengths = (
        trace_lengths(options.trace, longest, num_requests)
        if options.trace
        else workload_lengths(load_workload(options.workload), num_requests, longest, options.seed)
    )
    served = model
    if not is_gpu:
        served = _cpu_model(plan, model, weights)
        factor = min(1.0, CPU_TOKENS / statistics.mean(map(sum, lengths)))
        lengths = [(_shorter(p, factor), _shorter(d, factor)) for p, d in lengths]
        plan = _with_contexts(plan, factor)
    num_pages = options.num_pages
    if num_pages is None and not is_gpu:
        num_pages = sum(pages_for(sum(length), plan.page_size) for length in lengths)
    case = ServingCase(
        model=served,
        hardware=hardware,
        tp_degree=plan.num_gpus,
        lengths=tuple(lengths),
        page_size=plan.page_size,
        num_pages=num_pages,
        seed=weights.seed,
        weights=weights.folder,
        due_s=due_s,
    )
    return case, plan


def _due_s(options: argparse.Namespace, num_requests: int, longest: int) -> tuple[float, ...]:
    """When each request arrives; empty: all at the start."""
    rate = options.rate
    if rate is None:
        return ()
    if options.dry_run:
        raise ValueError("--dry-run predicts offline runs: give it without --rate")
    if options.trace:
        return trace_arrivals(options.trace, longest, num_requests, rate)
    workload = load_workload(options.workload)
    return poisson_arrivals(workload, num_requests, longest, options.seed, rate)


def _cpu_model(plan: Plan, model: ModelSpec, weights: Weights) -> ModelSpec:
    if weights.folder is None:
        schedules = (
            candidate.schedule
            for bucket in plan.buckets
            for candidate in (bucket.winner, bucket.best_overlapped, bucket.sequential)
        )
        num_layers = max(2, max(schedule.max_stage for schedule in schedules) + 2)
        return scaled_down(model, plan.num_gpus, num_layers)
    if model.weight_bytes > CPU_WEIGHT_BYTES:
        raise ValueError(
            f"a checkpoint must have at most {CPU_WEIGHT_BYTES / 1e9:g} GB to run without the "
            f"plan's GPUs, but {model.name} has {model.weight_bytes / 1e9:.3g} GB; give --weights "
            f"{RANDOM}, which runs a scaled-down model"
        )
    return model


def _shorter(num_tokens: int, factor: float) -> int:
    return min(max(1, round(num_tokens * factor)), CPU_LONGEST // 2)


def _with_contexts(plan: Plan, factor: float) -> Plan:
    """The plan for KV lengths that are shorter by a factor, so that its winners still apply."""

    def shorter(bucket: Bucket) -> Bucket:
        return replace(
            bucket,
            decode_context_tokens=bucket.decode_context_tokens * factor,
            prefill_context_tokens=bucket.prefill_context_tokens * factor,
        )

    return replace(plan, buckets=tuple(shorter(bucket) for bucket in plan.buckets))


def _median(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """A book's numbers, medians over its rounds; unknown where one is."""
    mine = [row for row in rows if row["book"] == name]
    last = mine[-1]

    def over_rounds(key: str) -> Any:  # noqa: ANN401
        cells = [row[key] for row in mine]
        is_number = all(isinstance(cell, int | float) for cell in cells)
        return statistics.median(cells) if is_number else last[key]

    return {key: over_rounds(key) for key in last}
