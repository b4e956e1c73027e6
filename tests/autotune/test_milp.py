from __future__ import annotations

from itertools import permutations, product

import pytest

from nanoflow_tune.autotune.baselines import PingPongChoice, ping_pong, sequential, whole_gpu_choice
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.milp import Model
from nanoflow_tune.autotune.milp_input import Edge, Instance, split_candidates
from nanoflow_tune.autotune.simulator import simulate
from nanoflow_tune.autotune.structure import find_structure
from nanoflow_tune.runtime.legality import check, serialize_conflicts
from nanoflow_tune.runtime.schedule import IllegalScheduleError

from .fakes import MIX, graph_of, h200, linear_profile, quick_space, reduce_profile
from .tiny import MIX as TINY_MIX
from .tiny import FixedCosts, tiny_graph, tiny_schedule

NODES = (("a", 0), ("b", 0), ("a", 1), ("b", 1))


def tiny_instance(us: dict[tuple[str, int, int], float], shares: dict[str, tuple[int, int]]):
    edges = [
        Edge(before=first + producer, after=first + consumer, layer_distance=distance)
        for first in (0, 2)
        for producer, consumer, distance in ((0, 1, 0), (1, 0, 1))
    ]
    return Instance(
        num_sms=132,
        lanes=("compute", "memory") * 2,
        shares=tuple(shares[op] for op, _ in NODES),
        edges=tuple(edges),
        num_splits=1,
        duration_us={
            (node, 0, share): us[op, 32, share]
            for node, (op, _) in enumerate(NODES)
            for share in shares[op]
        },
        floor_us=(0.0,),
    )


def brute_force_us(
    us: dict[tuple[str, int, int], float], shares: dict[str, tuple[int, int]]
) -> float:
    """Shortest simulated layer over every share, order and stage."""
    graph, costs, best = tiny_graph(40), FixedCosts(us), float("inf")
    for chosen in product(*(shares[op] for op, _ in NODES)):
        for order in permutations(range(1, 4)):
            for stages in product((0, 1), repeat=3):
                nodes = (0, *order)
                stage = dict(zip((1, 2, 3), stages, strict=True)) | {0: 0}
                places = [(*NODES[n], stage[n], chosen[n]) for n in nodes]
                try:
                    schedule = serialize_conflicts(tiny_schedule(*places), graph, 132, 8)
                except IllegalScheduleError:
                    continue
                timeline = simulate(schedule, graph, costs, TINY_MIX, sync_us=0.0)
                best = min(best, timeline.layer_us)
    return best


@pytest.mark.parametrize(
    ("a", "b", "shares"),
    [
        ((10.0, 12.0), (4.0, 9.0), {"a": (132, 100), "b": (132, 32)}),
        ((10.0, 19.0), (8.0, 10.0), {"a": (132, 68), "b": (132, 64)}),
        ((10.0, 19.0), (8.0, 15.0), {"a": (132, 68), "b": (132, 64)}),
        ((5.0, 6.0), (9.0, 9.5), {"a": (132, 68), "b": (132, 64)}),
    ],
)
def test_the_milp_agrees_with_brute_force_on_tiny_graphs(
    a: tuple[float, float], b: tuple[float, float], shares: dict[str, tuple[int, int]]
):
    us = {("a", 32, share): time for share, time in zip(shares["a"], a, strict=True)}
    us |= {("b", 32, share): time for share, time in zip(shares["b"], b, strict=True)}
    solution, certificate = Model(tiny_instance(us, shares)).solve(10.0, 1e-6, 0)
    assert solution is not None
    assert certificate.status == "optimal"
    assert certificate.period_us == pytest.approx(brute_force_us(us, shares), rel=1e-3)
    assert certificate.bound_us == pytest.approx(certificate.period_us, rel=1e-3)


def test_candidates_include_one_nano_batch_and_respect_the_granularity():
    splits = split_candidates(quick_space(token_granularity=128), MIX)
    assert splits[0].sizes == (2048, 0)
    assert {split.num_nano_batches for split in splits} == {1, 2}
    assert all(size % 128 == 0 for split in splits for size in split.sizes)
    assert any(split.sizes == (1024, 1024) for split in splits)
    three = split_candidates(quick_space(max_nano_batches=3), MIX, 2)
    assert {split.num_nano_batches for split in three} == {2, 3}
    assert all(sum(split.sizes) == 2048 for split in three)


