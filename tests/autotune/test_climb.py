"""Steady periods cost what the simulator says, and local search is legal, repeatable and better."""

from __future__ import annotations

from random import Random

import pytest

from nanoflow_tune.autotune.baselines import PingPongChoice, equal_split, ping_pong, sequential
from nanoflow_tune.autotune.climb import Climb, climbed
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.simulator import Simulator, predict
from nanoflow_tune.profiler.store import shipped_profile
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.plan import Candidate, Schedule
from nanoflow_tune.runtime.schedule import IllegalScheduleError

from .fakes import MIX, graph_of, h200, quick_space

COSTS = CostModel(shipped_profile("h200"), h200())
SPACE = quick_space(simulator_trials=3, token_granularity=256)


def candidate(schedule: Schedule, model: str, tp_degree: int) -> Candidate:
    timing = predict(schedule, graph_of(model, tp_degree), COSTS, MIX)
    return Candidate(schedule=schedule, predicted=timing)


@pytest.mark.parametrize(("model", "tp_degree"), [("llama3-8b", 1), ("llama2-70b", 8)])
@pytest.mark.parametrize("order", ["blocks", "interleaved"])
def test_a_steady_period_takes_what_the_simulator_says(model: str, tp_degree: int, order: str):
    graph = graph_of(model, tp_degree)
    choice = PingPongChoice(
        first_tokens=768,
        row_order="decodes_first",
        compute_sms=108,
        memory_sms=24,
        network_sms=16,
        order=order,  # pyright: ignore[reportArgumentType]
    )
    schedule = ping_pong(graph, COSTS, MIX, choice)
    climb = Climb(graph, COSTS, SPACE, MIX, clock=0.8, is_powered=True, seed=0)
    period = climb.starts(2, [schedule])[0]
    layer = climb.cut(period.split).layer(period)
    assert layer is not None
    simulator = Simulator(schedule, graph, COSTS, MIX)
    for clock, us in zip(climb.worth.clocks, layer.us, strict=True):
        assert us == pytest.approx(simulator.timeline(clock=clock).layer_us, rel=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_changed_periods_are_legal_and_cost_what_the_simulator_says(count: int):
    graph, rng = graph_of("llama3-8b"), Random(0)
    climb = Climb(graph, COSTS, SPACE, MIX, clock=0.8, is_powered=True, seed=0)
    here, seen = climb.starts(count, [])[0], list[bool]()
    for _ in range(80):
        change = rng.choice((climb._share, climb._beside, climb._order, climb._slide, climb._cut))
        other = change(here)
        if climb.value(other) == float("inf"):
            continue
        here, cut = other, climb.cut(other.split)
        assert sum(here.split.sizes) == 2048
        try:
            schedule = cut.schedule(here, "changed")
        except IllegalScheduleError:  # its shares find no places
            continue
        check(schedule, graph, 132, 8)
        layer = cut.layer(here)
        assert layer is not None
        clock = climb.worth.clocks[1]
        real_us = Simulator(schedule, graph, COSTS, MIX).timeline(clock=clock).layer_us
        seen.append(real_us == pytest.approx(layer.us[1], rel=5e-3))
    # waits that follow from others are not all seen through, at 2 us each
    assert len(seen) >= 10
    assert sum(seen) >= 0.6 * len(seen)


def test_with_collectives_what_is_found_is_told_within_a_few_percent():
    graph = graph_of("llama2-70b", 8)
    climb = Climb(graph, COSTS, SPACE, MIX, clock=0.85, is_powered=True, seed=0)
    period = climb.run(climb.starts(2, []), 200, is_cut_kept=True)[0]
    written = climb.written(period)
    assert written is not None
    assert written.predicted.period_us == pytest.approx(climb.value(period), rel=0.05)


def test_local_search_repeats_itself_and_is_no_worse_than_its_starts():
    graph = graph_of("llama3-8b")
    known = [
        candidate(schedule, "llama3-8b", 1)
        for schedule in (sequential(graph, COSTS, MIX), equal_split(graph, COSTS, MIX, SPACE))
    ]
    first, second = (
        climbed(graph, COSTS, SPACE, MIX, known=known, most_batches=2, seed=3) for _ in range(2)
    )
    assert [c.schedule for c in first] == [c.schedule for c in second]
    assert first[0].predicted.period_us < known[1].predicted.period_us
    for found in first:
        check(found.schedule, graph, 132, 8)
