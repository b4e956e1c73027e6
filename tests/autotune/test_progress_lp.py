"""The LP that keeps the order of two nano-batches: by hand, and never below the plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.baselines import equal_split
from nanoflow_tune.autotune.better_kernels import with_better_kernels
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.cut_bounds import Bounds, Part, rows_of
from nanoflow_tune.autotune.milp_input import Split
from nanoflow_tune.autotune.patterns import COMPUTE, NETWORK
from nanoflow_tune.autotune.progress_lp import ProgressLp, ring
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.runtime.plan import Candidate, Lane

from .fakes import MIX, graph_of, h200, linear_profile, quick_space, reduce_profile

EVEN = Split(sizes=(1024, 1024), row_order="interleaved")


def bounds_of(model: str, tp_degree: int, us_per_row: float, lane: Lane = NETWORK) -> Bounds:
    graph = graph_of(model, tp_degree)
    profile = (
        linear_profile(graph)
        if tp_degree == 1
        else reduce_profile(graph, nccl_us_per_row=us_per_row, copy_us_per_row=us_per_row)
    )
    return Bounds(graph, CostModel(profile, h200()), quick_space(), MIX, True, lane)


def test_a_layer_is_a_ring_with_a_fork_where_both_attentions_run():
    bounds = bounds_of("llama3-8b", 1, 0.0)
    num_ops = len(bounds.configurations.ops)
    steps = ring(bounds.graph, bounds.configurations.index, [True] * num_ops)
    before = [step.before for step in steps]
    forks = [state for state in set(before) if before.count(state) == 2]
    assert len(forks) == 1
    assert len(steps) == num_ops + 2  # each attention before or after the other one
    assert [step.after for step in steps if step.is_last] == [0]


def test_ops_without_rows_have_no_steps():
    bounds = bounds_of("llama3-8b", 1, 0.0)
    index = bounds.configurations.index
    has_work = [name != "decode_attention" for name in index]
    steps = ring(bounds.graph, index, has_work)
    assert len(steps) == len(index) - 1
    assert len({step.before for step in steps}) == len(steps)


@pytest.mark.parametrize(("model", "tp_degree"), [("llama3-8b", 1), ("llama2-70b", 2)])
@pytest.mark.parametrize("clock", [0.6, 0.8, 1.0])
def test_orders_never_loosen_the_bound(model: str, tp_degree: int, clock: float):
    bounds = bounds_of(model, tp_degree, 0.1)
    cell = bounds.cell(clock, 0.97 * clock)
    lp = ProgressLp(bounds.graph, bounds.configurations.index, bounds.problem(EVEN))
    plain, _ = bounds.solve(Part(EVEN, cell), 0.0)
    assert lp.bound_us(cell) >= plain.us * (1 - 1e-3)


def test_long_collectives_of_a_nano_batch_are_seen_to_wait():
    """Collectives as long as all else fill no gap wholly, as their own nano-batch stands still."""
    bounds = bounds_of("llama2-70b", 2, 0.5)
    cell = bounds.cell(1.0, 1.0)
    lp = ProgressLp(bounds.graph, bounds.configurations.index, bounds.problem(EVEN))
    plain, _ = bounds.solve(Part(EVEN, cell), 0.0)
    assert lp.bound_us(cell) > plain.us * 1.01


@pytest.mark.parametrize("width", [0.01, 0.04, 0.08])
def test_a_range_of_clocks_is_never_above_a_clock_in_it(width: float):
    bounds = bounds_of("llama2-70b", 2, 0.1)
    wide, _ = bounds.solve(Part(EVEN, bounds.cell(0.8 * (1 + width), 0.8 * (1 - width))), 1e12)
    for part in (-1.0, -0.5, 0.0, 0.4, 1.0):
        clock = 0.8 * (1 + part * width)
        found, _ = bounds.solve(Part(EVEN, bounds.cell(clock, clock)), 1e12)
        assert wide.us <= found.us * (1 + 1e-3)


def test_prices_tried_on_a_cut_prove_no_more_than_its_own_lp():
    bounds = bounds_of("llama2-70b", 2, 0.1)
    other = Split(sizes=(512, 1536), row_order="interleaved")
    screen = bounds.screen((EVEN, other))
    cell = bounds.cell(0.82, 0.78)
    bounds.solve(Part(EVEN, cell), 1e12)
    tried_us = screen.bound_us(rows_of(other, MIX), other.row_order, cell)
    own, _ = bounds.solve(Part(other, cell), 1e12)
    assert 0.8 * own.us < tried_us <= own.us * (1 + 1e-3)


def test_collectives_in_the_lane_of_compute_hide_behind_attention_only():
    cells = [bounds_of("llama2-70b", 2, 0.1, lane) for lane in (NETWORK, COMPUTE)]
    apart, together = (one.solve(Part(EVEN, one.cell(1.0, 1.0)), 0.0)[0].us for one in cells)
    assert together > apart


def test_better_kernels_are_never_worse_and_change_kernels_only():
    graph = graph_of("llama2-70b", 2)
    costs = CostModel(reduce_profile(graph, nccl_us_per_row=0.1, copy_us_per_row=0.1), h200())
    schedule = equal_split(graph, costs, MIX, quick_space())
    first = Candidate(schedule=schedule, predicted=predict(schedule, graph, costs, MIX))
    best = with_better_kernels(first, graph, costs, MIX)
    assert best.predicted.period_us <= first.predicted.period_us
    for one, other in zip(best.schedule.nano_ops, schedule.nano_ops, strict=True):
        assert replace(one, variant=other.variant) == other
