"""The bound of the declared space: LPs by hand and in full; no schedule is told below it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pulp
import pytest

from nanoflow_tune.autotune.baselines import (
    PingPongChoice,
    equal_split,
    nano_only,
    ping_pong,
    sequential,
)
from nanoflow_tune.autotune.certificate import space_bound
from nanoflow_tune.autotune.climb import Climb
from nanoflow_tune.autotune.configuration_lp import Rates, solve
from nanoflow_tune.autotune.configuration_problem import (
    NOTHING,
    Cell,
    Forms,
    Lane,
    Longer,
    Problem,
    Together,
)
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.cut_bounds import Bounds, Part, cuts, kept, splits_of
from nanoflow_tune.autotune.simulator import predict, simulate
from nanoflow_tune.runtime.schedule import IllegalScheduleError

from .fakes import MIX, graph_of, h200, linear_profile, quick_space, reduce_profile

LAYER = Cell(
    high=1.0, low=1.0, num_layers=1, beyond_us=0.0, us_per_joule=(0.0, 0.0), beyond_cap_us=0.0
)
CAPPED = replace(LAYER, us_per_joule=(1.0, 1.0))
Option = tuple[int, float, float]
"""(node, us, joules)."""


def lane(*options: Option) -> Lane:
    nodes, us, joules = zip(*options, (NOTHING, 1.0, 0.0), strict=True)
    return Lane(
        node=np.array(nodes, dtype=np.intp),
        us=np.array(us),
        sync_us=np.zeros(len(us)),
        alone_sync_us=np.zeros(len(us)),
        stretch=np.zeros(len(us)),
        joules=np.array(joules),
        is_hidden=np.zeros(len(us), dtype=bool),
    )


def problem(
    first_ops: tuple[Option, ...],
    second_ops: tuple[Option, ...] = (),
    third_ops: tuple[Option, ...] = (),
    slowdown: float = 1.0,
    can_meet: bool = True,
    forms: tuple[Forms, ...] = (),
    longer: tuple[Longer, ...] = (),
) -> Problem:
    """Every option slows every option of another lane down as much."""
    lanes = lane(*first_ops), lane(*second_ops), lane(*third_ops)
    shape = tuple(len(one.node) for one in lanes)
    busy = [np.arange(n) < n - 1 for n in shape]
    held = [np.reshape(b, [-1 if d == k else 1 for d in range(3)]) for k, b in enumerate(busy)]
    count = sum(np.broadcast_to(h, shape).astype(int) for h in held)
    first, second, third = places = np.nonzero(((count <= 1) | can_meet) & (count > 0))
    slow = (slowdown ** np.maximum(0, count[places] - 1)).astype(np.float32)
    num_nodes = 1 + max(node for some in (first_ops, second_ops, third_ops) for node, _, _ in some)
    return Problem(
        lanes=lanes,
        together=Together(
            places=(first, second, third),
            slowdowns=(slow, slow, slow),
            numbers=np.arange(len(slow)),
        ),
        has_work=np.ones(num_nodes, dtype=bool),
        forms=forms,
        longer=longer,
    )


@pytest.mark.parametrize(
    ("slowdown", "can_meet", "expected_us"),
    [(1.0, True, 10.0), (1.25, True, 11.0), (2.0, True, 14.0), (1.0, False, 14.0)],
)
def test_two_ops_side_by_side(slowdown: float, can_meet: bool, expected_us: float):
    """10 and 4 us: the shorter hides, but slows both down; at 2 it is not worth it."""
    made = problem(((0, 10.0, 0.0),), ((1, 4.0, 0.0),), slowdown=slowdown, can_meet=can_meet)
    assert solve(made, LAYER).us == pytest.approx(expected_us, rel=1e-3)


def test_time_and_joules_belong_to_one_choice():
    """10 us for 6 us of joules or 6 for 10: half of each at best, 8, not 6 and 6."""
    made = problem(((0, 10.0, 6.0), (0, 6.0, 10.0)))
    found = solve(made, CAPPED)
    assert found.us == pytest.approx(8.0, rel=1e-3)
    assert found.time_price == pytest.approx(found.joule_price, rel=1e-2)


def test_rows_take_the_cheaper_form():
    """Node 0 and then either node 1 (5 us) or nodes 2 and 3 (2 us each)."""
    options = tuple((node, us, 0.0) for node, us in enumerate((3.0, 5.0, 2.0, 2.0)))
    made = problem(options, forms=(Forms(chains=((1,), (2, 3))),))
    assert solve(made, LAYER).us == pytest.approx(7.0, rel=1e-3)


def test_a_collective_without_sms_is_paid_by_the_norm_behind_it():
    """8 us of norm; a collective of 3 us beside it makes it a quarter longer: 10 us."""
    longer = (Longer(option=0, norm=0, part=0.25),)
    made = problem(((0, 8.0, 0.0),), third_ops=((1, 3.0, 0.0),), longer=longer)
    assert solve(made, LAYER).us == pytest.approx(10.0, rel=1e-3)


def random_problem(rng: Random) -> Problem:
    def options(nodes: tuple[int, ...]) -> tuple[Option, ...]:
        return tuple(
            (node, rng.uniform(1.0, 9.0), rng.uniform(1.0, 9.0)) for node in nodes for _ in range(2)
        )

    return problem(options((0, 1)), options((2, 3)), options((4,)), slowdown=rng.uniform(1.0, 1.8))


def full_lp_us(made: Problem, cell: Cell) -> float:
    """The LP over every configuration there is, by another modeller."""
    rates, program = Rates(made, cell), pulp.LpProblem("full", pulp.LpMinimize)
    period = pulp.LpVariable("period", 0)
    done: dict[int, list[pulp.LpAffineExpression]] = {}
    time, joules = [], []
    program += period
    for column in range(made.together.size):
        spent = pulp.LpVariable(f"x_{column}", 0)
        time.append(spent)
        joules.append(float(rates.joules[column]) * spent)
        for number, places in enumerate(made.together.places):
            rate = float(rates.rates[number][column])
            node = int(made.lanes[number].node[places[column]])
            if node != NOTHING:
                done.setdefault(node, []).append(rate * spent)
    program += period >= pulp.lpSum(time)
    program += period >= pulp.lpSum(joules)
    for parts in done.values():
        program += pulp.lpSum(parts) >= 1
    program.solve(pulp.HiGHS(msg=False, threads=2))
    return float(period.varValue or 0.0)


@pytest.mark.parametrize("seed", range(30))
def test_column_generation_ends_at_the_value_of_the_whole_lp(seed: int):
    made = random_problem(Random(seed))
    exact_us = full_lp_us(made, CAPPED)
    found = solve(made, CAPPED)
    assert exact_us * (1 - 1e-3) <= found.us <= exact_us * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_fewer_options_are_never_better(seed: int):
    rng = Random(seed)
    made = random_problem(rng)
    keep = [
        np.array([*(i % 2 == 0 or rng.random() < 0.5 for i in range(len(one.node) - 1)), True])
        for one in made.lanes
    ]
    fewer_us = solve(kept(made, keep), CAPPED).us
    assert fewer_us >= solve(made, CAPPED).us * (1 - 1e-3)


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
    bound = space_bound(
        graph, costs, space, MIX, best_us=min(periods), is_powered=is_powered, work=6e7
    )
    assert 0 < bound.bound_us <= min(periods) * (1 + 3e-3)
    assert [c.num_nano_batches for c in bound.counts] == [1, 2, 3, 4]
    for schedule, us in zip(schedules, periods, strict=True):
        count = bound.counts[len(schedule.nano_batches) - 1]
        assert count.bound_us <= us * (1 + 3e-3) or count.is_dominated
    climb = Climb(graph, costs, space, MIX, clock=0.8, is_powered=is_powered, seed=2)
    for count in (2, 3, 4):
        tops = climb.run(climb.starts(count, schedules), 150, is_cut_kept=False)
        found = [climb.written(period) for period in tops]
        for candidate in found:
            if candidate is not None:
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
    found, _ = bounds.solve(Part(single, bounds.cell(1.0, 1.0)), float("inf"))
    assert found.us == pytest.approx(exact_us, rel=1e-3)
