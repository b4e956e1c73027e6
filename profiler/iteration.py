"""Times whole iterations of schedules on the real model, interleaved in one sustained run.

All schedules share weights, KV cache and requests. Each is captured into a CUDA graph; then they
take turns of about half a second, so that heat, clocks and neighbours hit all alike. The spread
between a schedule's own turns is its A/A band.

Runs on every tensor-parallel rank (module-level functions for `runtime.launch.RankGroup`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..runtime.batching import DenseBatch, Request
from ..runtime.device import device_resources
from ..runtime.executor import Executor
from ..runtime.gpu_failures import memory_for
from ..runtime.kv_cache import PagedKvCache
from ..runtime.launch import RankContext
from ..runtime.op_graph import OpGraph
from ..runtime.plan import Schedule, Timing
from ..runtime.schedule import has_o_columns
from ..runtime.steady_state import steady_pages, steady_requests
from ..runtime.weights import Weights, add_o_columns, random_source, random_weights
from .compile_ahead import compile_ahead
from .power import PowerMeter
from .rank_jobs import IterationCase
from .timing import timed_replays

CLEARLY_WORSE = 0.1
"""More than a card's drift within a run can make of equal schedules."""
MORE_GPUS = (
    "end what else runs on the GPU, tune for more GPUs (--num-gpus), or without a GPU "
    "(CUDA_VISIBLE_DEVICES= )"
)
WARM_S = 1.0
"""Of replays before the first turn; each turn warms for an eighth of itself besides."""


@dataclass(slots=True)
class Loaded:
    """The model and its KV cache on one rank, kept between calls."""

    case: IterationCase
    graph: OpGraph
    weights: Weights
    cache: PagedKvCache
    requests: tuple[Request, ...]
    meter: PowerMeter


@dataclass(slots=True)
class Turns:
    """What one schedule's turns gave on this rank."""

    times_us: list[float] = field(default_factory=list[float])
    turn_medians_us: list[float] = field(default_factory=list[float])
    joules: list[float] = field(default_factory=list[float])
    watts: list[float] = field(default_factory=list[float])
    clocks_mhz: list[float] = field(default_factory=list[float])


def load_model(ctx: RankContext, case: IterationCase) -> None:
    """Put the model's weights and a full KV cache on this rank's GPU, once per case."""
    loaded: Loaded | None = ctx.state.get("iteration")
    if loaded is not None and loaded.case == case:
        return
    unload_model(ctx)
    device = torch.device(ctx.device)
    pages = steady_pages(case.mix, case.page_size, mixed_lengths=True) + 8
    with memory_for("the KV cache of the batch", MORE_GPUS):
        cache = PagedKvCache(
            case.model,
            num_pages=pages,
            device=device,
            tp_degree=case.tp_degree,
            rank=ctx.rank,
            page_size=case.page_size,
            seed=case.seed,
        )
        cache.fill_random(case.seed)
    with memory_for("the weights", MORE_GPUS):
        weights = random_weights(
            case.model,
            rank=ctx.rank,
            tp_degree=case.tp_degree,
            device=device,
            seed=case.seed,
            sharded_exactly=False,
        )
    ctx.state["iteration"] = Loaded(
        case=case,
        graph=OpGraph.build(case.model, case.tp_degree),
        weights=weights,
        cache=cache,
        requests=steady_requests(
            case.mix,
            cache,
            vocab_size=case.model.vocab_size,
            seed=case.seed,
            mixed_lengths=True,
        ),
        meter=PowerMeter(ctx.rank),
    )


def loaded_for(ctx: RankContext, case: IterationCase, schedules: Sequence[Schedule]) -> Loaded:
    """The model with all forms of its weights that the schedules need."""
    load_model(ctx, case)
    loaded: Loaded = ctx.state["iteration"]
    weights, device = loaded.weights, torch.device(ctx.device)
    if has_o_columns(schedules) and weights.layers[0].o_columns_WA is None:
        source = random_source(
            case.model, rank=ctx.rank, device=device, seed=case.seed, sharded_exactly=False
        )
        with memory_for("the output projection in its second form", MORE_GPUS):
            loaded.weights = add_o_columns(weights, source)
    return loaded


def unload_model(ctx: RankContext) -> None:
    """Give this rank's GPU memory back."""
    ctx.state.pop("iteration", None)
    torch.cuda.empty_cache()


