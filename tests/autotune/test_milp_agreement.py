"""The MILP's constraints and the simulator give one period where the interference is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.autotune.baselines import PingPongChoice, equal_split, ping_pong, sequential
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.milp_agreement import MOST_ROUNDS, agreement
from nanoflow_tune.autotune.simulator import simulate
from nanoflow_tune.autotune.structure import find_structure
from nanoflow_tune.profiler.store import shipped_profile
from nanoflow_tune.runtime.op_graph import Op, RowMix
from nanoflow_tune.search_spaces.schema import RowOrder

from .fakes import MIX, graph_of, h200, quick_space
from .tiny import MIX as TINY_MIX
from .tiny import FixedCosts, tiny_graph, tiny_schedule

SHIPPED = shipped_profile("h200")


class OneKernel(FixedCosts):
    """Each op has the same one kernel on every share."""

    power = None

    def variants(self, op: Op, num_sms: int) -> tuple[str, ...]:
        return ("any",)


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
@pytest.mark.parametrize("row_order", ["interleaved", "decodes_first"])
def test_they_agree_on_what_the_milp_finds_from_the_shipped_profile(
    model: str, tp_degree: int, least_batches: int, row_order: RowOrder
):
    graph, costs = graph_of(model, tp_degree), CostModel(SHIPPED, h200())
    space = replace(SPACE, row_orders=(row_order,))
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
    if schedule is None:
        pytest.skip("its shares find no places")
    assert certificate.simulated_us == simulate(schedule, graph, costs, MIX).layer_us
    assert certificate.same_interference_us == pytest.approx(certificate.simulated_us, rel=0.01)


@given(
    a=st.tuples(st.floats(4.0, 30.0), st.floats(1.0, 2.0)),
    b=st.tuples(st.floats(4.0, 30.0), st.floats(1.0, 2.0)),
    pair_slowdown=st.floats(1.0, 1.6),
    row_order=st.sampled_from(["interleaved", "decodes_first"]),
)
@settings(max_examples=60, deadline=None)
def test_they_agree_on_random_small_layers(
    a: tuple[float, float], b: tuple[float, float], pair_slowdown: float, row_order: RowOrder
):
    """Two nano-batches of compute and memory, each of any length, with any slowdown."""
    times = {(rows, 132): rows / 64 for rows in (32, 64)}
    us: dict[tuple[str, int, int], float] = {}
    for share in range(4, 133, 4):
        for rows in (32, 64):
            for op, (solo_us, slope) in (("a", a), ("b", b)):
                us[op, rows, share] = solo_us * times[rows, 132] * (132 / share) ** (slope - 1)
    graph, costs = tiny_graph(40), OneKernel(us, pair_slowdown=pair_slowdown)
    space = replace(SPACE, row_orders=(row_order,), token_granularity=32)
    schedule, certificate = find_structure(
        graph,
        costs,  # pyright: ignore[reportArgumentType]
        space,
        TINY_MIX,
        seed=0,
        least_batches=2,
    )
    assert schedule is not None
    assert certificate.same_interference_us == pytest.approx(certificate.simulated_us, rel=0.01)
    assert certificate.rounds <= MOST_ROUNDS


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
