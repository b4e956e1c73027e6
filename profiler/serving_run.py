"""Runs of the engine: requests all at once or when due, plan books side by side, joules counted.

Runs on every tensor-parallel rank (module-level functions for `runtime.launch.RankGroup`): rank 0
holds the engine, the others follow. Weights and cache stay between runs, so that books that are
compared meet the same model on the same warm card.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.checkpoint import load_checkpoint
from ..runtime.device import device_resources
from ..runtime.engine import Engine
from ..runtime.engine_config import EngineConfig
from ..runtime.executor import Resources
from ..runtime.gpu_failures import OutOfMemoryError, memory_for
from ..runtime.kv_cache import PagedKvCache
from ..runtime.kv_store import KvStore
from ..runtime.launch import RankContext
from ..runtime.model_runner import Launched, ModelRunner, Sampled
from ..runtime.op_graph import OpGraph
from ..runtime.plan import Schedule
from ..runtime.rank_runner import LeadingRunner, follow, step_group
from ..runtime.schedule import has_o_columns
from ..runtime.sequence import GenerationRequest, SamplingParams
from ..runtime.step import StepInputs
from ..runtime.verify_rank import default_resources
from ..runtime.weights import Weights, random_weights
from ..search_spaces.schema import ModelSpec
from .latency import summarise
from .power import PowerMeter
from .progress import REDRAWN_AFTER_S, HandBar, TokenBar, stderr_console
from .request_feed import RequestFeed
from .serving_case import RESERVED_BYTES, Contender, ServingCase, ServingRun

_POLL_S = 0.1
_MORE_GPUS = "end what else runs on the GPU, or bench a plan for more GPUs or a smaller model"
_FEWER_PAGES = "lower --num-pages, or end what else runs on the GPU"
_FEWER_ROWS = "lower --num-pages, --requests or --max-model-len"


@dataclass(slots=True)
class Loaded:
    """What stays on a rank between runs."""

    key: tuple[ModelSpec, int, int, Path | None]
    weights: Weights
    cache: PagedKvCache
    group: Any


@dataclass(slots=True)
class _Meter:
    """Joules, watts and clocks of the enclosed time; nan on a CPU."""

    device_index: int | None
    joules: float = float("nan")
    watts: float = float("nan")
    sm_clock_mhz: float = float("nan")
    _stop: threading.Event = field(default_factory=threading.Event)

    def measure(self, body: Any) -> None:  # noqa: ANN401 - a function without arguments
        """Run `body` and read the GPU meanwhile."""
        if self.device_index is None:
            body()
            return
        meter = PowerMeter(self.device_index)
        clocks: list[float] = []

        def watch() -> None:
            while not self._stop.wait(_POLL_S):
                clocks.append(meter.sm_clock_mhz)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        with meter:
            body()
        self._stop.set()
        watcher.join()
        self.joules, self.watts = meter.joules, meter.watts
        self.sm_clock_mhz = statistics.mean(clocks) if clocks else meter.sm_clock_mhz


def run_contenders(
    ctx: RankContext, cases: Sequence[ServingCase], contenders: Sequence[Contender], rounds: int
) -> list[list[ServingRun]]:
    """Serve each case with each book, in `rounds` interleaved rounds; no runs on ranks above 0.

    Args:
        ctx: of this rank.
        cases: of one model on the same GPUs, with the same weights: they differ in their requests.
        contenders: the books.
        rounds: of each case.
    """
    gathers = has_o_columns(
        choice.schedule for c in contenders for choice in c.book.choices.values()
    )
    num_tokens = rounds * len(contenders) * sum(case.num_tokens for case in cases)
    runs: list[list[ServingRun]] = []
    with HandBar(stderr_console() if ctx.rank == 0 else None) as hand:
        bar = TokenBar(bar=hand, num_tokens=num_tokens)
        bar.before("loading weights")
        loaded = load_case(ctx, cases[0], with_o_columns=gathers)
        if ctx.device != "cpu":
            _hold_in_graphs(ctx, cases[0], contenders)
        runners: dict[str, _Kept] = {}
        for contender in contenders:
            bar.before(f"{contender.name}, making its executors")
            with memory_for("the engine's buffers and CUDA graphs", _FEWER_ROWS):
                runners[contender.name] = _Kept(_warm_runner(ctx, cases, loaded, contender))
        for case in cases:
            runs.append([])
            for contender in list(contenders) * rounds:
                meter = _Meter(ctx.rank if ctx.device.startswith("cuda") else None)
                runner = runners[contender.name]
                if ctx.rank > 0:
                    with memory_for("a step", _FEWER_ROWS):
                        meter.measure(partial(follow, runner, loaded.group))
                else:
                    runs[-1].append(_lead(ctx, case, loaded, contender, runner, meter, bar))
                _add_joules(ctx, meter, runs[-1])
                if ctx.rank == 0:
                    run = runs[-1][-1]
                    rate = f"{run.tokens_per_s / run.num_gpus:.0f} tokens/s/GPU"
                    hand.say(f"{run.name}: {rate} in {run.elapsed_s:.1f} s")
    for runner in runners.values():
        runner.runner.close()
    return runs


def _hold_in_graphs(ctx: RankContext, case: ServingCase, contenders: Sequence[Contender]) -> None:
    """As `nanoflow-serve` does: kernels that no CUDA graph holds are replaced, and it is said."""
    from ..runtime.kernels.graph_variants import graph_variants  # imports Triton

    graph = OpGraph.build(case.model, case.tp_degree)
    stand_ins = graph_variants(graph, case.page_size)
    for contender in contenders:
        for remark in contender.book.hold_in_graphs(graph, stand_ins):
            if ctx.rank == 0:
                print(f"{contender.name}: {remark}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A runner that outlives its engine: graphs are captured once for all rounds."""

    runner: ModelRunner

    def launch(self, inputs: StepInputs) -> Launched:
        """Queue a step."""
        return self.runner.launch(inputs)

    def collect(self, launched: Launched) -> Sampled:
        """What a step sampled, once it has run."""
        return self.runner.collect(launched)

    def close(self) -> None:
        """Forget what this engine left; keep the graphs."""
        self.runner.reset()


