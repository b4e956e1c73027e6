"""The MILP's constraints and the simulator give one period where the interference is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.baselines import PingPongChoice, equal_split, ping_pong, sequential
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.milp_agreement import agreement
from nanoflow_tune.autotune.simulator import simulate
from nanoflow_tune.autotune.structure import find_structure
from nanoflow_tune.profiler.store import shipped_profile
from nanoflow_tune.runtime.op_graph import RowMix

from .fakes import MIX, graph_of, h200, quick_space
from .tiny import MIX as TINY_MIX
from .tiny import FixedCosts, tiny_graph, tiny_schedule

SHIPPED = shipped_profile("h200")
SPACE = quick_space(milp_time_limit_s=2.0, token_granularity=512)


def test_hand_worked_overlap_with_a_slowdown():
    """a 10 us beside b 4 us, both 1.25 times slower together: the period is that of the lane a."""
    us = {("a", 32, 100): 10.0, ("b", 32, 32): 4.0}
    places = ("a", 0, 0, 100), ("b", 1, 1, 32), ("a", 1, 0, 100), ("b", 0, 0, 32)
    schedule = tiny_schedule(*places)
    both = agreement(schedule, tiny_graph(40), FixedCosts(us, pair_slowdown=1.25), TINY_MIX)
    assert both.simulated_us == pytest.approx(both.same_interference_us, rel=0.01)
    assert both.simulated_us > 20.0


@pytest.mark.parametrize(
    ("model", "tp_degree"), [("llama3-8b", 1), ("llama2-70b", 2), ("llama2-70b", 8)]
)
@pytest.mark.parametrize("least_batches", [1, 2])
def test_they_agree_on_what_the_milp_finds_from_the_shipped_profile(
    model: str, tp_degree: int, least_batches: int
):
    graph, costs = graph_of(model, tp_degree), CostModel(SHIPPED, h200())
    space = replace(SPACE, row_orders=("interleaved",))  # in both, TP8's shares find no places
    known = [sequential(graph, costs, MIX), equal_split(graph, costs, MIX, space)]
    schedule, certificate = find_structure(
        graph,
        costs,
        space,
        MIX,
        seed=0,
        known=known[least_batches - 1 :],
        least_batches=least_batches,
    )
    assert schedule is not None
    assert certificate.simulated_us == simulate(schedule, graph, costs, MIX).layer_us
    assert certificate.same_interference_us == pytest.approx(certificate.simulated_us, rel=0.01)


@pytest.mark.parametrize("order", ["blocks", "interleaved"])
def test_they_agree_on_ping_pongs(order: str):
    graph, costs = graph_of("llama2-70b", 2), CostModel(SHIPPED, h200())
    mix = RowMix(
        decode_tokens=512, prefill_tokens=512, decode_context_tokens=768, prefill_context_tokens=257
    )
    choice = PingPongChoice(
        first_tokens=384,
        row_order="interleaved",
        compute_sms=100,
        memory_sms=32,
        network_sms=16,
        order=order,  # pyright: ignore[reportArgumentType]
    )
    assert agreement(ping_pong(graph, costs, mix, choice), graph, costs, mix).difference <= 0.01
