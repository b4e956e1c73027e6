"""A tiny engine on the CPU, and what its requests must generate."""

from __future__ import annotations

import random
import threading

import torch
from builders import gathering_bucket, ping_pong, sequential, tiny_model

from nanoflow_tune.runtime.batching import Request
from nanoflow_tune.runtime.engine import Engine
from nanoflow_tune.runtime.engine_config import EngineConfig
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.model import reference_forward
from nanoflow_tune.runtime.model_runner import ModelRunner
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Bucket, Candidate, Plan, Timing
from nanoflow_tune.runtime.plan_choice import PlanBook
from nanoflow_tune.runtime.rank_runner import LeadingRunner, follow, step_group
from nanoflow_tune.runtime.scheduler_records import SchedulerLimits
from nanoflow_tune.runtime.sequence import (
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from nanoflow_tune.runtime.verify_rank import default_resources
from nanoflow_tune.runtime.weights import random_weights
from nanoflow_tune.search_spaces.loader import load_hardware

torch.set_num_threads(1)  # small ops
CPU = torch.device("cpu")
MODEL = tiny_model(num_layers=2)
ROWS = 64
EOS = 3


def timed(schedule, period_us=1000.0):
    return Candidate(schedule=schedule, predicted=Timing(period_us=period_us, source="predicted"))


def bucket(graph, rows, decodes, *, context=24.0, cut=None, period_us=1000.0):
    """A bucket whose winner overlaps two nano-batches."""
    base = sequential(graph, rows, decodes)
    cut = cut or rows // 2
    first = min(decodes, cut)
    winner = timed(ping_pong(graph, cut, rows, (first, decodes - first)), 0.9 * period_us)
    return Bucket(
        dense_batch_tokens=rows,
        decode_tokens=decodes,
        decode_context_tokens=context,
        prefill_context_tokens=8.0,
        row_order="decodes_first",
        winner=winner,
        sequential=timed(base, period_us),
        best_overlapped=winner,
        lower_bound_us=1.0,
        power_limit_us=1.0,
        bound="compute",
    )


def plan_of(model=MODEL, tp_degree=1, buckets=None):
    graph = OpGraph.build(model, tp_degree)
    return Plan(
        model=model.name,
        hardware="h200",
        workload="512-512",
        num_gpus=tp_degree,
        dtype="float32",
        kv_dtype="float32",
        page_size=16,
        buckets=buckets or (bucket(graph, ROWS, ROWS // 2),),
    )


def book_of(model=MODEL, tp_degree=1, remark="", buckets=None):
    graph = OpGraph.build(model, tp_degree)
    plan = plan_of(model, tp_degree, buckets)
    return PlanBook.from_plan(graph, plan, load_hardware("h200"), remark)


def config_of(model=MODEL, num_pages=120, **overrides):
    limits = {"max_model_len": 128, "max_running": 32, "expected_decode_tokens": 16.0}
    names = SchedulerLimits.__dataclass_fields__
    limits |= {name: overrides.pop(name) for name in tuple(overrides) if name in names}
    return EngineConfig(
        **(
            {
                "model_name": model.name,
                "vocab_size": model.vocab_size,
                "limits": SchedulerLimits(**limits),
                "num_pages": num_pages,
                "page_size": 16,
                "eos_token_ids": (EOS,),
            }
            | overrides
        )
    )


def make_engine(book=None, weights=None, model=MODEL, **overrides):
    weights = weights or random_weights(model, device=CPU)
    config = config_of(model, **overrides)
    book = book or book_of(model)

    def make_runner():
        cache = PagedKvCache(model, num_pages=config.num_pages, device=CPU)
        return ModelRunner(OpGraph.build(model), weights, cache, book, config.runner_sizes)

    return Engine(config, book, make_runner)


class Collector:
    """Events of all requests."""

    def __init__(self):
        self.events = {}
        self._done = threading.Condition()

    def on_event(self, event):
        with self._done:
            self.events.setdefault(event.request_id, []).append(event)
            self._done.notify_all()

    def ends(self, name):
        return [e for e in self.events.get(name, []) if isinstance(e, FinishEvent)]

    def tokens(self, name):
        return [e.token_id for e in self.events.get(name, []) if isinstance(e, TokenEvent)]

    def wait(self, names, timeout_s=120.0):
        with self._done:
            finished = self._done.wait_for(lambda: all(self.ends(n) for n in names), timeout_s)
        assert finished, "the engine does not get on"

    def wait_tokens(self, name, count, timeout_s=60.0):
        with self._done:
            assert self._done.wait_for(lambda: len(self.tokens(name)) >= count, timeout_s)


def make_request(name, prompt, max_tokens, model=MODEL, **sampling):
    rng = random.Random(name)
    if isinstance(prompt, int):
        prompt = tuple(rng.randrange(model.vocab_size) for _ in range(prompt))
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**({"max_tokens": max_tokens, "temperature": 0.0} | sampling)),
    )


def generate_alone(weights, request, eos=(EOS,)):
    """Greedy tokens of one request, each from a plain forward pass over the whole text."""
    cache = PagedKvCache(weights.model, num_pages=1, device=CPU)
    text = list(request.prompt_token_ids)
    while True:
        whole = Request(token_ids=tuple(text), first_position=0, pages=(), is_decode=False)
        text.append(int(reference_forward(weights, cache, [whole]).logits_RV.argmax()))
        generated = text[len(request.prompt_token_ids) :]
        is_stop = generated[-1] in eos and not request.sampling.ignore_eos
        if is_stop or len(generated) == request.sampling.max_tokens:
            return generated


def serve_on_rank(ctx, requests, gathers=False):
    """A rank's part of a tensor-parallel engine; rank 0 returns the tokens by request."""
    size = ctx.world_size
    weights = random_weights(
        MODEL, rank=ctx.rank, tp_degree=size, device=CPU, with_o_columns=gathers
    )
    graph = OpGraph.build(MODEL, size)
    own = bucket(graph, ROWS, ROWS // 2)
    buckets = (gathering_bucket(own) if gathers else own,)
    config, book = config_of(num_pages=30), book_of(tp_degree=size, buckets=buckets)
    cache = PagedKvCache(MODEL, num_pages=30, device=CPU, tp_degree=size, rank=ctx.rank)
    schedules = [choice.schedule for choice in book.choices.values()]
    resources = default_resources(ctx, schedules)
    runner = ModelRunner(
        OpGraph.build(MODEL, size), weights, cache, book, config.runner_sizes, lambda _: resources
    )
    group = step_group()
    if ctx.rank > 0:
        follow(runner, group)
        return {}
    engine, collector = Engine(config, book, lambda: LeadingRunner(runner, group)), Collector()
    engine.start()
    for request in requests:
        engine.submit(request, collector.on_event)
    collector.wait([request.request_id for request in requests])
    engine.close()
    return {request.request_id: collector.tokens(request.request_id) for request in requests}