def _warm_runner(
    ctx: RankContext, cases: Sequence[ServingCase], loaded: Loaded, contender: Contender
) -> ModelRunner:
    """One runner with room for the requests of all cases."""
    all_lengths = tuple(length for case in cases for length in case.lengths)
    runner = make_runner(ctx, replace(cases[0], lengths=all_lengths), loaded, contender)
    if ctx.device != "cpu":
        began_s = time.perf_counter()
        count = runner.warm_up(contender.book.target_rows)
        if ctx.rank == 0:
            took_s = time.perf_counter() - began_s
            print(f"{contender.name}: {count} executors in {took_s:.1f} s", file=sys.stderr)
    return runner


def _add_joules(ctx: RankContext, meter: _Meter, runs: list[ServingRun]) -> None:
    """Sum the ranks' joules into the last run of rank 0."""
    if ctx.world_size > 1:
        import torch.distributed as dist

        box: list[float] = [0.0] * ctx.world_size
        dist.all_gather_object(box, meter.joules)
        if runs:
            runs[-1] = replace(runs[-1], joules=sum(box))


def load_case(ctx: RankContext, case: ServingCase, *, with_o_columns: bool = False) -> Loaded:
    """Weights and cache of a case on this rank; those of the last call where they are the same."""
    key = (case.model, case.tp_degree, case.seed, case.weights)
    loaded: Loaded | None = ctx.state.get("serving")
    has_all = loaded is not None and (
        not with_o_columns or loaded.weights.layers[0].o_columns_WA is not None
    )
    if loaded is not None and loaded.key == key and has_all:
        return loaded
    device = torch.device(ctx.device)
    with memory_for("the weights", _MORE_GPUS):
        weights = _weights(ctx, case, device, with_o_columns)
    num_pages = case.num_pages or _agreed_pages(ctx, case)
    with memory_for("the KV cache", _FEWER_PAGES):
        cache = PagedKvCache(
            case.model,
            num_pages=num_pages,
            device=device,
            tp_degree=case.tp_degree,
            rank=ctx.rank,
            page_size=case.page_size,
        )
    group = step_group() if ctx.world_size > 1 else None
    ctx.state["serving"] = Loaded(key, weights, cache, group)
    return ctx.state["serving"]


def _weights(
    ctx: RankContext, case: ServingCase, device: torch.device, with_o_columns: bool
) -> Weights:
    if case.weights is not None:
        return load_checkpoint(
            case.weights,
            rank=ctx.rank,
            tp_degree=case.tp_degree,
            device=device,
            with_o_columns=with_o_columns,
        )[1]
    return random_weights(
        case.model,
        rank=ctx.rank,
        tp_degree=case.tp_degree,
        device=device,
        seed=case.seed,
        sharded_exactly=device.type == "cpu",
        with_o_columns=with_o_columns,
    )


