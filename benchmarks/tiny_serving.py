"""A tiny model with a hand-made plan on the CPU: what the soak test tries an engine on.

The plan splits full dense batches into two nano-batches, so that requests straddle them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nanoflow_tune.runtime.engine_config import EngineConfig
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.model_runner import ModelRunner
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Bucket, Candidate, NanoBatch, NanoOp, Plan, Schedule, Timing
from nanoflow_tune.runtime.plan_choice import PlanBook
from nanoflow_tune.runtime.weights import Weights
from nanoflow_tune.search_spaces.loader import load_hardware, load_model
from nanoflow_tune.search_spaces.schema import ModelSpec

CPU = torch.device("cpu")
_ALL_SMS, _LARGER, _SMALLER = 132, 92, 40


def tiny_model() -> ModelSpec:
    """Four layers would only make it slower: two have all edges between layers."""
    model = load_model("tiny-llama")
    return replace(model, name="tiny", num_hidden_layers=2, torch_dtype="float32")


def tiny_plan(graph: OpGraph, rows: int, contexts: tuple[float, ...] = (32.0, 128.0)) -> Plan:
    """Split and sequential schedules for steps of half decodes, and of decodes alone."""
    buckets = tuple(
        _bucket(graph, rows, decodes, context)
        for decodes in (rows // 2, rows)
        for context in contexts
    )
    return Plan(
        model=graph.model.name,
        hardware="h200",
        workload="512-512",
        num_gpus=1,
        dtype="float32",
        kv_dtype="float32",
        page_size=16,
        buckets=buckets,
    )


def _bucket(graph: OpGraph, rows: int, decodes: int, context: float) -> Bucket:
    whole, cut = (0, rows), rows * 3 // 8
    first = min(decodes, cut)
    sequential = Schedule(
        name="sequential",
        nano_batches=(NanoBatch(tokens=whole, decode_tokens=decodes),),
        nano_ops=tuple(
            NanoOp(op=op, tokens=whole, lane="compute", num_sms=_ALL_SMS, variant="torch")
            for op in graph.op_names
        ),
    )
    split = Schedule(
        name="overlapped",
        nano_batches=(
            NanoBatch(tokens=(0, cut), decode_tokens=first),
            NanoBatch(tokens=(cut, rows), decode_tokens=decodes - first),
        ),
        nano_ops=tuple(
            NanoOp(
                op=op,
                tokens=tokens,
                lane="memory" if op == "decode_attention" else "compute",
                num_sms=_SMALLER if op == "decode_attention" else _LARGER,
                variant="torch",
            )
            for op in graph.op_names
            for tokens in ((0, cut), (cut, rows))
        ),
    )
    timing = Timing(period_us=1000.0, source="predicted")
    winner = Candidate(schedule=split, predicted=timing)
    return Bucket(
        dense_batch_tokens=rows,
        decode_tokens=decodes,
        decode_context_tokens=context,
        prefill_context_tokens=16.0,
        row_order="decodes_first",
        winner=winner,
        sequential=Candidate(schedule=sequential, predicted=timing),
        best_overlapped=winner,
        lower_bound_us=1.0,
        power_limit_us=1.0,
        bound="compute",
    )


def tiny_book(graph: OpGraph, rows: int) -> PlanBook:
    """The choices of `tiny_plan`."""
    return PlanBook.from_plan(graph, tiny_plan(graph, rows), load_hardware("h200"))


def tiny_runner(weights: Weights, config: EngineConfig, book: PlanBook) -> ModelRunner:
    """A runner with a cache of its own."""
    cache = PagedKvCache(
        weights.model, num_pages=config.num_pages, device=CPU, page_size=config.page_size
    )
    graph = OpGraph.build(weights.model)
    return ModelRunner(graph, weights, cache, book, config.runner_sizes)
