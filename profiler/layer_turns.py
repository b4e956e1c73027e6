"""Times one layer of schedules on the real executor, interleaved in one sustained run.

A layer is what an iteration of many layers takes beyond one of few: what comes before the first
layer and after the last, and the ends of a pipeline, cancel out. Runs on every tensor-parallel
rank.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..runtime.executor import Executor
from ..runtime.launch import RankContext
from ..runtime.plan import Schedule
from .compile_ahead import compile_ahead
from .iteration import (
    Loaded,
    Turns,
    agree,
    captured,
    iterations_of,
    loaded_for,
    mean_of_known,
    take_turn,
    warm,
)
from .rank_jobs import IterationCase


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTurns:
    """One layer of a schedule, by round of an interleaved run."""

    layer_us: tuple[float, ...]
    """Empty where the schedule could not run."""
    watts: float
    """Mean while the whole model ran."""
    sm_clock_mhz: float
    error: str = ""
    """Why it could not run here."""


Pair = tuple[Executor, Executor]
"""Of all layers and of few."""


def _silent(_: str) -> None:
    """Progress nobody reads."""


def measure_layers(
    ctx: RankContext,
    case: IterationCase,
    schedules: Sequence[Schedule],
    rounds: int,
    turn_s: float,
    few_layers: int,
    say: Callable[[str], None] = _silent,
) -> list[LayerTurns]:
    """Time one layer within many: the model's iteration less that of its first `few_layers`.

    Args:
        ctx: this rank.
        case: its model has more layers than `few_layers`, and may have a small vocabulary.
        schedules: compared in one interleaved run.
        rounds: turns of each.
        turn_s: seconds of a turn of the whole model; the few layers are replayed as often.
        few_layers: layers that are taken off.
        say: told what this rank is at, in words.

    Returns:
        One record per schedule; watts and clocks are this rank's. A schedule that the kernels here
        refuse, on all ranks alike, has an error instead of times.
    """
    loaded = loaded_for(ctx, case, schedules)
    say("weights and KV cache are there")
    say(f"{compile_ahead(schedules, loaded.graph)} fitted GEMMs compiled")
    few = replace(
        loaded, weights=replace(loaded.weights, layers=loaded.weights.layers[:few_layers])
    )
    pairs: list[Pair | str] = []
    first: Executor | None = None
    for schedule in schedules:
        pairs.append(_captured_pair(ctx, loaded, few, schedule, first))
        first = first or next((pair[0] for pair in pairs if not isinstance(pair, str)), None)
    executors = [pair for pair in pairs if not isinstance(pair, str)]
    say(f"{len(executors)} of {len(pairs)} schedules captured")
    counts = agree([iterations_of(whole, turn_s) for whole, _ in executors])
    turns = [(Turns(), Turns()) for _ in executors]
    warm([whole for whole, _ in executors], counts, turn_s)
    for turn in range(rounds):
        order = list(zip(executors, counts, turns, strict=True))
        for pair, count, mine in order if turn % 2 == 0 else reversed(order):
            for executor, kept in zip(pair, mine, strict=True):
                take_turn(loaded.meter, executor, count, kept)
    taken, layers = iter(turns), case.model.num_hidden_layers - few_layers
    return [
        LayerTurns(layer_us=(), watts=0.0, sm_clock_mhz=0.0, error=pair)
        if isinstance(pair, str)
        else _layer_turns(*next(taken), layers)
        for pair in pairs
    ]


def _captured_pair(
    ctx: RankContext,
    loaded: Loaded,
    few: Loaded,
    schedule: Schedule,
    shares_with: Executor | None,
) -> Pair | str:
    """Both executors, or why the schedule cannot run on one of the ranks."""
    pair: Pair | None = None
    error = ""
    try:
        whole = captured(ctx, loaded, schedule, shares_with)
        pair = whole, captured(ctx, few, schedule, shares_with or whole)
    except (RuntimeError, ValueError) as err:
        torch.cuda.synchronize()  # raises where the context is lost: nothing can run after that
        error = (str(err).splitlines() or [type(err).__name__])[0]
    error = next(filter(None, _of_all_ranks(error)), "")
    return error if pair is None or error else pair


def _of_all_ranks(value: str) -> list[str]:
    """The value of each rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _layer_turns(whole: Turns, few: Turns, layers: int) -> LayerTurns:
    medians = zip(whole.turn_medians_us, few.turn_medians_us, strict=True)
    return LayerTurns(
        layer_us=tuple((all_us - few_us) / layers for all_us, few_us in medians),
        watts=mean_of_known(whole.watts),
        sm_clock_mhz=statistics.mean(whole.clocks_mhz),
    )