def _agreed_pages(ctx: RankContext, case: ServingCase) -> int:
    """Pages that fit the fullest GPU."""
    if ctx.device == "cpu":
        raise ValueError("`num_pages` must be given on a CPU, where no memory limit is known")
    torch.cuda.empty_cache()  # what making the weights left behind
    free, total = torch.cuda.mem_get_info()
    page_bytes = case.model.kv_bytes_per_token * case.page_size // case.tp_degree
    counts = [(free - RESERVED_BYTES) // page_bytes]
    if ctx.world_size > 1:
        import torch.distributed as dist

        box: list[int] = [0] * ctx.world_size
        dist.all_gather_object(box, counts[0])
        counts = box
    if min(counts) < 1:
        raise OutOfMemoryError(
            f"the KV cache must hold a page of {case.page_size} tokens beside "
            f"{RESERVED_BYTES / 2**30:g} GiB for activations, but {free / 2**30:.2f} of "
            f"{total / 2**30:.2f} GiB are free on GPU {ctx.rank}; {_MORE_GPUS}"
        )
    return min(counts)


def engine_config(case: ServingCase, loaded: Loaded, contender: Contender) -> EngineConfig:
    """Limits of an engine that serves the case with a book."""
    num_pages = loaded.cache.num_free_pages
    return EngineConfig(
        model_name=case.model.name,
        vocab_size=case.model.vocab_size,
        limits=case.limits(contender.book),
        num_pages=num_pages,
        page_size=case.page_size,
        offload_host_pages=contender.offload_host_pages,
        page_bytes=case.model.kv_bytes_per_token * case.page_size,
        memory_remedy=_FEWER_ROWS,
    )


def make_runner(
    ctx: RankContext, case: ServingCase, loaded: Loaded, contender: Contender
) -> ModelRunner:
    """A runner whose graphs are made when they are first used, or by `warm_up`."""
    graph = OpGraph.build(case.model, case.tp_degree)

    def resources_of(schedule: Schedule) -> Resources:
        if ctx.device == "cpu":
            return default_resources(ctx, [schedule])
        return device_resources(ctx, graph, case.hardware, [schedule])

    return ModelRunner(
        graph,
        loaded.weights,
        loaded.cache,
        contender.book,
        engine_config(case, loaded, contender).runner_sizes,
        resources_of,
        KvStore(loaded.cache, host_pages=contender.offload_host_pages),
    )


def _lead(
    ctx: RankContext,
    case: ServingCase,
    loaded: Loaded,
    contender: Contender,
    runner: _Kept,
    meter: _Meter,
    bar: TokenBar,
) -> ServingRun:
    def lead() -> _Kept | LeadingRunner:
        if ctx.device != "cpu":
            torch.cuda.set_device(ctx.rank)  # of this thread
        return LeadingRunner(runner, loaded.group) if ctx.world_size > 1 else runner

    engine = Engine(engine_config(case, loaded, contender), contender.book, lead)
    engine.start()
    feed = RequestFeed(requests_of(case), case.due_s)

    def tick(elapsed_s: float) -> None:
        bar.during(contender.name, _served(engine), elapsed_s)

    def serve() -> None:
        feed.run(engine.submit, tick, REDRAWN_AFTER_S if bar.bar.is_shown else None)

    meter.measure(serve)
    engine.close()
    bar.after(case.num_tokens, feed.elapsed_s)
    if engine.failure is not None:
        raise engine.failure
    if feed.failures:
        count, first = len(feed.failures), feed.failures[0]
        raise RuntimeError(f"{count} requests were not served whole: {first}")
    served = feed.served()
    return ServingRun(
        name=contender.name,
        elapsed_s=feed.elapsed_s,
        num_tokens=case.num_tokens,
        num_gpus=case.tp_degree,
        joules=meter.joules,
        watts=meter.watts,
        sm_clock_mhz=meter.sm_clock_mhz,
        stats=engine.stats,
        latencies=summarise(served) if served else {},
    )


def _served(engine: Engine) -> int:
    """Prompt and generated tokens so far."""
    return engine.stats.prompt_tokens_total + engine.stats.tokens_generated_total


def requests_of(case: ServingCase) -> list[GenerationRequest]:
    """Random prompts that run to their full length."""
    rng = np.random.default_rng(case.seed)
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=tuple(rng.integers(0, case.model.vocab_size, prompt).tolist()),
            sampling=SamplingParams(max_tokens=generated, temperature=0.0, ignore_eos=True),
        )
        for index, (prompt, generated) in enumerate(case.lengths)
    ]
