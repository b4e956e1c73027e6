"""The bound of the declared space: hand-worked LPs, and no schedule is predicted below it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from nanoflow_tune.autotune.baselines import (
    PingPongChoice,
    equal_split,
    nano_only,
    ping_pong,
    sequential,
)
from nanoflow_tune.autotune.certificate import space_bound
from nanoflow_tune.autotune.configuration_lp import (
    Lanes,
    Longer,
    Option,
    Work,
    layer_bound,
    price_bound,
)
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.cut_bounds import Bounds, cuts, splits_of
from nanoflow_tune.autotune.many_batches import round_robins
from nanoflow_tune.autotune.simulator import predict, simulate
from nanoflow_tune.runtime.schedule import IllegalScheduleError

from .fakes import MIX, graph_of, h200, linear_profile, quick_space, reduce_profile

NEVER = float("inf")


def two_lanes(slowdown: float, can_meet: bool = True) -> Lanes:
    """Node 0 on the first lane, node 1 on the second."""
    options = (
        (Option(node=0, op=0, num_sms=100), None),
        (Option(node=1, op=1, num_sms=32), None),
        (None,),
    )
    rate = np.ones((2, 2, 1))
    rate[0, 0, 0] = 1 / slowdown if can_meet else 0.0
    return Lanes(options=options, rates=(rate, rate, np.ones((2, 2, 1)) * (rate > 0)))


def work(*us: float) -> Work:
    first, second = (np.array([[one, NEVER]]) for one in us)
    nothing = np.array([[NEVER]])
    return Work(num_nodes=2, us=(first, second, nothing), stride=0, longer=())


@pytest.mark.parametrize(
    ("slowdown", "can_meet", "expected_us"),
    [(1.0, True, 10.0), (1.25, True, 11.0), (2.0, True, 14.0), (1.0, False, 14.0)],
)
def test_two_ops_side_by_side(slowdown: float, can_meet: bool, expected_us: float):
    """10 and 4 us: the shorter hides, but slows both down; at 2 it is not worth it."""
    found = layer_bound(two_lanes(slowdown, can_meet), work(10.0, 4.0), np.ones(2), NEVER)
    assert found.us == pytest.approx(expected_us, rel=1e-3)


def test_any_prices_give_a_bound():
    lanes, rng = two_lanes(1.25), Random(0)
    for _ in range(50):
        prices = np.array([rng.random(), rng.random()])
        assert price_bound(lanes, work(10.0, 4.0), prices) <= 11.0 + 1e-9


def test_a_collective_without_sms_is_paid_by_the_norm_behind_it():
    """8 us of norm; a collective of 3 us beside it makes it a quarter longer: 10 us."""
    options = (
        (Option(node=0, op=0, num_sms=132), None),
        (None,),
        (Option(node=1, op=1, num_sms=0), None),
    )
    rate = np.ones((2, 1, 2))
    lanes = Lanes(options=options, rates=(rate, rate, rate))
    us = np.array([[8.0, NEVER]]), np.array([[NEVER]]), np.array([[3.0, NEVER]])
    longer = (Longer(option=0, norm=0, parts=(0.25,)),)
    made = Work(num_nodes=2, us=us, stride=0, longer=longer)
    assert layer_bound(lanes, made, np.ones(2), NEVER).us == pytest.approx(10.0, rel=1e-3)


def test_cuts_are_all_compositions():
    assert list(cuts(512, 128, 3)) == [(128, 128, 256), (128, 256, 128), (256, 128, 128)]
    assert list(cuts(512, 128, 1)) == [(512,)]
    assert sum(1 for _ in cuts(2048, 128, 4)) == 455


def made_costs(model: str, tp_degree: int) -> CostModel:
    graph = graph_of(model, tp_degree)
    profile = (
        linear_profile(graph)
        if tp_degree == 1
        else reduce_profile(graph, nccl_us_per_row=0.1, copy_us_per_row=0.1)
    )
    return CostModel(profile, h200())


@pytest.mark.parametrize(("model", "tp_degree"), [("llama3-8b", 1), ("llama2-70b", 2)])
@pytest.mark.parametrize("is_powered", [True, False])
def test_no_schedule_is_predicted_below_the_bound(model: str, tp_degree: int, is_powered: bool):
    costs = made_costs(model, tp_degree)
    graph, space = graph_of(model, tp_degree), quick_space(token_granularity=512)
    if not is_powered:
        costs.energy = None
    schedules = [
        sequential(graph, costs, MIX),
        equal_split(graph, costs, MIX, space),
        *(nano_only(graph, costs, MIX, order) for order in space.row_orders),
    ]
    rng = Random(1)
    while len(schedules) < 16:
        memory, network = rng.choice((16, 32, 48, 64)), rng.choice((16, *([0] * (tp_degree > 1))))
        choice = PingPongChoice(
            first_tokens=rng.choice((512, 1024, 1536)),
            row_order=rng.choice(space.row_orders),
            compute_sms=132 - max(memory, network),
            memory_sms=memory,
            network_sms=network,
            order=rng.choice(("blocks", "interleaved")),
        )
        try:
            schedules.append(ping_pong(graph, costs, MIX, choice))
        except IllegalScheduleError:
            continue
    periods = [predict(schedule, graph, costs, MIX).period_us for schedule in schedules]
    bound = space_bound(graph, costs, space, MIX, best_us=min(periods), is_powered=is_powered)
    assert 0 < bound.bound_us <= min(periods) * (1 + 3e-3)
    assert [c.num_nano_batches for c in bound.counts] == [1, 2, 3, 4]
    for schedule, us in zip(schedules, periods, strict=True):
        count = bound.counts[len(schedule.nano_batches) - 1]
        assert count.bound_us <= us * (1 + 3e-3) or count.is_dominated
    for candidate in round_robins(graph, costs, space, MIX, bound.counts[2])[:10]:
        assert bound.bound_us <= candidate.predicted.period_us * (1 + 3e-3)


def test_one_nano_batch_without_free_ops_is_bounded_exactly():
    """Where decode attention is alone, all ops wait for each other: the sum is the period."""
    graph = graph_of("llama3-8b")
    costs = CostModel(linear_profile(graph, has_pairs=False), h200())
    costs.energy = None
    mix = replace(MIX, prefill_tokens=0)
    bounds = Bounds(graph, costs, quick_space(), mix, is_powered=False)
    (single,) = splits_of(quick_space(), mix, 1)
    exact_us = simulate(sequential(graph, costs, mix), graph, costs, mix).period_us
    assert bounds.cut_us(single, True) == pytest.approx(exact_us, rel=1e-6)
