from __future__ import annotations

import pytest

from nanoflow_tune.autotune.baselines import equal_split, sequential
from nanoflow_tune.autotune.bounds import iteration_work
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.power_model import EXPONENT, KEPT
from nanoflow_tune.autotune.simulator import predict, simulate
from nanoflow_tune.profiler.profile import EnergyModel
from nanoflow_tune.runtime.schedule import unroll

from .fakes import MIX, graph_of, h200, linear_profile, quick_space
from .tiny import MIX as TINY_MIX
from .tiny import FixedCosts, tiny_graph, tiny_schedule

GRAPH = graph_of("llama3-8b")
COSTS = CostModel(linear_profile(GRAPH), h200())
PING_PONG = tiny_schedule(("a", 0, 0, 100), ("b", 0, 0, 32), ("a", 1, 0, 100), ("b", 1, 0, 32))


def spans(timeline: object, layer: int) -> dict[int, tuple[float, float]]:
    events = timeline.events  # pyright: ignore
    return {e.index: (e.start_us, e.end_us) for e in events if e.layer == layer}


def test_ping_pong_without_interference_by_hand():
    """A: a 10, b 6; B the same. a0 0-10, b0 10-16, a1 10-20, b1 20-26; next layer a0 from 20."""
    costs = FixedCosts({("a", 32, 100): 10.0, ("b", 32, 32): 6.0}, overhead_us=7.0)
    timeline = simulate(PING_PONG, tiny_graph(), costs, TINY_MIX, sync_us=0.0)
    assert spans(timeline, 0) == {0: (0, 10), 1: (10, 16), 2: (10, 20), 3: (20, 26)}
    assert spans(timeline, 1) == {0: (20, 30), 1: (30, 36), 2: (30, 40), 3: (40, 46)}
    assert timeline.layer_us == pytest.approx(20)
    assert timeline.makespan_us == pytest.approx(11 * 20 + 26)
    assert timeline.period_us == pytest.approx(11 * 20 + 26 + 7)


def test_interference_slows_only_while_both_run_by_hand():
    """Slowdown 2. From 10 on, b0 and a1 both at half speed: b0 (6) ends at 22, when a1 has done 6
    of 10; alone it ends at 26.
    """
    costs = FixedCosts({("a", 32, 100): 10.0, ("b", 32, 32): 6.0}, pair_slowdown=2.0)
    timeline = simulate(PING_PONG, tiny_graph(), costs, TINY_MIX, sync_us=0.0)
    first = spans(timeline, 0)
    assert first[1] == pytest.approx((10, 22))
    assert first[2] == pytest.approx((10, 26))
    slowdowns = {e.index: e.slowdown for e in timeline.events if e.layer == 0}
    assert slowdowns[1] == pytest.approx(2.0)
    assert slowdowns[2] == pytest.approx(1.6)


def test_waiting_for_another_stream_costs_one_sync_by_hand():
    """a0 0-10, b0 waits for it: 10-18 with a sync of 2; a1 10-20; b1 20-28; a0 of layer 1 from 20
    waits for b0 (another stream): 20-32.
    """
    costs = FixedCosts({("a", 32, 100): 10.0, ("b", 32, 32): 6.0})
    timeline = simulate(PING_PONG, tiny_graph(), costs, TINY_MIX, sync_us=2.0)
    assert spans(timeline, 0)[1] == (10, 18)
    assert spans(timeline, 1)[0] == (20, 32)


@pytest.mark.parametrize("build", [sequential, lambda *a: equal_split(*a, quick_space())])
def test_extrapolating_the_steady_pace_equals_simulating_every_layer(build: object):
    schedule = build(GRAPH, COSTS, MIX)  # pyright: ignore
    short = simulate(schedule, GRAPH, COSTS, MIX)
    full = simulate(schedule, GRAPH, COSTS, MIX, num_layers=GRAPH.num_layers)
    assert len(full.events) == GRAPH.num_layers * len(schedule.nano_ops) > len(short.events)
    assert short.period_us == pytest.approx(full.period_us, rel=1e-9)


def test_events_respect_every_wait_and_never_oversubscribe():
    schedule = equal_split(GRAPH, COSTS, MIX, quick_space())
    timeline = simulate(schedule, GRAPH, COSTS, MIX, num_layers=6)
    by_key = {(e.index, e.layer): e for e in timeline.events}
    instances = unroll(schedule, GRAPH, 6)
    for instance in instances:
        mine = by_key[instance.index, instance.layer]
        for there in instance.waits_for:
            other = instances[there]
            assert by_key[other.index, other.layer].end_us <= mine.start_us + 1e-6
    for event in timeline.events:
        moment = (event.start_us + event.end_us) / 2
        running = [e.num_sms for e in timeline.events if e.start_us < moment < e.end_us]
        assert sum(running) <= 132


def test_sequential_is_the_sum_of_its_ops():
    schedule = sequential(GRAPH, COSTS, MIX)
    solo_us = sum(COSTS.best(op, MIX, 132)[1].us for op in GRAPH.layer)
    expected = GRAPH.num_layers * solo_us + COSTS.iteration_overhead_us(GRAPH, MIX)
    assert simulate(schedule, GRAPH, COSTS, MIX).period_us == pytest.approx(expected)
    timing = predict(schedule, GRAPH, COSTS, MIX)
    assert timing.source == "predicted"
    assert timing.watts == pytest.approx(timing.joules / timing.period_us * 1e6)


def test_the_clock_falls_until_joules_fit_under_the_cap():
    """Far below the cap the timeline holds; above it watts are the cap, joules and time agree."""
    schedule = sequential(GRAPH, COSTS, MIX)
    timeline = simulate(schedule, GRAPH, COSTS, MIX)

    def timing(joules_per_flop):
        costs = CostModel(linear_profile(GRAPH), h200())
        costs.energy = EnergyModel(
            static_w=100.0, joules_per_flop=joules_per_flop, joules_per_byte=0.0
        )
        return predict(schedule, GRAPH, costs, MIX)

    flops = iteration_work(GRAPH, MIX).flops
    frugal, hungry = 600.0 * 1e-6 * timeline.period_us / flops / 3, 5e-12
    assert timing(frugal).period_us == pytest.approx(timeline.period_us, rel=1e-9)
    assert timing(frugal).sm_clock_mhz == 1980.0
    capped = timing(hungry)
    assert capped.watts == pytest.approx(KEPT * 700.0, rel=1e-3)
    dynamic = hungry * flops * (capped.sm_clock_mhz / 1980.0) ** EXPONENT
    assert capped.joules == pytest.approx(dynamic + 100e-6 * capped.period_us, rel=1e-3)
    assert timing(3 * frugal).period_us < timing(6 * frugal).period_us < capped.period_us


def test_a_prediction_never_needs_more_power_than_the_cap_but_a_roofline_may():
    hungry = EnergyModel(static_w=117.0, joules_per_flop=2e-12, joules_per_byte=130e-12)
    costs = CostModel(linear_profile(GRAPH), h200())
    costs.energy = hungry
    timing = predict(sequential(GRAPH, costs, MIX), GRAPH, costs, MIX)
    assert timing.watts <= 700
    roofline = CostModel(None, h200())
    timing = predict(sequential(GRAPH, roofline, MIX), GRAPH, roofline, MIX)
    assert timing.source == "roofline"
    assert timing.watts > 700