def measure_schedules(
    ctx: RankContext,
    case: IterationCase,
    schedules: Sequence[Schedule],
    rounds: int,
    turn_s: float,
) -> list[Timing]:
    """Time each schedule over `rounds` interleaved turns of about `turn_s` seconds.

    One that is slower than the fastest by more than `CLEARLY_WORSE` after half of the rounds has
    no more turns.

    Returns:
        One timing per schedule; watts and clocks are this rank's, joules of this rank's GPU.
    """
    loaded = loaded_for(ctx, case, schedules)
    compile_ahead(schedules, loaded.graph)
    executors: list[Executor] = []
    for schedule in schedules:
        first = executors[0] if executors else None
        with memory_for(f"buffers and CUDA graph of schedule {schedule.name!r}", MORE_GPUS):
            executors.append(captured(ctx, loaded, schedule, first))
    counts = agree([iterations_of(executor, turn_s) for executor in executors])
    turns = [Turns() for _ in executors]
    warm(executors, counts, turn_s)
    running = list(range(len(executors)))
    for done in range(rounds):
        if done == max(1, rounds // 2):
            medians_us = [statistics.median(turn.times_us) for turn in turns]
            running = agree(close_to_fastest(medians_us))
        for index in running:
            take_turn(loaded.meter, executors[index], counts[index], turns[index])
    return [_timing(turn) for turn in turns]


def close_to_fastest(medians_us: Sequence[float]) -> list[int]:
    """Which of some schedules are not clearly worse than the fastest."""
    limit_us = (1 + CLEARLY_WORSE) * min(medians_us, default=0.0)
    return [index for index, us in enumerate(medians_us) if us <= limit_us]


def captured(
    ctx: RankContext, loaded: Loaded, schedule: Schedule, shares_with: Executor | None = None
) -> Executor:
    """An executor ready to be replayed; with another one's buffers, as only one runs at a time."""
    batch = DenseBatch.build(
        schedule.nano_batches,
        loaded.requests,
        page_size=loaded.cache.page_size,
        device=loaded.weights.device,
    )
    resources = device_resources(ctx, loaded.graph, loaded.case.hardware, (schedule,))
    executor = Executor(
        loaded.graph, loaded.weights, loaded.cache, batch, schedule, resources
    ).prepare(shares_with)
    executor.capture()
    return executor


def _replay(executor: Executor, count: int) -> None:
    for _ in range(count):
        executor.replay()


def warm(executors: Sequence[Executor], counts: Sequence[int], turn_s: float) -> None:
    """Drive the card for `WARM_S` in all, so that it is hot and held to its cap."""
    part = WARM_S / (turn_s * max(1, len(executors)))
    for executor, count in zip(executors, counts, strict=True):
        _replay(executor, max(1, round(part * count)))
    torch.cuda.synchronize()


def iterations_of(executor: Executor, turn_s: float) -> int:
    """Replays that take about `turn_s` seconds, two at least."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    executor.replay()
    start.record()
    executor.replay()
    end.record()
    end.synchronize()
    return max(2, round(turn_s * 1e3 / start.elapsed_time(end)))


def agree(counts: list[int]) -> list[int]:
    """Rank 0's counts on every rank: ranks must replay equally often."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return counts
    box: list[Any] = [counts]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def take_turn(meter: PowerMeter, executor: Executor, count: int, turn: Turns) -> None:
    """Warm up for an eighth of a turn, then add `count` timed replays to the schedule's turns."""
    _replay(executor, max(1, count // 8))
    torch.cuda.synchronize()
    with meter:
        times, clock = timed_replays(executor.replay, count, meter)
    turn.times_us += times
    turn.turn_medians_us.append(statistics.median(times))
    turn.joules.append(meter.joules / count)
    turn.watts.append(meter.watts)
    turn.clocks_mhz.append(clock)


def _timing(turn: Turns) -> Timing:
    ordered = sorted(turn.times_us)
    median = statistics.median(ordered)
    return Timing(
        period_us=median,
        source="measured",
        p10_us=ordered[len(ordered) // 10],
        p90_us=ordered[len(ordered) * 9 // 10],
        joules=mean_of_known(turn.joules),
        watts=mean_of_known(turn.watts),
        sm_clock_mhz=statistics.mean(turn.clocks_mhz),
        turn_spread=(max(turn.turn_medians_us) - min(turn.turn_medians_us)) / median,
    )


def mean_of_known(values: list[float]) -> float:
    """Mean without nan (a turn too short for the energy counter); 0 when nothing is known."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.mean(known) if known else 0.0