@pytest.mark.parametrize(("model", "tp_degree"), [("llama3-8b", 1), ("llama2-70b", 2)])
def test_the_structure_is_legal_and_as_fast_as_the_schedule_it_starts_from(
    model: str, tp_degree: int
):
    graph = graph_of(model, tp_degree)
    costs = CostModel(linear_profile(graph, has_pairs=False), h200())
    costs.energy = None  # no power floor under the periods compared here
    choice = PingPongChoice(
        first_tokens=1024,
        row_order="interleaved",
        compute_sms=100 if tp_degree == 1 else 116,
        memory_sms=32 if tp_degree == 1 else 16,
        network_sms=16,
        order="blocks" if tp_degree == 1 else "interleaved",
    )
    known = ping_pong(graph, costs, MIX, choice)
    space = quick_space(milp_time_limit_s=2.0)
    schedule, certificate = find_structure(
        graph, costs, space, MIX, seed=0, known=[known], least_batches=2
    )
    assert schedule is not None
    check(schedule, graph, 132, 8)
    assert schedule.is_overlapped
    started_us = simulate(known, graph, costs, MIX).layer_us
    assert certificate.period_us <= 1.03 * started_us
    assert 0 < certificate.bound_us <= certificate.period_us + 1e-6
    assert certificate.gap == pytest.approx(
        1 - certificate.bound_us / certificate.period_us, abs=1e-6
    )
    assert simulate(schedule, graph, costs, MIX).layer_us <= 1.03 * certificate.period_us


def test_three_nano_batches_are_a_choice_of_the_same_model():
    graph = graph_of("llama3-8b")
    costs = CostModel(None, h200())
    space = quick_space(max_nano_batches=3, milp_time_limit_s=3.0)
    known = [sequential(graph, costs, MIX)]
    schedule, certificate = find_structure(graph, costs, space, MIX, seed=0, known=known)
    assert schedule is not None
    assert certificate.num_binaries > 150


@pytest.mark.parametrize(("extra_us", "expected_us"), [(1.0, 14.0), (4.0, 16.0)])
def test_a_collective_without_sms_makes_the_op_behind_it_longer(
    extra_us: float, expected_us: float
):
    """10 us of compute, then a collective: 6 us on all SMs, or 3 us on none and a longer norm."""
    instance = Instance(
        num_sms=132,
        lanes=("compute", "network"),
        shares=((132,), (0, 132)),
        edges=(
            Edge(before=0, after=1, layer_distance=0),
            Edge(before=1, after=0, layer_distance=1),
        ),
        num_splits=1,
        duration_us={(0, 0, 132): 10.0, (1, 0, 0): 3.0, (1, 0, 132): 6.0},
        floor_us=(0.0,),
        sum_us={(0, 1, 0): extra_us},
    )
    solution, certificate = Model(instance).solve(10.0, 1e-6, 0)
    assert solution is not None
    assert certificate.period_us == pytest.approx(expected_us, rel=1e-4)
    assert certificate.bound_us <= certificate.period_us + 1e-6
    assert solution.share[1] == (0 if expected_us < 16.0 else 132)


def test_the_milp_starts_from_and_keeps_up_with_the_whole_gpu_ping_pong():
    graph = graph_of("llama2-70b", 2)
    made = reduce_profile(graph, nccl_us_per_row=0.3, copy_us_per_row=0.3)
    costs = CostModel(made, h200())
    costs.energy = None
    known = ping_pong(graph, costs, MIX, whole_gpu_choice(1024, "interleaved", 132))
    schedule, certificate = find_structure(
        graph,
        costs,
        quick_space(milp_time_limit_s=2.0),
        MIX,
        seed=0,
        known=[known],
        least_batches=2,
    )
    assert schedule is not None
    check(schedule, graph, 132, 8)
    assert schedule.is_overlapped
    assert {n.num_sms for n in schedule.nano_ops if n.lane == "network"} == {0}
    assert certificate.period_us <= 1.03 * simulate(known, graph, costs, MIX).layer_us
    assert certificate.bound_us <= certificate.period_us + 1e-6
